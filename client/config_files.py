"""Configs that are given by where they are: read here, as transformers reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..proto.v1.errors import InvalidRequestError, one_line

if TYPE_CHECKING:
    from transformers import GenerationConfig


def config_at(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The config.json at `path`: a folder, the file itself, or a repository. Raises InvalidRequestError."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
        else:
            from transformers import PreTrainedConfig

            values, _ = PreTrainedConfig.get_config_dict(os.fspath(path))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"config {os.fspath(path)!r} can't be read: {one_line(error)}") from None
    if not isinstance(values, Mapping) or not values:
        raise InvalidRequestError(f"config {os.fspath(path)!r} holds no config: a config.json is needed")
    return values


def generation_config_of(given: Any) -> GenerationConfig:
    """As transformers' object: one, a dict of its fields, or a folder or repository that has one. Raises
    InvalidRequestError."""
    from transformers import GenerationConfig

    try:
        if isinstance(given, GenerationConfig):
            return GenerationConfig.from_dict(given.to_dict())
        if isinstance(given, Mapping):
            return GenerationConfig(**given)
        if isinstance(given, (str, os.PathLike)):
            return GenerationConfig.from_pretrained(os.fspath(given))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequestError(f"generation_config {str(given)[:80]!r} can't be used: {one_line(error)}") from None
    raise InvalidRequestError(
        f"generation_config is a {type(given).__name__}: a GenerationConfig, a dict of its fields or a path is needed"
    )
