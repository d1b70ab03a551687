"""One running `Session` call: its requests go one by one, each with its answer read to the end. Blocks."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterator
from typing import Any

from ..proto.v1 import inference_pb2, status
from ..proto.v1.errors import InternalError, InvalidRequestError, ShardliftError
from ..proto.v1.wire import Assembly
from .gateway import Gateway

_Requests = queue.SimpleQueue["inference_pb2.SessionRequest | None"]


class SessionCall:
    """The call is the session: what it holds on the workers is freed when it ends, by `close` or with this object.

    It begins with the first request.
    """

    def __init__(self, gateway: Gateway, model: str, idle_timeout_s: float | None = None) -> None:
        self._gateway = gateway
        self._model = model
        self._idle_timeout_s = idle_timeout_s or 0.0
        self._requests: _Requests = queue.SimpleQueue()
        self._call: Any = None
        self._was_refused = False
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def was_refused(self) -> bool:
        """Whether the last action was, before anything was computed: the session is what it was before it."""
        return self._was_refused

    def close(self) -> None:
        """Ends the session. Calling it again does nothing."""
        self._closed = True
        if self._finalizer is not None:
            self._finalizer()

    def send(self, asked: inference_pb2.SessionRequest) -> None:
        """Starts an action. What is never retried: a session that is lost is lost."""
        self._was_refused = False
        if self._call is None:
            asked.model, asked.idle_timeout_s = self._model, self._idle_timeout_s
            self._call = self._gateway.inference_stream("Session", _until_none(self._requests))
            self._finalizer = weakref.finalize(self, _end, self._requests, self._call)
            if self._closed:  # meanwhile, by another thread
                self._finalizer()
        self._requests.put(asked)

    def receive(self) -> inference_pb2.SessionResponse:
        """The next message of the action's answer. Raises what the action was refused with."""
        try:
            with self._gateway.errors():
                response: inference_pb2.SessionResponse | None = next(self._call, None)
        except ShardliftError:
            if self._closed:  # by another thread: gRPC's word for it is no defect
                raise InvalidRequestError("this session was closed in the middle of an answer") from None
            raise
        if response is None:
            raise InternalError("the gateway ended a session in the middle of an answer")
        if response.HasField("refused"):
            self._was_refused = True
            raise status.from_refusal(response.refused)
        return response

    def forward(self, asked: inference_pb2.SessionRequest) -> tuple[Assembly, inference_pb2.SessionState]:
        """The logits of a pass, and what the session then holds."""
        self.send(asked)
        assembly = Assembly(forward_part(self.receive(), "logits").logits)
        while not assembly.complete:
            assembly.add(forward_part(self.receive(), "more").more)
        return assembly, done(self.receive())


def forward_part(response: inference_pb2.SessionResponse, part: str) -> inference_pb2.ForwardResponse:
    """The message of a pass in `response`. Raises InternalError where it isn't `part`."""
    if response.WhichOneof("event") != "forward" or response.forward.WhichOneof("part") != part:
        raise InternalError(f"the gateway sent something else in a session where {part!r} was due")
    return response.forward


def done(response: inference_pb2.SessionResponse) -> inference_pb2.SessionState:
    """The state in `response`. Raises InternalError where it has none."""
    if response.WhichOneof("event") != "done":
        raise InternalError("the gateway sent something else in a session where 'done' was due")
    return response.done


def _until_none(requests: _Requests) -> Iterator[inference_pb2.SessionRequest]:
    while (asked := requests.get()) is not None:
        yield asked


def _end(requests: _Requests, call: Any) -> None:
    requests.put(None)
    call.cancel()
