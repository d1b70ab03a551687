"""Packed weights made into plain tensors, in torch, on whatever device their parts are.

Exact: integers less their zero points times scales are products that float32 holds (11 bits of a half-precision scale
by 8 or 9 of an integer), so the only rounding is the one to the model's dtype. In pieces, so that beside the parts and
the result no more than some tens of MB are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from ..proto.v1.errors import CorruptCheckpointError, UnsupportedModelError
from .compressed import decompress
from .packed import AWQ, COMPRESSED, FP8, GPTQ, MXFP4, Packing, fp8_block

_PIECE = 1 << 22  # values unpacked at a time
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of a word's outputs, first to last
# sign, two bits of exponent, one of mantissa
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Parts = Mapping[str, torch.Tensor]


def check_package(packing: Packing | None) -> None:
    """Raises UnsupportedModelError where unpacking needs a package that isn't here."""
    if packing is not None and packing.method == COMPRESSED and find_spec("compressed_tensors") is None:
        raise UnsupportedModelError(
            "the checkpoint is quantized with compressed-tensors, whose package unpacks it: "
            "pip install 'compressed-tensors>=0.15' on every node"
        )


def unpack(key: str, parts: Parts, shape: tuple[int, ...], packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    """The weight `key` of `shape` in `dtype`, from the parts that `packed.stored_tensors` named, by role.

    Raises CorruptCheckpointError for parts that no weight could have been packed to.
    """
    if packing.method == COMPRESSED:
        return decompress(key, parts, shape, packing, dtype)
    some = next(iter(parts.values()))
    weight = torch.empty(shape, dtype=dtype, device=some.device)
    if weight.numel():
        _UNPACK[packing.method](key, parts, packing, weight)
    return weight


def _gptq(key: str, parts: Parts, packing: Packing, weight: torch.Tensor) -> None:
    outputs, inputs = weight.shape
    qweight, scales = parts["qweight"], parts["scales"].float()
    groups = len(scales)
    bits = qweight.shape[0] * 32 // inputs
    zeros = (_columns(parts["qzeros"], bits) + packing.zero_offset).float()  # [groups, outputs]
    if "g_idx" in parts:
        group_of = parts["g_idx"].long()
        if not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
            raise CorruptCheckpointError(f"g_idx of {key} names group {int(group_of.max())}, of {groups} from 0")
    else:
        size = packing.group_size or inputs
        group_of = torch.arange(inputs, device=qweight.device) // size
    step = max(32, _PIECE // outputs // 32 * 32)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        packed = qweight[start * bits // 32 : end * bits // 32]
        group = group_of[start:end]
        # Packed along the inputs: a column's words are its values' bits, the lowest first.
        values = _columns(packed.t(), bits).t().float()
        values.sub_(zeros[group]).mul_(scales[group])
        weight[:, start:end] = values.t()


def _columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned integers of `bits` that lie in each row of int32 words, as a stream of bits, lowest first: int32
    [rows, columns * 32 / bits]."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return ((words[:, :, None] >> shifts) & mask).reshape(len(words), -1)
    # Three bits: a value may begin in one word and end in the next.
    first = torch.arange(0, words.shape[1] * 32, bits, device=words.device)
    word, shift = first // 32, first % 32
    unsigned = words.long() & 0xFFFFFFFF
    following = unsigned[:, (word + 1).clamp(max=words.shape[1] - 1)]
    return (((unsigned[:, word] | (following << 32)) >> shift) & mask).int()


def _awq(key: str, parts: Parts, packing: Packing, weight: torch.Tensor) -> None:
    outputs, inputs = weight.shape
    qweight, scales = parts["qweight"], parts["scales"].float()
    zeros = _awq_columns(parts["qzeros"]).float()
    size = inputs // len(scales)
    step = max(1, _PIECE // outputs)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        group = torch.arange(start, end, device=qweight.device) // size
        values = _awq_columns(qweight[start:end]).float()
        values.sub_(zeros[group]).mul_(scales[group])
        weight[:, start:end] = values.t()


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 15).reshape(len(words), -1)


def _fp8(key: str, parts: Parts, packing: Packing, weight: torch.Tensor) -> None:
    quantized, scales = parts["weight"], parts["scale"]
    rows, columns = weight.shape[-2:]
    high, wide = fp8_block(tuple(weight.shape), tuple(scales.shape), packing.block)
    scales = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
    flat = quantized.reshape(-1, rows, columns)
    into, scales = weight.view(-1, rows, columns), scales.reshape(len(flat), -(-rows // high), -(-columns // wide))
    step = max(1, _PIECE // columns // high) * high
    for matrix, grid, result in zip(flat, scales, into, strict=True):
        for start in range(0, rows, step):
            end = min(start + step, rows)
            of_rows = grid[start // high : -(-end // high)].repeat_interleave(high, 0)[: end - start]
            result[start:end] = matrix[start:end].float() * of_rows.repeat_interleave(wide, 1)[:, :columns]


def _mxfp4(key: str, parts: Parts, packing: Packing, weight: torch.Tensor) -> None:
    blocks, scales = parts["blocks"], parts["scales"]
    _, outputs, groups, half = blocks.shape
    values = torch.tensor(_E2M1, device=blocks.device)
    step = max(1, _PIECE // (groups * half * 2))
    for expert, exponents, result in zip(blocks, scales, weight, strict=True):
        for start in range(0, outputs, step):
            end = min(start + step, outputs)
            piece = expert[start:end]
            both = torch.stack([values[(piece & 15).int()], values[(piece >> 4).int()]], -1)
            result[:, start:end] = (both.flatten(2) * _powers(exponents[start:end])[:, :, None]).flatten(1).t()


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0: a byte b is 2 ** (b - 127), as float32, by its bits; the least one is none of float32's normal numbers."""
    return (exponents.int() << 23).clamp_(min=1 << 22).view(torch.float32)


_UNPACK = {AWQ: _awq, FP8: _fp8, GPTQ: _gptq, MXFP4: _mxfp4}
