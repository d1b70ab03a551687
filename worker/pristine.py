"""What a model's modules held before their first pass, which is what a checkpoint has to hold, and what gradients need.

bitsandbytes changes its modules when they first compute. Everywhere a bias takes the dtype that is computed in. On CPUs
with AVX512-BF16 a 4-bit weight is packed in another order, its statistics are rounded to bf16, and double quantization
is undone. The order can be put back to the bit. Of the statistics, those that would lose bits are kept here: one byte
for 64 weights with double quantization, nothing without it in a bf16 model.

The kernel for packed weights has no gradient, and torch goes on without one. So it is not bitsandbytes that packs the
weights of a resident model, but `Pristine`, before a pass without gradients; before one with them it puts back what was
there. A pass whose backward is still to come keeps the weights that it was made with.
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

    tensors: its parameters and persistent buffers. state: of a 4-bit weight; kept: the one before it was packed, where
    it can't be made again. scales: of an 8-bit weight.
    """

    tensors: dict[str, torch.Tensor]
    state: Any = None
    kept: Any = None
    scales: torch.Tensor | None = None


class Pristine:
    """Made before the model's first pass. Costs nothing until that changes something."""

    def __init__(self, model: nn.Module) -> None:
        self._packed: set[nn.Module] = set()
        self._states: dict[nn.Module, Any] = {}
        self._biases: dict[nn.Module, torch.Tensor] = {}
        for module in model.modules():
            if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                continue
            if module.bias is not None:
                self._biases[module] = module.bias.data
            if isinstance(module, bnb.nn.Linear4bit) and _would_be_packed(module):
                module.support_avx512bf16_for_cpu = False
                state = module.weight.quant_state
                if state.shape[0] % _PACKED_ROWS or state.shape[1] % state.blocksize:
                    continue  # bitsandbytes would try, and fail
                if state.nested or not torch.equal(state.absmax.bfloat16().float(), state.absmax):
                    # Packing puts other tensors in the place of these; it doesn't write to them.
                    self._states[module] = copy.copy(state)
                module.register_forward_pre_hook(self._before_pass)

    def _before_pass(self, module: nn.Module, inputs: Any) -> None:
        is_packed = module in self._packed
        if is_packed is not torch.is_grad_enabled():
            return  # nearly always
        assert isinstance(module, bnb.nn.Linear4bit)
        if is_packed:
            self.unpack(module)
        elif not module.training:
            # Into a state of its own: whoever still has to go back through an earlier pass needs that one.
            state = copy.copy(module.weight.quant_state)
            _put(module, *bnb.functional._convert_weight_packed_for_cpu(module.weight.data, state))
            self._packed.add(module)

    def unpack(self, module: bnb.nn.Linear4bit) -> None:
        """Puts a packed weight and its statistics back as they were before the module's first pass, to the bit.

        On the thread that computes.
        """
        snapshot = self.snapshot(module)
        _put(module, self.held(snapshot)["weight"].read(), self._state_before(snapshot))
        self._packed.discard(module)

    def _state_before(self, snapshot: Snapshot) -> Any:
        """The statistics of a packed weight before it was."""
        if snapshot.kept is not None:
            return copy.copy(snapshot.kept)
        state = copy.copy(snapshot.state)
        state.absmax = _widened(state.absmax.T)
        state.dtype, state.packing_format_for_cpu = state.original_dtype, False
        return state

    def snapshot(self, module: nn.Module) -> Snapshot:
        """To be taken on the thread that computes, or when nothing does. Quick."""
        tensors = {name: tensor.detach() for name, tensor in own_tensors(module)}
        if module in self._biases:
            tensors["bias"] = self._biases[module]
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(getattr(module.weight, "quant_state", None))
            return Snapshot(tensors=tensors, state=state, kept=self._states.get(module))
        if isinstance(module, bnb.nn.Linear8bitLt) and not module.state.has_fp16_weights:
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            return Snapshot(tensors=tensors, scales=scales)
        return Snapshot(tensors=tensors)

    def held(self, snapshot: Snapshot) -> dict[str, HeldTensor]:
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
        if snapshot.kept is not None:
            return found | {f"weight.{name}": HeldTensor.of(value) for name, value in _statistics(snapshot.kept)}
        rounded, state = state.absmax, copy.copy(state)
        state.absmax, state.dtype = torch.empty(0, device="meta"), state.original_dtype
        found |= {f"weight.{name}": HeldTensor.of(value) for name, value in _statistics(state)}
        found["weight.absmax"] = HeldTensor(
            dtype=torch.float32, shape=(rounded.numel(),), read=lambda: _widened(rounded.T)
        )
        return found

    def dequantized(self, snapshot: Snapshot) -> HeldTensor:
        """A 4-bit weight in the dtype that it was quantized from."""
        state = snapshot.state
        packed = getattr(state, "packing_format_for_cpu", False)
        dtype = state.original_dtype if packed else state.dtype

        def read() -> torch.Tensor:
            whole = self._state_before(snapshot) if packed else copy.copy(state)
            weight: torch.Tensor = bnb.functional.dequantize_4bit(self.held(snapshot)["weight"].read(), whole)
            return weight

        return HeldTensor(dtype=dtype, shape=tuple(state.shape), read=read)


def _would_be_packed(module: bnb.nn.Linear4bit) -> bool:
    return (
        getattr(module, "support_avx512bf16_for_cpu", False)
        and module.weight.device.type == "cpu"
        and getattr(module.weight, "quant_state", None) is not None
    )


def _put(module: bnb.nn.Linear4bit, weight: torch.Tensor, state: Any) -> None:
    module.weight.data = weight
    module.weight.quant_state = module.quant_state = state


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
