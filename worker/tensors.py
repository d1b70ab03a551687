"""torch tensors to and from wire messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import FRAME_BYTES, ITEM_BYTES, Assembly, first_frame, later_frames


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_by_name(name: str) -> torch.dtype:
    """Raises InvalidRequestError for what is no torch dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidRequestError(f"{name!r} is not a torch dtype; e.g. bfloat16, float16, float32")
    return dtype


def to_frames(tensor: torch.Tensor) -> tuple[Tensor, Iterator[memoryview]]:
    """`tensor` as the message that opens it and the frames that follow, which are views of it on the host.

    The bits travel unchanged.
    """
    host = tensor.detach().contiguous().cpu()
    data = host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else memoryview(b"")
    return first_frame(list(host.shape), dtype_name(host.dtype), data), later_frames(data)


def to_message(tensor: torch.Tensor) -> Tensor:
    """A small tensor as one message. Raises InvalidRequestError for one over FRAME_BYTES."""
    size = tensor.numel() * tensor.element_size()
    if size > FRAME_BYTES:
        raise InvalidRequestError(
            f"a tensor of shape {list(tensor.shape)} takes {size:,} bytes; at most {FRAME_BYTES:,} go into one message"
        )
    return to_frames(tensor)[0]


def ids_message(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids [rows, length] as one message, however many."""
    data = b"".join(token.to_bytes(8, "little", signed=True) for row in rows for token in row)
    return Tensor(shape=[len(rows), len(rows[0])], dtype="int64", data=data)


def from_bytes(shape: list[int], dtype: str, data: bytes | bytearray) -> torch.Tensor:
    """The tensor that `data` holds. Shares memory with a bytearray; copies bytes, which torch may not write to."""
    if not prod(shape):
        return torch.empty(shape, dtype=dtype_by_name(dtype))
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(buffer, dtype=dtype_by_name(dtype)).reshape(shape)


def from_message(message: Tensor) -> torch.Tensor:
    """The tensor of a message that holds all of it. Raises InvalidRequestError when bytes are missing."""
    assembly = Assembly(message)
    if not assembly.complete:
        raise InvalidRequestError(
            f"a tensor of shape {assembly.shape} and dtype {assembly.dtype} needs {assembly.expected_bytes} bytes, "
            f"but {len(message.data)} were sent"
        )
    return from_bytes(assembly.shape, assembly.dtype, assembly.data)


def check_ids(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as int64 [batch, length]. Raises InvalidRequestError for another rank or a dtype that isn't integral."""
    if tensor.ndim != 2 or tensor.is_floating_point() or not tensor.numel():
        raise InvalidRequestError(
            f"{name} must be a non-empty integer tensor [batch, length], not {dtype_name(tensor.dtype)} "
            f"{list(tensor.shape)}"
        )
    return tensor.long()


assert all(hasattr(torch, name) for name in ITEM_BYTES)
