"""Tensors on the wire: dtype names, and framing for tensors that exceed one message.

Knows nothing of torch or numpy, so that the client, which may lack both until a tensor is touched, shares it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from .errors import InvalidRequestError
from .tensor_pb2 import Tensor

# Bytes of tensor data in one message. gRPC copies each message whole, so larger frames cost memory and
# smaller ones calls; 1 MiB also stays clear of every default receive limit (4 MB).
FRAME_BYTES = 1 << 20
# Room for one frame with its surroundings: the limit for one message of an answer, and between stages.
MAX_MESSAGE_BYTES = 4 << 20
# … and of a request, whose ids and mask travel whole: as many tokens as `limits` lets one have, and some room.
MAX_REQUEST_BYTES = 40 << 20
# All headers of one call together. More are refused, by whichever end they reach.
MAX_METADATA_BYTES = 16 << 10
# Calls under way on one connection, where more wait for their turn; and on one server, where more are refused.
MAX_STREAMS = 512
MAX_CALLS = 2048
_HANDSHAKE_MS = 20_000
MAX_DIMENSIONS = 8
# A tensor larger than this is refused before anything is allocated for it.
MAX_TENSOR_BYTES = 4 << 30

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}

_METADATA_OPTIONS: list[tuple[str, int]] = [
    # The soft limit, above which gRPC refuses at random, and the hard one.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
]
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    *_METADATA_OPTIONS,
]


def _server_options(request_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", request_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        *_METADATA_OPTIONS,
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.so_reuseport", 0),
    ]


SERVER_OPTIONS = _server_options(MAX_REQUEST_BYTES)
# Of a server that nobody has to send much to.
HEALTH_SERVER_OPTIONS = _server_options(MAX_MESSAGE_BYTES)
# Towards stages and between them: a node that vanished without a word is noticed within seconds.
STAGE_CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    # What counts in newer versions of gRPC, where it is a minute by default.
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.http2.max_pings_without_data", 0),
]
# What such clients may do without being sent away for too many pings.
STAGE_SERVER_OPTIONS: list[tuple[str, int]] = [
    *SERVER_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def tensor_bytes(tensor: Tensor, limit_bytes: int = MAX_TENSOR_BYTES) -> int:
    """How many bytes `tensor` has in all, from its shape and dtype.

    Raises InvalidRequestError for an unknown dtype, a negative extent, too many dimensions or too many bytes.
    """
    if tensor.dtype not in ITEM_BYTES:
        raise InvalidRequestError(f"tensor dtype {tensor.dtype!r} is not one of {', '.join(sorted(ITEM_BYTES))}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(f"a tensor of {len(tensor.shape)} dimensions; at most {MAX_DIMENSIONS} are accepted")
    if any(extent < 0 for extent in tensor.shape):
        raise InvalidRequestError(f"tensor shape {list(tensor.shape)} has a negative extent")
    # An extent of 0 doesn't excuse the others: libraries multiply them all the same.
    size = prod(max(extent, 1) for extent in tensor.shape) * ITEM_BYTES[tensor.dtype]
    if size > limit_bytes:
        raise InvalidRequestError(
            f"a tensor of shape {list(tensor.shape)} has {size:,} bytes, over the limit of {limit_bytes:,}"
        )
    return 0 if 0 in tensor.shape else size


def first_frame(shape: list[int], dtype: str, data: memoryview) -> Tensor:
    """The Tensor message that opens `data`: its shape, and its bytes where they are few enough."""
    return Tensor(shape=shape, dtype=dtype, data=bytes(data) if len(data) <= FRAME_BYTES else b"")


def later_frames(data: memoryview) -> Iterator[memoryview]:
    """The bytes of `data` that `first_frame` left, frame by frame, not copied."""
    for start in range(0, len(data) if len(data) > FRAME_BYTES else 0, FRAME_BYTES):
        yield data[start : start + FRAME_BYTES]


class Assembly:
    """Puts the frames of one tensor together again.

    `data` is the whole tensor's bytes once `complete` is true. Raises InvalidRequestError for more bytes than
    the shape allows; memory is taken as bytes arrive, never on the word of a header.
    """

    def __init__(self, head: Tensor, limit_bytes: int = MAX_TENSOR_BYTES) -> None:
        self.shape = list(head.shape)
        self.dtype = head.dtype
        self.expected_bytes = tensor_bytes(head, limit_bytes)
        self._data: bytes | bytearray = head.data
        self._check()

    @property
    def complete(self) -> bool:
        return len(self._data) == self.expected_bytes

    @property
    def data(self) -> bytes | bytearray:
        assert self.complete
        return self._data

    def add(self, more: bytes | memoryview) -> None:
        if not isinstance(self._data, bytearray):
            self._data = bytearray(self._data)
        self._data += more
        self._check()

    def _check(self) -> None:
        if len(self._data) > self.expected_bytes:
            raise InvalidRequestError(
                f"a tensor of shape {self.shape} and dtype {self.dtype} has {self.expected_bytes} bytes, "
                f"but at least {len(self._data)} were sent"
            )
