"""What a model really holds on its device, by storage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import nn
from transformers import PreTrainedModel

from .experts import Experts4bit
from .spec import ModuleBytes
from .tensors import dtype_name


def measure(model: nn.Module) -> tuple[ModuleBytes, ...]:
    """Bytes per module, each storage counted once, where it is met first; quantization statistics included.

    Measure before the first forward: on CPUs with AVX512-BF16, bitsandbytes then repacks a 4-bit weight (its
    statistics become bf16, one per block: 0.531 bytes a parameter).

    A layer's separate experts are one module here: in a large model they are tens of thousands, more than a message
    holds.
    """
    seen: set[int] = set()
    modules = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        parts = [module]
        if isinstance(module, Experts4bit):
            parts, inside = list(module.modules()), (f"{name}.",)
        size, dtypes, device = 0, [], ""
        for tensor, label in chain.from_iterable(map(_tensors, parts)):
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            size += storage.nbytes()
            dtypes.append((storage.nbytes(), label))
            device = str(tensor.device)
        if size:
            # The dtype of most of its bytes: a quantized weight's, not its statistics'.
            modules.append(ModuleBytes(module=name, dtype=max(dtypes)[1], size_bytes=size, device=device))
    return tuple(modules)


def footprint(model: PreTrainedModel) -> dict[str, int]:
    """parameter_bytes and buffer_bytes, as transformers counts them: without the statistics of quantized weights."""
    parameters = int(model.get_memory_footprint(return_buffers=False))
    return {"parameter_bytes": parameters, "buffer_bytes": int(model.get_memory_footprint()) - parameters}


def _tensors(module: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            yield parameter.data, parameter.quant_type
            for statistic in _statistics(parameter.quant_state):
                yield statistic, dtype_name(statistic.dtype)
        elif isinstance(parameter, Int8Params):
            yield parameter.data, dtype_name(parameter.data.dtype)
            state = getattr(module, "state", None)
            for found in (parameter.CB, parameter.SCB, getattr(state, "CB", None), getattr(state, "SCB", None)):
                if found is not None:
                    yield found, dtype_name(found.dtype)
        else:
            yield parameter.data, dtype_name(parameter.dtype)
    for buffer in module.buffers(recurse=False):
        yield buffer, dtype_name(buffer.dtype)


def _statistics(state: Any) -> Iterator[torch.Tensor]:
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    nested = getattr(state, "state2", None)
    if nested is not None:
        yield from _statistics(nested)
