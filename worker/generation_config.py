"""How a model generates unless it is told otherwise: by its checkpoint's files, as transformers reads them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from ..proto.v1.errors import CorruptCheckpointError, one_line
from .skeleton import quiet_transformers


def generation_config_of(own: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """`own`, a `generation_config.json`; where a checkpoint has none, what its `config.json` says of generation: tokens
    that end a text, and, in older ones, how to sample. transformers' config objects drop the latter.

    Raises CorruptCheckpointError for values that transformers refuses.
    """
    try:
        return _read(own, config)
    except Exception as error:
        file = "config.json" if own is None else "generation_config.json"
        raise CorruptCheckpointError(f"{file} says how to generate as nothing can: {one_line(error)}") from error


def _read(own: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    with quiet_transformers():
        if own is not None:
            GenerationConfig.from_dict(copy.deepcopy(dict(own)))
            return dict(own)
        implied = GenerationConfig.from_model_config(copy.deepcopy(dict(config))).to_dict()
    return {name: value for name, value in implied.items() if value is not None}
