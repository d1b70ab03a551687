"""A checkpoint's own tokenizer, for requests that come as text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..proto.v1.errors import CheckpointNotFoundError, InvalidRequestError, one_line
from ..worker.records import HubToken, SourceSpec
from ..worker.sources import open_source
from .checkpoint import read_file

# What transformers' tokenizers read. Weights are never among them.
_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_FILE_LIMIT_BYTES = 128 << 20
_HELD_BACK_TOKENS = 8


class Tokenizer:
    """Text to ids and back. Loaded whole into memory: no file of it stays on disk."""

    def __init__(self, spec: SourceSpec, token: HubToken) -> None:
        """Raises InvalidRequestError where the checkpoint has no tokenizer that transformers can load."""
        from transformers import AutoTokenizer

        source = open_source(spec, token)
        with tempfile.TemporaryDirectory(prefix="shardlift-tokenizer-") as folder:
            try:
                for file in _FILES:
                    try:
                        data = read_file(source, file, _FILE_LIMIT_BYTES)
                    except CheckpointNotFoundError:
                        continue
                    (Path(folder) / file).write_bytes(data)
            finally:
                source.close()
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:
                text = one_line(error, 200).replace(folder, spec.location)
                raise InvalidRequestError(f"{spec.location} has no tokenizer that can be loaded: {text}") from None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The conversation in the model's own chat format, up to where its answer begins."""
        if not self._tokenizer.chat_template:
            raise InvalidRequestError("this model's tokenizer has no chat template: send a prompt instead")
        try:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:
            raise InvalidRequestError(f"the chat template refuses this conversation: {one_line(error)}") from None
        return list(encoded["input_ids"])

    def decoder(self) -> Detokenizer:
        return Detokenizer(self._tokenizer)


class Detokenizer:
    """Turns a growing sequence of ids into a growing text, piece by piece.

    Text is held back while it ends in the middle of a character. Each piece is decoded together with a few tokens
    before it, since how a token looks depends on its neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes, often one word, "" while it completes none."""
        self._ids.append(token_id)
        text = self._pending()
        # A character has four bytes at most; what is not whole after twice as many tokens never will be.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._ids) - self._shown <= _HELD_BACK_TOKENS:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back."""
        text = self._pending()
        self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        shown = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
