"""Weights of compressed-tensors checkpoints: its package decompresses them, as transformers' quantizer has it do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from ..proto.v1.errors import CorruptCheckpointError, UnsupportedModelError, one_line


def decompress(
    key: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], config: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    """The weight `key` of `shape` in `dtype`. `config`: the checkpoint's quantization_config.

    Raises CorruptCheckpointError, and UnsupportedModelError for what the installed package doesn't know.
    """
    compressor, scheme = _compressor(json.dumps(config), is_expert=".experts." in key)
    try:
        weight = compressor.decompress(dict(parts), scheme)["weight"]
    except Exception as error:
        raise CorruptCheckpointError(f"compressed-tensors can't decompress {key}: {one_line(error)}") from error
    if tuple(weight.shape) != shape:
        raise CorruptCheckpointError(f"{key} was decompressed to {list(weight.shape)}, not {list(shape)}")
    found: torch.Tensor = weight.to(dtype)
    return found


@cache
def _compressor(config: str, *, is_expert: bool) -> tuple[Any, Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    said = json.loads(config)
    try:
        parsed = QuantizationConfig.model_validate({name: said[name] for name in _FIELDS if name in said})
        groups = list(parsed.config_groups.values())
        # transformers' choice (integrations/compressed_tensors.py): the group whose targets name the experts is theirs.
        named = [any(target.startswith("re:") and "experts" in target for target in group.targets) for group in groups]
        scheme = next(
            (group for group, is_named in zip(groups, named, strict=True) if is_named == is_expert), groups[0]
        )
        return BaseCompressor.get_value_from_registry(scheme.format or parsed.format), scheme
    except Exception as error:
        raise UnsupportedModelError(
            f"the installed compressed-tensors can't read the checkpoint's quantization_config: {one_line(error)}"
        ) from error


_FIELDS = ("config_groups", "quant_method", "kv_cache_scheme", "format", "quantization_status", "ignore")
