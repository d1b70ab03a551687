"""Weights of compressed-tensors checkpoints: its package decompresses them, as transformers' quantizer has it do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from ..proto.v1.errors import CorruptCheckpointError, UnsupportedModelError, one_line
from .compressed_config import group_of
from .packed import Packing

# By what `transformers` has initialized them with when it loads them; those of FP4 it keeps as they are stored.
_CAST = (torch.float16, torch.bfloat16, torch.float32)
_FIELDS = ("config_groups", "quant_method", "kv_cache_scheme", "format", "quantization_status", "ignore")


def decompress(
    key: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], packing: Packing, dtype: torch.dtype
) -> torch.Tensor:
    """The weight `key` of `shape` in `dtype`.

    Raises CorruptCheckpointError, and UnsupportedModelError for what the installed package doesn't know.
    """
    module = key.rpartition(".")[0]
    compressor, scheme = _compressor(json.dumps(packing.config), group_of(module, packing.config))
    parts = dict(parts)
    if not packing.dequantize and ".experts." not in key and parts["weight_scale"].dtype in _CAST:
        # transformers loads it into a parameter first; a mixture's experts it unpacks on the way in.
        parts["weight_scale"] = parts["weight_scale"].to(dtype)
    try:
        weight = compressor.decompress(parts, scheme)["weight"]
    except Exception as error:
        raise CorruptCheckpointError(f"compressed-tensors can't decompress {key}: {one_line(error)}") from error
    if tuple(weight.shape) != shape:
        raise CorruptCheckpointError(f"{key} was decompressed to {list(weight.shape)}, not {list(shape)}")
    found: torch.Tensor = weight.to(dtype)
    return found


def parse(config: Mapping[str, Any]) -> Any:
    """compressed-tensors' QuantizationConfig. Raises UnsupportedModelError for what the installed one can't read."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate({name: config[name] for name in _FIELDS if name in config})
    except Exception as error:
        raise _unreadable(error) from error


@cache
def _compressor(config: str, group: str) -> tuple[Any, Any]:
    from compressed_tensors.compressors import BaseCompressor

    parsed = parse(json.loads(config))
    try:
        scheme = parsed.config_groups[group]
        return BaseCompressor.get_value_from_registry(scheme.format or parsed.format), scheme
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the installed compressed-tensors can't read the checkpoint's quantization_config: {one_line(error)}"
    )
