"""A real gRPC server in this process that plays back what a test wrote, and takes nothing else.

A test lists the calls that it expects, in order, with the answers. A call that was not expected fails, and so does the
test: `ScriptedGateway` checks at its end that everything expected came, and nothing more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from shardlift.proto.v1 import errors, inference_pb2_grpc, registry_pb2_grpc, status, wire

# Takes the request (for Forward and Session an iterator of requests) and the context, and gives or yields the answer.
Script = Callable[[Any, grpc.ServicerContext], Any]


@dataclass
class Call:
    """A call that came: its method, its first request, its metadata, and how it ended."""

    method: str
    request: Any
    metadata: dict[str, str]
    over: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False


class ScriptedGateway:
    """A gateway at `address` on the loopback interface. A context manager."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.calls: list[Call] = []
        self._expected: list[tuple[str, Script]] = []
        self._failures: list[str] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=wire.SERVER_OPTIONS)
        registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(_Servicer(self), self._server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Servicer(self), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> ScriptedGateway:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._server.stop(grace=None).wait()
        if kind is None:
            assert not self._failures, self._failures
            assert not self._expected, f"never called: {[method for method, _ in self._expected]}"

    def expect(self, method: str, script: Script) -> None:
        """The next call is of `method`, and `script` answers it."""
        self._expected.append((method, script))

    def answer(self, method: str, *replies: Any, error: BaseException | None = None) -> None:
        """The next call is of `method`: it gets `replies`, then `error` if there is one."""

        def play(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from replies
            if error is not None:
                context.abort_with_status(status.to_status(error))

        self.expect(method, play)

    def take(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Plays the script for a call that came."""
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        call = Call(method, request, metadata)
        with self._lock:
            self.calls.append(call)
            script: Script | None = None
            if self._expected and self._expected[0][0] == method:
                script = self._expected.pop(0)[1]
            else:
                self._failures.append(f"{method} came where {self._expected[:1] or 'nothing'} was expected")

        def ended() -> None:
            call.cancelled = context.code() is None and not finished
            call.over.set()

        finished = False
        if not context.add_callback(ended):
            ended()
        if self.token is not None and metadata.get("authorization") != f"Bearer {self.token}":
            context.abort_with_status(status.to_status(errors.AuthenticationError("the token is wrong")))
        if script is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{method} was not expected")
        assert script is not None
        yield from _iterate(script(request, context))
        finished = True


def _iterate(answer: Any) -> Iterable[Any]:
    return answer if isinstance(answer, Iterable) and not hasattr(answer, "DESCRIPTOR") else [answer]


def _only(answers: Iterable[Any]) -> Any:
    (answer,) = answers
    return answer


class _Servicer:
    """Both services: unary methods give the only message of their script."""

    def __init__(self, gateway: ScriptedGateway) -> None:
        self._gateway = gateway

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        if method in ("LoadModel", "WatchCluster", "Generate", "Forward", "Session"):
            return lambda request, context: self._gateway.take(method, request, context)
        return lambda request, context: _only(self._gateway.take(method, request, context))
