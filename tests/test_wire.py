"""Tensors on the wire: the bits that come out are those that went in, and a hostile header costs nothing."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.proto.v1.tensor_pb2 import Tensor
from shardlift.proto.v1.wire import (
    FRAME_BYTES,
    ITEM_BYTES,
    MAX_DIMENSIONS,
    MAX_MESSAGE_BYTES,
    MAX_TENSOR_BYTES,
    Assembly,
    tensor_bytes,
)
from shardlift.worker.tensors import check_ids, dtype_by_name, from_bytes, from_message, to_frames, to_message

HUGE = 2**63 - 1


def carry(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`tensor` through serialized messages, and how many there were."""
    head, rest = to_frames(tensor)
    assembly = Assembly(Tensor.FromString(head.SerializeToString()))
    frames = list(rest)
    for frame in frames:
        assert not assembly.complete
        assembly.add(frame)
    assert assembly.complete
    return from_bytes(assembly.shape, assembly.dtype, assembly.data), 1 + len(frames)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_bit_pattern_survives(dtype: str, data: st.DataObject) -> None:
    """NaNs with payloads, subnormals and negative zeros among them."""
    item = ITEM_BYTES[dtype]
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4))
    size = item * torch.Size(shape).numel()
    raw = data.draw(st.binary(min_size=size, max_size=size))
    if dtype == "bool":
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).reshape(shape)
    out, _ = carry(tensor)
    assert (out.dtype, out.shape, bits(out)) == (tensor.dtype, tensor.shape, raw)


def test_bfloat16_nan_payloads() -> None:
    patterns = torch.tensor([0x7FC0, 0x7F81, 0xFFFF, 0x8000, 0x0001, 0x7F80], dtype=torch.int32).to(torch.uint16)
    out, _ = carry(patterns.view(torch.bfloat16))
    assert torch.equal(out.view(torch.uint16).int(), patterns.int())


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 1, 1, 1, 1, 1, 1)])
def test_small_shapes(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=getattr(torch, dtype))
    out, frames = carry(tensor)
    assert frames == 1
    assert (out.dtype, out.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(out, tensor)


@pytest.mark.parametrize("extra", [-1, 0, 1, FRAME_BYTES])
def test_large_tensors_travel_in_frames(extra: int) -> None:
    tensor = torch.arange(2 * FRAME_BYTES + extra, dtype=torch.int64).to(torch.uint8)
    out, frames = carry(tensor)
    assert torch.equal(out, tensor)
    # The first one says only what is to come.
    assert frames == 1 + -(-len(tensor) // FRAME_BYTES)


def test_a_view_travels_as_what_it_shows() -> None:
    tensor = torch.arange(24).reshape(4, 6)[1:3, ::2].T
    out, _ = carry(tensor)
    assert torch.equal(out, tensor)


def test_a_frame_with_its_surroundings_fits_one_message() -> None:
    head, _ = to_frames(torch.zeros(FRAME_BYTES, dtype=torch.uint8))
    assert FRAME_BYTES <= head.ByteSize() < MAX_MESSAGE_BYTES


def test_what_arrives_may_be_written_to() -> None:
    out, _ = carry(torch.zeros(4))
    out.add_(1)
    assert out.tolist() == [1.0] * 4


# ---- hostile headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "problem"),
    [
        ([-1], "float32", "negative"),
        ([2, -(2**63)], "float32", "negative"),
        ([-1, -1], "float32", "negative"),
        ([HUGE], "float64", "over the limit"),
        ([HUGE] * MAX_DIMENSIONS, "float64", "over the limit"),
        ([2**32, 2**32], "uint8", "over the limit"),
        ([HUGE, HUGE, 0], "uint8", "over the limit"),
        ([MAX_TENSOR_BYTES // 4 + 1], "float32", "over the limit"),
        ([1] * (MAX_DIMENSIONS + 1), "float32", "9 dimensions"),
        ([1], "", "dtype ''"),
        ([1], "float8_e4m3fn", "dtype"),
        ([1], "Float32", "dtype"),
        ([1], "save", "dtype 'save'"),
        ([1], "complex64", "dtype"),
    ],
)
def test_a_hostile_header_is_refused_before_anything_is_allocated(shape: list[int], dtype: str, problem: str) -> None:
    head = Tensor(shape=shape, dtype=dtype, data=b"1234")
    tracemalloc.start()
    try:
        for read in (Assembly, from_message, tensor_bytes):
            with pytest.raises(InvalidRequestError, match=problem) as refused:
                read(head)
            assert "\n" not in str(refused.value)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_memory_is_taken_as_bytes_arrive() -> None:
    tracemalloc.start()
    try:
        assembly = Assembly(Tensor(shape=[MAX_TENSOR_BYTES], dtype="uint8", data=b"x"))
        assembly.add(b"y")
        assert not assembly.complete
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_more_bytes_than_the_shape_allows() -> None:
    with pytest.raises(InvalidRequestError, match="has 4 bytes, but at least 5 were sent"):
        Assembly(Tensor(shape=[1], dtype="float32", data=b"12345"))
    with pytest.raises(InvalidRequestError, match="has 0 bytes"):
        Assembly(Tensor(shape=[0], dtype="float32", data=b"1"))
    assembly = Assembly(Tensor(shape=[2], dtype="float32", data=b"1234"))
    with pytest.raises(InvalidRequestError, match="has 8 bytes, but at least 9 were sent"):
        assembly.add(b"12345")


def test_missing_bytes() -> None:
    with pytest.raises(InvalidRequestError, match="needs 8 bytes, but 4 were sent"):
        from_message(Tensor(shape=[2], dtype="float32", data=b"1234"))


def test_a_limit_of_ones_own() -> None:
    head = Tensor(shape=[3], dtype="int64")
    assert tensor_bytes(head, limit_bytes=24) == 24
    with pytest.raises(InvalidRequestError, match="over the limit of 23"):
        tensor_bytes(head, limit_bytes=23)


def test_no_dtype() -> None:
    for name in ("", "nothing", "save", "__class__"):
        with pytest.raises(InvalidRequestError, match="is not a torch dtype"):
            dtype_by_name(name)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 0, dtype=torch.int64), torch.tensor(3)],
)
def test_ids_are_integers_of_batch_by_length(tensor: torch.Tensor) -> None:
    with pytest.raises(InvalidRequestError, match="input_ids must be a non-empty integer tensor"):
        check_ids("input_ids", from_message(to_message(tensor)))


def test_any_integer_dtype_makes_ids() -> None:
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.int64):
        assert check_ids("mask", torch.ones(2, 3, dtype=dtype)).dtype is torch.int64
