"""A config decides how many modules are built, on the head, before anything else is known. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..proto.v1.errors import UnsupportedModelError

# The largest models have some 130; each is built, without its weights, to lay a model out.
MOST_LAYERS = 4096
_MOST_DEPTH = 32


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError for a number of layers that is none, wherever in `config` it is."""
    waiting: list[tuple[int, str, Any]] = [(0, "config", config)]
    while waiting:
        depth, name, value = waiting.pop()
        if depth > _MOST_DEPTH:
            raise UnsupportedModelError(f"the config is nested over {_MOST_DEPTH} deep: no model's is")
        if isinstance(value, Mapping):
            waiting += [(depth + 1, str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            if "layer" in name and len(value) > MOST_LAYERS:
                raise UnsupportedModelError(
                    f"the config's {name} has {len(value)} entries; at most {MOST_LAYERS} layers"
                )
            waiting += [(depth + 1, "", each) for each in value if isinstance(each, (Mapping, list))]
        elif "layer" in name and isinstance(value, (int, float)) and value > MOST_LAYERS:
            raise UnsupportedModelError(f"the config has {name}={value}; at most {MOST_LAYERS} layers can be loaded")
