"""What a compressed-tensors checkpoint's `quantization_config` says, as far as plans need it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..proto.v1.errors import UnsupportedModelError, one_line

# What is kept for activations, and for attention's queries, keys and values, that are rounded by fixed scales.
ROUNDING = tuple(
    f"{what}_{name}" for what in ("input", "output", "q", "k", "v") for name in ("scale", "zero_point", "global_scale")
)
_BITS = (4, 8)


def compressed(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of weights that are compressed: what a checkpoint's files hold tells, and not the status that its tool
    has noted, which is "frozen" for many that are published compressed."""
    return {**config, "quantization_status": "compressed"}


def rounds_activations(config: Mapping[str, Any]) -> bool:
    """Whether anything is rounded beside weights."""
    return bool(config.get("kv_cache_scheme")) or any(
        group.get("input_activations") or group.get("output_activations") for group in _groups(config).values()
    )


def group_of(module: str, config: Mapping[str, Any]) -> str:
    """The name of the group that a linear layer belongs to.

    As the package goes about it: a target that is the module's name counts before a pattern, and that before a class.
    Experts, which the model has merged, belong where transformers takes them to belong. Raises UnsupportedModelError.
    """
    groups = _groups(config)
    if not groups:
        raise UnsupportedModelError("the checkpoint's quantization_config has no config_groups, by which it is packed")
    targets = [
        (target, name)
        for name, group in groups.items()
        for target in group.get("targets") or ()
        if isinstance(target, str)
    ]
    classes = [name for target, name in targets if not target.startswith("re:")]
    if ".experts." in module:
        fitting = [name for target, name in targets if target.startswith("re:") and "experts" in target]
    else:
        ordered = sorted(targets, key=lambda each: ("re:" in each[0], each[0]))
        fitting = [name for target, name in ordered if _names(target, module)]
    return next(iter([*fitting, *classes, *groups]))


def bits_of(module: str, config: Mapping[str, Any]) -> int:
    """In which the linear layer's weight is packed. Raises UnsupportedModelError for others than 4 and 8."""
    weights = _groups(config)[group_of(module, config)].get("weights")
    bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
    if bits not in _BITS:
        raise UnsupportedModelError(
            f"the checkpoint packs {module} with compressed-tensors in {bits or 'unknown'} bits: it can be loaded "
            "where all its packed weights have 4, or 8"
        )
    return int(bits)


def _groups(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        return {}
    return {name: group for name, group in groups.items() if isinstance(group, Mapping)}


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise UnsupportedModelError(
            f"the checkpoint's quantization_config has the target {target!r}, which is no pattern: {one_line(error)}"
        ) from None
