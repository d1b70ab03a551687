"""The CPU kernels against bitsandbytes' generic ones, bit for bit: theirs is the oracle."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.worker import quantize_cpu
from shardlift.worker.quantize_cpu import int8_vectorwise_quant, quantize_4bit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SPECIAL = (0.0, -0.0, 1e-38, -1e-38, 1e-45, 6e-8, 1.2e-38, 65504.0, -3e38, float("inf"), float("-inf"), float("nan"))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
            continue
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        assert mine.requires_grad == other.requires_grad
        if mine.numel():
            bits = [side.detach().contiguous().view(-1).view(torch.uint8) for side in (mine, other)]
            assert torch.equal(*bits)


def check_4bit(
    tensor: torch.Tensor, blocksize: int = 64, kind: str = "nf4", storage: torch.dtype = torch.uint8
) -> None:
    theirs = quantize_cpu._generic("quantize_4bit", tensor, blocksize, kind, storage)
    assert_same(quantize_4bit(tensor, blocksize, kind, storage), theirs)


def check_int8(tensor: torch.Tensor, threshold: float = 0.0) -> None:
    theirs = quantize_cpu._generic("int8_vectorwise_quant", tensor.clone(), threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_cpu, "_LEAST_INT8", 0)
        assert_same(int8_vectorwise_quant(tensor.clone(), threshold), theirs)


def random(numel: int, dtype: torch.dtype, seed: int = 0, exponent: int = 0) -> torch.Tensor:
    return (torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).to(dtype)


@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    blocksize=st.sampled_from((*BLOCKSIZES, 48)),
    blocks=st.integers(0, 5),
    rest=st.integers(0, 40),
    exponent=st.integers(-44, 38),
    seed=st.integers(0, 2**32 - 1),
    special=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(SPECIAL)), max_size=4),
    zero_block=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_4bit_is_the_same_for_any_tensor(
    dtype: torch.dtype,
    kind: str,
    blocksize: int,
    blocks: int,
    rest: int,
    exponent: int,
    seed: int,
    special: list[tuple[float, float]],
    zero_block: bool,
) -> None:
    tensor = random(blocks * blocksize + rest, dtype, seed, exponent)
    for place, value in special if len(tensor) else ():
        tensor[int(place * len(tensor))] = value
    if zero_block:
        tensor[:blocksize] = 0
    check_4bit(tensor, blocksize, kind)


def assert_no_thread_is_left() -> None:
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("quantize")] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_4bit_is_the_same_over_many_tiles(threads: int, kind: str, dtype: torch.dtype, blocksize: int) -> None:
    tiles = quantize_cpu._SERIAL // blocksize * blocksize * quantize_cpu._PARTS
    check_4bit(random(2 * tiles + 5 * blocksize + 7, dtype), blocksize, kind)
    assert_no_thread_is_left()


@pytest.mark.parametrize("kind", KINDS)
def test_4bit_is_the_same_within_1000_ulps_of_each_bound(kind: str) -> None:
    bounds, _ = quantize_cpu._bounds_and_codes(kind)
    assert len(bounds) == 15
    steps = np.arange(-1000, 1001, dtype=np.int32)
    # Around 0 an ulp is a denormal; each sign counts from its own zero.
    near = [(bound.view(np.int32) + steps).view(np.float32) for bound in bounds if bound]
    near += [np.arange(0, 1001, dtype=np.int32).view(np.float32) * sign for sign in (1, -1)]
    values = np.concatenate(near)
    values = np.concatenate([values, np.zeros(-len(values) % 63, np.float32)]).reshape(-1, 63)
    for largest in (1, -1, 0.37, 3e-3, 7e4):  # 1 leaves the values as they are
        blocks = np.column_stack([np.full(len(values), largest), values * np.float32(abs(largest))])
        check_4bit(torch.from_numpy(blocks.astype(np.float32)), 64, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_4bit_is_the_same_for_every_16_bit_value(kind: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for largest in (1.0, 0.71, 3.3e-3, 1e-7, 6e4):
        limit = torch.tensor(largest).to(dtype)
        below = every[every.abs() <= limit]  # leaves NaN out
        below = torch.cat([below, below.new_zeros(-len(below) % 31)]).view(-1, 31)
        check_4bit(torch.cat([limit.expand(len(below), 1), below], dim=1), 32, kind)


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_4bit_takes_any_storage(storage: torch.dtype) -> None:
    check_4bit(random(4096, torch.bfloat16).view(64, 64), storage=storage)


def test_4bit_takes_views_and_modes() -> None:
    matrix = random(300 * 128, torch.bfloat16).view(300, 128)
    check_4bit(matrix.t())
    check_4bit(matrix[:, ::3])
    check_4bit(matrix[3:, 1:])
    check_4bit(torch.nn.Parameter(matrix.float()))
    with torch.no_grad():
        check_4bit(torch.nn.Parameter(matrix.float()))
    with torch.device("meta"):  # transformers builds models under it
        check_4bit(matrix)
    with torch.inference_mode():
        check_4bit(random(900_001, torch.float32))


@pytest.mark.parametrize(
    ("numel", "blocksize", "kind", "storage", "error"),
    [
        (64, 64, "nf5", torch.uint8, NotImplementedError),
        (64, 0, "nf4", torch.uint8, ZeroDivisionError),
        (2 * 65, 64, "nf4", torch.float32, RuntimeError),  # 65 bytes are not a number of float32
    ],
)
def test_4bit_raises_what_bitsandbytes_raises(
    numel: int, blocksize: int, kind: str, storage: torch.dtype, error: type[Exception]
) -> None:
    arguments = (torch.ones(numel), blocksize, kind, storage)
    with pytest.raises(error) as theirs:
        quantize_cpu._generic("quantize_4bit", *arguments)
    with pytest.raises(error) as ours:
        quantize_4bit(*arguments)
    assert str(ours.value) == str(theirs.value)


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 9),
    width=st.integers(1, 300),
    exponent=st.integers(-44, 38),
    seed=st.integers(0, 2**32 - 1),
    special=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(SPECIAL)), max_size=2),
    threshold=st.sampled_from([0.0, 0.0, 2.0]),
)
@settings(deadline=None, max_examples=200)
def test_int8_is_the_same_for_any_matrix(
    dtype: torch.dtype,
    rows: int,
    width: int,
    exponent: int,
    seed: int,
    special: list[tuple[float, float]],
    threshold: float,
) -> None:
    flat = random(rows * width, dtype, seed, exponent)
    for place, value in special if len(flat) else ():
        flat[int(place * len(flat))] = value
    check_int8(flat.view(rows, width), threshold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2000, 500), (70, 11008), (13, 32767), (3, 32768), (2, 99_999)])
def test_int8_is_the_same_over_many_tiles(threads: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = random(shape[0] * shape[1], dtype).view(shape)
    check_int8(tensor)
    check_int8(tensor.t())
    tensor[1] = 0
    check_int8(tensor)
    assert_no_thread_is_left()


def test_int8_rounds_halves_to_even() -> None:
    check_int8((torch.arange(-254, 255) / 2).view(1, -1))


INSTALLED = """
import os, threading, time, warnings
import numpy as np
import torch, bitsandbytes as bnb
from shardlift.worker import quantize_cpu
warnings.simplefilter("error")
torch.set_num_threads(4)

