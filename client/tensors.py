"""Token ids, masks and logits between Python's forms and the wire's.

Lists need neither torch nor numpy; tensors and arrays are recognized without importing what they come from.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any

from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import MAX_REQUEST_BYTES, Assembly

if TYPE_CHECKING:
    import torch

# Ids and mask of a request travel in one message; this much of it is left for everything else.
_REQUEST_ROOM_BYTES = 64 << 10


def integers(value: Any, name: str) -> Tensor:
    """`value` ([batch, length], a tensor, an array or nested lists of integers or booleans) as an int64 Tensor.

    Raises InvalidRequestError for another shape or kind of numbers.
    """
    if isinstance(value, (list, tuple)):
        return _from_lists(value, name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if not value.is_floating_point() else value
        if not hasattr(value, "__array_interface__"):
            raise InvalidRequestError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}, not an integer one")
    if not hasattr(value, "__array__"):
        raise InvalidRequestError(f"{name} is a {type(value).__name__}: a tensor, an array or lists of ids are needed")
    import numpy as np

    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iub":
        raise InvalidRequestError(f"{name} has dtype {numbers.dtype}, not an integer one")
    if numbers.ndim != 2:
        raise InvalidRequestError(f"{name} has shape {list(numbers.shape)}: [batch, length] is needed")
    return Tensor(shape=numbers.shape, dtype="int64", data=np.ascontiguousarray(numbers, dtype="<i8").tobytes())


def mask(value: Any, name: str) -> Tensor:
    """An attention mask, as `integers` takes it, or of floats, as a bool Tensor: true where it is not zero."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
        value = value != 0
    tensor = integers(value, name)
    tensor.data = bytes(map(bool, array("q", tensor.data)))
    tensor.dtype = "bool"
    return tensor


def check_request_size(*tensors: Tensor | None) -> None:
    """Raises InvalidRequestError when `tensors` together don't fit one message."""
    size = sum(len(tensor.data) for tensor in tensors if tensor is not None)
    limit = MAX_REQUEST_BYTES - _REQUEST_ROOM_BYTES
    if size > limit:
        raise InvalidRequestError(
            f"ids and mask of {size:,} bytes are over the limit of {limit:,} for one request: send fewer rows at once"
        )


def to_torch(assembly: Assembly) -> torch.Tensor:
    """The complete tensor, on CPU, in its own dtype, bit for bit."""
    import torch

    dtype = getattr(torch, assembly.dtype)
    if assembly.expected_bytes == 0:
        return torch.empty(assembly.shape, dtype=dtype)
    data = assembly.data
    # frombuffer wants memory that may be written to.
    return torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=dtype).view(assembly.shape)


def ids_to_torch(tensor: Tensor) -> torch.Tensor:
    """The LongTensor that `integers` was given."""
    return to_torch(Assembly(tensor))


def _from_lists(rows: list[Any] | tuple[Any, ...], name: str) -> Tensor:
    if not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        raise InvalidRequestError(f"{name} is no list of rows: [batch, length] is needed, e.g. [[1, 2, 3]]")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InvalidRequestError(f"{name} has rows of {sorted(lengths)} ids: pad them to one length")
    try:
        numbers = array("q", [number for row in rows for number in row])
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{name} holds something other than 64-bit integers: {error}") from None
    if sys.byteorder == "big":
        numbers.byteswap()
    return Tensor(shape=[len(rows), lengths.pop()], dtype="int64", data=numbers.tobytes())
