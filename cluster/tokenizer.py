"""A checkpoint's own tokenizer, for requests that come as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..proto.v1.errors import InvalidRequestError, one_line
from ..worker.records import HubToken, SourceSpec
from ..worker.tokenizer import load_tokenizer

_HELD_BACK_TOKENS = 8


class Tokenizer:
    """Text to ids and back. Loaded whole into memory."""

    def __init__(self, spec: SourceSpec, token: HubToken, trust_remote_code: bool = False) -> None:
        """Raises InvalidRequestError where the checkpoint has no tokenizer that transformers can load."""
        self._tokenizer: Any = load_tokenizer(spec, token, trust_remote_code)

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