def four(tensor, kind, nested):
    packed, state = bnb.functional.quantize_4bit(tensor, quant_type=kind, compress_statistics=nested)
    parts = {name: part for name, part in state.as_dict().items() if isinstance(part, torch.Tensor)}
    return [packed, *parts.values(), bnb.functional.dequantize_4bit(packed, state)]

def results():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensor = torch.linspace(-3, 2, 2_000_000).sin().to(dtype).view(2000, 1000)
        for kind in ("nf4", "fp4"):
            for nested in (True, False):
                yield from four(tensor, kind, nested)
        yield from bnb.functional.int8_vectorwise_quant(tensor)[:2]
        yield from bnb.functional.int8_vectorwise_quant(tensor, threshold=0.5)

# Before torch has made its team of threads here: the kernels are to make none. One tile is computed in this thread.
quantize_cpu._LEAST_INT8 = 2**18
tasks = len(os.listdir("/proc/self/task"))
for rows in (300, 3000):
    tensor = torch.from_numpy(np.ones((rows, 1000), "float32"))
    quantize_cpu.quantize_4bit(tensor, 64, "nf4", torch.uint8)
    quantize_cpu.int8_vectorwise_quant(tensor)
until = time.monotonic() + 10  # the system lists a thread for a moment after it was joined
while len(os.listdir("/proc/self/task")) > tasks:
    assert time.monotonic() < until, "a thread is left"

before = list(results())
quantize_cpu.install()
quantize_cpu.install()
for name in ("quantize_4bit", "int8_vectorwise_quant"):
    assert quantize_cpu._operator(name).has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
calls = []
real = quantize_cpu._in_threads
quantize_cpu._in_threads = lambda *a: (calls.append(1), real(*a))
after = list(results())
assert len(calls) == 3 * 5, calls
assert len(before) == len(after) > 50
assert all(map(torch.equal, before, after))
assert threading.active_count() == 1
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_installed_the_kernels_serve_bitsandbytes() -> None:
    done = subprocess.run([sys.executable, "-c", INSTALLED], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_what_computes_otherwise_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize_cpu._agrees_4bit()
    assert quantize_cpu._agrees_int8()
    generic = quantize_cpu._generic

    def otherwise(*arguments: Any) -> Any:
        first, *rest = generic(*arguments)
        return (first + 1, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_cpu, "_generic", otherwise)
        assert not quantize_cpu._agrees_4bit()
        assert not quantize_cpu._agrees_int8()
    monkeypatch.setattr(quantize_cpu, "_get_4bit_quantize_bounds", None)
    assert not quantize_cpu._agrees_4bit()
