"""A checkpoint's own tokenizer, read from its source into memory."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..proto.v1.errors import CheckpointNotFoundError, InvalidRequestError, one_line
from .records import HubToken, SourceSpec
from .remote_code import read_modules
from .sources import open_source, read_file

# What transformers' tokenizers read. Weights are never among them.
TOKENIZER_FILES = (
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


def load_tokenizer(spec: SourceSpec, token: HubToken, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of the checkpoint, by the checkpoint's own code if it may. No file of it stays on disk,
    but for the code in transformers' cache of modules.

    Raises InvalidRequestError where the checkpoint has none that transformers can load.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="shardlift-tokenizer-") as folder:
        for file, data in tokenizer_files(spec, token, (*TOKENIZER_FILES, "config.json")):
            (Path(folder) / file).write_bytes(data)
        if trust_remote_code:
            _write_code(spec, token, Path(folder))
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:
            text = one_line(error, 400).replace(folder, spec.location)
            raise InvalidRequestError(f"{spec.location} has no tokenizer that can be loaded: {text}") from None


def _write_code(spec: SourceSpec, token: HubToken, folder: Path) -> None:
    """The files of code that the tokenizer's config names."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        references = config["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is none; what else is wrong, transformers says
    given = references if isinstance(references, list) else [references]
    modules = [reference.partition(".")[0] for reference in given if isinstance(reference, str)]
    source = open_source(spec, token)
    try:
        for file, data in read_modules(source, modules).items():
            (folder / file).write_bytes(data)
    finally:
        source.close()


def tokenizer_files(
    spec: SourceSpec, token: HubToken, names: Sequence[str] = TOKENIZER_FILES
) -> Iterator[tuple[str, bytes]]:
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

    def __init__(self, spec: SourceSpec, token: HubToken, trust_remote_code: bool = False) -> None:
        self._spec = spec
        self._token = token
        self._trust_remote_code = trust_remote_code
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def get(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._spec, self._token, self._trust_remote_code)
            return self._tokenizer
