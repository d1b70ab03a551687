"""What a model's modules held before their first pass, which is what a checkpoint has to hold.

bitsandbytes changes its modules when they first compute. Everywhere a bias takes the dtype that is computed in. On CPUs
with AVX512-BF16 a 4-bit weight is packed in another order, its statistics are rounded to bf16, and double quantization
is undone. The order can be put back to the bit. Of the statistics, those that would lose bits are kept here: one byte
for 64 weights with double quantization, nothing without it in a bf16 model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from torch import nn

from .serialized import own_tensors

# Rows that bitsandbytes packs together on a CPU, and bytes of a row's pair of columns there.
_PACKED_ROWS = 32
_UNPACK_BYTES = 4 << 20  # at a time: what it takes is several times that


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTensor:
    """A tensor as a checkpoint has it. `read` gives it, on whatever device it is; it may share the model's memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> HeldTensor:
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape), read=lambda: tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one module holds of its own at a moment between two passes; no copies.

    tensors: its parameters and persistent buffers. state: of a 4-bit weight. scales: of an 8-bit weight.
    """

    tensors: dict[str, torch.Tensor]
    state: Any = None
    scales: torch.Tensor | None = None


class Pristine:
    """Made before the model's first pass. Costs nothing until that changes something."""

    def __init__(self, model: nn.Module) -> None:
        self._states: dict[str, Any] = {}
        self._biases: dict[str, torch.Tensor] = {}
        for path, module in model.named_modules():
            if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                continue
            if module.bias is not None:
                self._biases[path] = module.bias.data
            if isinstance(module, bnb.nn.Linear4bit) and _will_be_packed(module):
                state = module.weight.quant_state
                if state.nested or not torch.equal(state.absmax.bfloat16().float(), state.absmax):
                    # Packing puts other tensors in the place of these; it doesn't write to them.
                    self._states[path] = copy.copy(state)

    def snapshot(self, path: str, module: nn.Module) -> Snapshot:
        """To be taken on the thread that computes, or when nothing does. Quick."""
        tensors = {name: tensor.detach() for name, tensor in own_tensors(module)}
        if path in self._biases:
            tensors["bias"] = self._biases[path]
        if isinstance(module, bnb.nn.Linear4bit):
            return Snapshot(tensors=tensors, state=copy.copy(getattr(module.weight, "quant_state", None)))
        if isinstance(module, bnb.nn.Linear8bitLt) and not module.state.has_fp16_weights:
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            return Snapshot(tensors=tensors, scales=scales)
        return Snapshot(tensors=tensors)

    def held(self, path: str, snapshot: Snapshot) -> dict[str, HeldTensor]:
        """What the module's part of a checkpoint is, by name within the module, as bitsandbytes serializes it."""
        found = {name: HeldTensor.of(tensor) for name, tensor in snapshot.tensors.items()}
        if snapshot.scales is not None:
            found["SCB"] = HeldTensor.of(snapshot.scales.detach())
            found["weight_format"] = HeldTensor.of(torch.tensor(0, dtype=torch.uint8))  # by rows
        state = snapshot.state
        if state is None:
            return found
        if not getattr(state, "packing_format_for_cpu", False):
            return found | {f"weight.{name}": HeldTensor.of(value) for name, value in _statistics(state)}
        found["weight"] = _unpacked(snapshot.tensors["weight"], state)
        kept = self._states.get(path)
        if kept is not None:
            return found | {f"weight.{name}": HeldTensor.of(value) for name, value in _statistics(kept)}
        rounded, state = state.absmax, copy.copy(state)
        state.absmax, state.dtype = torch.empty(0, device="meta"), state.original_dtype
        found |= {f"weight.{name}": HeldTensor.of(value) for name, value in _statistics(state)}
        found["weight.absmax"] = HeldTensor(
            dtype=torch.float32, shape=(rounded.numel(),), read=lambda: _widened(rounded.T)
        )
        return found

    def dequantized(self, path: str, snapshot: Snapshot) -> HeldTensor:
        """A 4-bit weight in the dtype that it was quantized from."""
        state = snapshot.state
        packed = getattr(state, "packing_format_for_cpu", False)
        dtype = state.original_dtype if packed else state.dtype

        def read() -> torch.Tensor:
            held, whole = self.held(path, snapshot), copy.copy(state)
            if packed:
                whole = copy.copy(self._states.get(path, state))
                if path not in self._states:
                    whole.absmax, whole.dtype = held["weight.absmax"].read(), dtype
                whole.packing_format_for_cpu = False
            weight: torch.Tensor = bnb.functional.dequantize_4bit(held["weight"].read(), whole)
            return weight

        return HeldTensor(dtype=dtype, shape=tuple(state.shape), read=read)


def _will_be_packed(module: bnb.nn.Linear4bit) -> bool:
    return (
        getattr(module, "support_avx512bf16_for_cpu", False)
        and module.weight.device.type == "cpu"
        and getattr(module.weight, "quant_state", None) is not None
    )


def _statistics(state: Any) -> list[tuple[str, torch.Tensor]]:
    return list(state.as_dict(packed=True).items())


def _widened(rounded: torch.Tensor) -> torch.Tensor:
    """float32 of bf16, flat. (By numpy: torch would have a thread team of its own beside the computing one's.)"""
    bits = np.ascontiguousarray(rounded.view(torch.int16).numpy()).reshape(-1).view(np.uint16)
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))


def _unpacked(packed: torch.Tensor, state: Any) -> HeldTensor:
    """The weight in the order in which it was quantized: the inverse of bitsandbytes'
    `_convert_weight_packed_for_cpu`."""
    storage = getattr(state, "original_storage_type", None) or torch.uint8
    *outer, last = state.original_qshape
    shape = (*outer, last // storage.itemsize)

    def read() -> torch.Tensor:
        rows, columns = packed.shape  # columns: of bytes, each two weights
        whole = np.empty((rows, columns), dtype=np.uint8)
        blocks = packed.numpy().reshape(-1, columns, _PACKED_ROWS)  # [rows / 32, pairs, 32]
        step = max(1, _UNPACK_BYTES // (_PACKED_ROWS * columns))
        for first in range(0, len(blocks), step):
            block = blocks[first : first + step]
            # 64 weights of a pair of columns, row by row: the first 32 are the low halves.
            weights = np.concatenate([block & 0xF, block >> 4], axis=-1)
            weights = weights.reshape(len(block), columns, _PACKED_ROWS, 2)
            joined = (weights[..., 0] << 4) | weights[..., 1]
            rows_of = slice(first * _PACKED_ROWS, (first + len(block)) * _PACKED_ROWS)
            whole[rows_of] = joined.transpose(0, 2, 1).reshape(-1, columns)
        return torch.from_numpy(whole).reshape(state.original_qshape).view(storage)

    return HeldTensor(dtype=storage, shape=shape, read=read)
