"""A checkpoint's own tokenizer, read from its source into memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..proto.v1.errors import CheckpointNotFoundError, InvalidRequestError, one_line
from .records import HubToken, SourceSpec
from .sources import open_source, read_file

# What transformers' tokenizers read. Weights are never among them.
_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
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


def load_tokenizer(spec: SourceSpec, token: HubToken) -> Any:
    """transformers' tokenizer of the checkpoint. No file of it stays on disk.

    Raises InvalidRequestError where the checkpoint has none that transformers can load.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="shardlift-tokenizer-") as folder:
        for file, data in tokenizer_files(spec, token, (*_FILES, "config.json")):
            (Path(folder) / file).write_bytes(data)
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            text = one_line(error, 200).replace(folder, spec.location)
            raise InvalidRequestError(f"{spec.location} has no tokenizer that can be loaded: {text}") from None


def tokenizer_files(spec: SourceSpec, token: HubToken, names: Sequence[str] = _FILES) -> Iterator[tuple[str, bytes]]:
    """Those of the checkpoint's files `names` that there are, by default all that a tokenizer is made of."""
    source = open_source(spec, token)
    try:
        for file in names:
            try:
                data = read_file(source, file, _FILE_LIMIT_BYTES)
            except CheckpointNotFoundError:
                continue
            yield file, data
    finally:
        source.close()


class LazyTokenizer:
    """A checkpoint's tokenizer, read when it is first asked for."""

    def __init__(self, spec: SourceSpec, token: HubToken) -> None:
        self._spec = spec
        self._token = token
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def get(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._spec, self._token)
            return self._tokenizer
