"""bitsandbytes' 4-bit and 8-bit quantization of weights on the CPU: the same bits, several times sooner.

bitsandbytes 0.50 has no CPU kernel for these operators. Its generic ones make up to ten passes over float32 temporaries
of the tensor's size, and for 4 bits find each value's code with a binary search whose branches no CPU predicts. Here a
tile stays in the cache for all of its passes, and a value's code is a count: 15 vectorised comparisons.

Exact, not close: every float operation is bitsandbytes' own, on the same float32 values. Only its clamp to [-1, 1] is
left out, which cannot move a value across a bound, for all of them lie within. What is left to the generic kernels:
4 bits' last, partial block (they divide there, where whole blocks are multiplied by the reciprocal), 8 bits' outliers,
weights that are not finite, gradients, and whatever they raise on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

try:
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
except ImportError:  # another version of bitsandbytes: its bounds are not to be guessed
    _get_4bit_quantize_bounds = None

# Values per torch call. Torch stays in the calling thread below 32,768 of them; from there on, each thread that calls
# it gets an OpenMP team of its own, which spins.
_SERIAL = 32767
# Torch calls per tile. A tile's 2.3 MiB of buffers are more than many an L2 cache holds, but with smaller tiles threads
# spend their time on handing each other Python's lock.
_PARTS = 12
# An estimate from two cores: the lock is held for about a seventh of a tile's time, so that more threads would wait.
_MOST_THREADS = 8
# Fewer values than this in 8 bits are taken for activations, which come between matrix products: the products' OpenMP
# team still spins then, and is sooner than threads that it keeps from the cores.
_LEAST_INT8 = 2**20

_KINDS = ("nf4", "fp4")
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_installing = threading.Lock()


def quantize_4bit(
    A: torch.Tensor,  # noqa: N803 (the operator's name for it)
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`bitsandbytes::quantize_4bit` for CPU tensors: (two codes a byte, as a column of `quant_storage`; float32 absmax
    per block). Raises what bitsandbytes' kernel raises.

    Takes up to torch.get_num_threads() threads for the time of the call, and 3 MiB for each beside the result.
    """
    whole = A.numel() // blocksize * blocksize if blocksize in _BLOCKSIZES else 0
    if not whole or quant_type not in _KINDS or not _plain(A):
        return _generic("quantize_4bit", A, blocksize, quant_type, quant_storage)
    flat = A.detach().reshape(-1)
    packed = flat.new_empty((A.numel() + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(-(A.numel() // -blocksize), dtype=torch.float32)
    # numpy's views: torch forbids other threads to write to a tensor that was made in inference mode.
    packed_bytes, maxima = packed.numpy(), absmax.numpy()
    tile = _SERIAL // blocksize * blocksize * _PARTS

    def worker() -> Callable[[int], None]:
        scaled, code, within = np.empty(tile, np.float32), np.empty(tile, np.uint8), np.empty(tile, np.bool_)

        def work(start: int) -> None:
            end = min(start + tile, whole)
            size = end - start
            largest = maxima[start // blocksize : end // blocksize]
            _scale(flat[start:end], blocksize, 1.0, 1e-38, into=scaled[:size], largest=largest)
            _pack(scaled[:size], quant_type, code[:size], within[:size], into=packed_bytes[start // 2 : end // 2])

        return work

    _in_threads(range(0, whole, tile), worker)
    if not np.isfinite(maxima[: whole // blocksize]).all():
        return _generic("quantize_4bit", A, blocksize, quant_type, quant_storage)
    if whole < A.numel():
        last, last_absmax = _generic("quantize_4bit", flat[whole:], blocksize, quant_type, torch.uint8)
        packed[whole // 2 :] = last.squeeze(1)
        absmax[-1:] = last_absmax
    return packed.view(quant_storage).unsqueeze(1), absmax


def int8_vectorwise_quant(
    A: torch.Tensor,  # noqa: N803 (the operator's name for it)
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`bitsandbytes::int8_vectorwise_quant` for CPU tensors: (int8 of A's shape; float32 absmax of each row; None).

    Memory and threads as for quantize_4bit. It is bitsandbytes' kernel for less than a million values, with a
    threshold, for rows of 32,768 values or more, and for rows of zeros, whose codes are casts of NaN.
    """
    width = A.shape[-1] if A.dim() == 2 else 0
    few = A.numel() < max(_LEAST_INT8, 1)
    if few or threshold > 0 or not 0 < width <= _SERIAL or not A.is_contiguous() or not _plain(A):
        return _generic("int8_vectorwise_quant", A, threshold)
    flat = A.detach().view(-1)
    codes, absmax = flat.new_empty(A.shape, dtype=torch.int8), flat.new_empty(len(A), dtype=torch.float32)
    code_bytes, maxima = codes.view(-1).numpy(), absmax.numpy()
    tile = _SERIAL // width * width * _PARTS

    def worker() -> Callable[[int], None]:
        buffer = np.empty(tile, np.float32)

        def work(start: int) -> None:
            end = min(start + tile, len(flat))
            scaled = buffer[: end - start]
            _scale(flat[start:end], width, 127.0, 0.0, into=scaled, largest=maxima[start // width : end // width])
            np.rint(scaled, out=scaled)
            np.copyto(code_bytes[start:end], scaled, casting="unsafe")

        return work

    _in_threads(range(0, len(flat), tile), worker)
    if not (torch.isfinite(absmax) & torch.isfinite(127.0 / absmax)).all():
        return _generic("int8_vectorwise_quant", A, threshold)
    return codes, absmax, None


def install() -> None:
    """Makes these functions bitsandbytes' kernels for CPU tensors in this process; once, however often it is called.

    Leaves alone an operator that has a CPU kernel, and one whose results in this version of bitsandbytes differ.
    """
    with _installing:
        for kernel, agrees in (quantize_4bit, _agrees_4bit), (int8_vectorwise_quant, _agrees_int8):
            if not _operator(kernel.__name__).has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU) and agrees():
                torch.library.register_kernel(f"bitsandbytes::{kernel.__name__}", "cpu", kernel)


def _plain(tensor: torch.Tensor) -> bool:
    tracked = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.dtype in _DTYPES and tensor.device.type == "cpu" and not tracked


def _in_threads(starts: range, worker: Callable[[], Callable[[int], None]]) -> None:
    """Calls what `worker` returns, once called itself in each thread, with each of `starts`. No thread is left."""
    threads = min(torch.get_num_threads(), _MOST_THREADS, len(starts))

    def share(first: int) -> None:
        work = worker()
        with np.errstate(all="ignore"):
            for start in starts[first::threads]:
                work(start)

    if threads == 1:
        share(0)
        return
    with ThreadPoolExecutor(threads, "quantize") as pool:
        list(pool.map(share, range(threads)))


def _scale(
    values: torch.Tensor,
    block: int,
    highest: float,
    least: float,
    *,
    into: NDArray[np.float32],
    largest: NDArray[np.float32],
) -> None:
    """Each block's largest magnitude, and `values` in float32 times `highest` over it; `least` stands in below it."""
    rows = _SERIAL // block
    maxima, parts = torch.from_numpy(largest), torch.from_numpy(into).view(-1, block).split(rows)
    for part, source, peak in zip(parts, values.view(-1, block).split(rows), maxima.split(rows), strict=True):
        part.copy_(source)
        torch.amax(part.abs(), dim=-1, out=peak)
    # Written as bitsandbytes writes it: torch takes `highest` times the reciprocal, which is not always the quotient.
    scales = highest / maxima.clamp(min=least).view(-1, 1)
    for part, scale in zip(parts, scales.split(rows), strict=True):
        part.mul_(scale)


def _pack(
    scaled: NDArray[np.float32],
    quant_type: str,
    code: NDArray[np.uint8],
    within: NDArray[np.bool_],
    *,
    into: NDArray[np.uint8],
) -> None:
    """The codes of `scaled`, two in a byte. `code` and `within` are scratch, a byte for each value."""
    bounds, codes = _bounds_and_codes(quant_type)
    steps = within.view(np.uint8)
    code.fill(codes[-1])
    # From the highest value's code one step down for each bound that a value does not exceed, modulo 256. nf4's codes
    # are in the order of their values, so that each step is 1; fp4's are not.
    for bound, (below, above) in zip(bounds, pairwise(codes), strict=True):
        np.less_equal(scaled, bound, out=within)
        if above - below != 1:
            np.multiply(steps, np.uint8((above - below) % 256), out=steps)
        np.subtract(code, steps, out=code)
    # A pair's first code goes into the high half. Pairs as 16-bit numbers: loops over every other byte are slow.
    pairs, seconds = code.view("<u2"), within.view("<u2")
    np.right_shift(pairs, 8, out=seconds)
    np.left_shift(pairs, 4, out=pairs)
    np.bitwise_or(pairs, seconds, out=pairs)
    np.copyto(into, pairs, casting="unsafe")


@cache
def _bounds_and_codes(quant_type: str) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """The 15 bounds between bitsandbytes' 16 values, ascending, and the values' codes in the same order."""
    bounds, order = _get_4bit_quantize_bounds(quant_type, torch.device("cpu"))
    return bounds.numpy(), tuple(order.tolist())


def _operator(name: str) -> Any:
    return getattr(torch.ops.bitsandbytes, name).default


def _generic(name: str, *arguments: Any) -> Any:
    """bitsandbytes' generic kernel: what the dispatcher holds for tensors of no device, whatever is installed."""
    nowhere = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    return _operator(name).redispatch(nowhere, *arguments)


def _agrees_4bit() -> bool:
    """Whether this version of bitsandbytes quantizes to 4 bits as 0.50 does."""
    if _get_4bit_quantize_bounds is None:
        return False
    for quant_type in _KINDS:
        bounds, codes = _bounds_and_codes(quant_type)
        if sorted(codes) != list(range(16)) or not all(-1 < bound < 1 for bound in bounds):
            return False
        # A block of largest value 1 with each bound and its neighbours; then other blocks, the last a partial one.
        near = [np.nextafter(bounds, np.float32(side)) for side in (-1, 1)]
        probe = np.concatenate([[1], bounds, *near, np.linspace(-3, 3, 999)]).astype(np.float32)
        if not _same("quantize_4bit", quantize_4bit, probe, 64, quant_type, torch.uint8):
            return False
    return True


def _agrees_int8() -> bool:
    """Whether this version of bitsandbytes quantizes to 8 bits as 0.50 does."""
    probe = np.resize(np.linspace(-3, 2, 9999, dtype=np.float32), (1024, _LEAST_INT8 // 1024))
    return _same("int8_vectorwise_quant", int8_vectorwise_quant, probe)


def _same(name: str, kernel: Callable[..., Any], probe: NDArray[np.float32], *arguments: Any) -> bool:
    for dtype in _DTYPES:
        tensor = torch.from_numpy(probe).to(dtype)
        ours, theirs = kernel(tensor, *arguments), _generic(name, tensor, *arguments)
        if not all(map(torch.equal, ours[:2], theirs[:2])):
            return False
    return True
