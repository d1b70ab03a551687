"""Forward passes: one `Forward` call is a session, and its KV cache lives on the workers until the call ends."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.wire import Assembly
from .gateway import Gateway

_Requests = queue.SimpleQueue["inference_pb2.ForwardRequest | None"]


def once(gateway: Gateway, asked: inference_pb2.ForwardRequest) -> Assembly:
    """The logits of one pass that leaves nothing behind."""
    call = gateway.inference_stream("Forward", iter([asked]))
    try:
        assembly = _read(gateway, call)
        with gateway.errors():
            if next(call, None) is not None:
                raise InternalError("the gateway went on after the end of a forward pass")
        return assembly
    finally:
        call.cancel()


class RemoteCache:
    """Keys and values of a session, on the model's workers: what `past_key_values` is for a remote model.

    It grows with each pass that it is given to. Freed by `close()`, by the end of a `with` block, or when nothing
    refers to it any more. Not thread-safe across passes of one cache: they are taken one after another.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._length = 0
        self._lock = threading.Lock()
        requests: _Requests = queue.SimpleQueue()
        self._requests = requests
        self._call = gateway.inference_stream("Forward", _until_none(requests))
        self._finalizer = weakref.finalize(self, _end, requests, self._call)

    def __enter__(self) -> RemoteCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a RemoteCache belongs to an open call and can't be pickled or copied")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions it holds, padding included."""
        return self._length

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._finalizer()

    def step(self, asked: inference_pb2.ForwardRequest) -> Assembly:
        """The logits of one pass. Any failure ends the session."""
        with self._lock:
            if self.closed:
                raise InvalidRequestError("this cache is closed: start again from the whole prompt")
            try:
                self._requests.put(asked)
                assembly = _read(self._gateway, self._call)
            except BaseException:
                self.close()
                raise
            self._length += asked.input_ids.shape[1]
            return assembly


def _read(gateway: Gateway, call: Any) -> Assembly:
    assembly = Assembly(_receive(gateway, call, "logits").logits)
    while not assembly.complete:
        assembly.add(_receive(gateway, call, "more").more)
    return assembly


def _receive(gateway: Gateway, call: Any, part: str) -> inference_pb2.ForwardResponse:
    with gateway.errors():
        response: inference_pb2.ForwardResponse | None = next(call, None)
    if response is None or response.WhichOneof("part") != part:
        raise InternalError(f"the gateway ended a forward pass where {part!r} was due")
    return response


def _until_none(requests: _Requests) -> Iterator[inference_pb2.ForwardRequest]:
    while (asked := requests.get()) is not None:
        yield asked


def _end(requests: _Requests, call: Any) -> None:
    requests.put(None)
    call.cancel()
