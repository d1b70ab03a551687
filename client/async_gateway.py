"""One gateway as the asyncio client sees it. The twin of `gateway`, on grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..proto.v1 import inference_pb2_grpc, registry_pb2_grpc, status
from ..proto.v1.credentials import failed_handshake
from ..proto.v1.errors import GatewayUnavailableError, InvalidRequestError
from ..proto.v1.tls import TLS
from . import channel
from .gateway import CALL_TIMEOUT_S, SAFE, Gateway, connect_limit_s, token_for
from .patience import RETRY_S, Patience

_EOF: Any = getattr(grpc.aio, "EOF")  # noqa: B009 - grpc's type stubs lack it


class AsyncGateway:
    """A connection to the gateway at `address` ("host:port"), made when first used, for one event loop.

    A copy is the same connection. A pickle of it holds the address alone, and connects where it is first used.
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        timeout_s: float = channel.CONNECT_TIMEOUT_S,
        retry_s: float = RETRY_S,
        tls: TLS | None = None,
    ) -> None:
        self.address = channel.normalize(address, tls)
        channel.warn_of_plain_text(self.address, token)
        self._tls = tls
        self.retry_s = retry_s
        self._token = token
        self._metadata = None if token is None else (channel.authorization(token),)
        self._timeout_s = timeout_s
        self._connected = False
        self._has_answered = False
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._registry: Any = None
        self._inference: Any = None
        self._blocking: Gateway | None = None

    def __reduce__(self) -> tuple[Callable[[str, float, float], AsyncGateway], tuple[str, float, float]]:
        return reopen, (self.address, self._timeout_s, self.retry_s)

    def __copy__(self) -> AsyncGateway:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncGateway:
        return self

    @property
    def blocking(self) -> Gateway:
        """A blocking connection to the same gateway, for what is driven from a thread."""
        if self._closed:
            raise InvalidRequestError("this client is closed: connect again")
        if self._blocking is None:
            self._blocking = Gateway(self.address, self._token, self._timeout_s, self.retry_s, self._tls)
        return self._blocking

    async def connect(self, timeout_s: float | None = None) -> None:
        """Returns once somebody answers, as `Gateway.connect`."""
        patience = Patience(connect_limit_s(self._timeout_s, self.retry_s, timeout_s, self._has_answered))
        while not self._connected or self._closed:
            if self._closed:
                raise InvalidRequestError("this client is closed: connect again")
            try:
                await self._connect(patience.left_s)
            except GatewayUnavailableError:
                # It may have come up, and gone again before it had answered.
                pause_s = patience.pause_s() if self._has_answered else None
                if pause_s is None or self._closed:
                    raise
                await asyncio.sleep(pause_s)

    async def _connect(self, limit_s: float) -> None:
        if self._channel is None:  # here, for it belongs to the loop that runs
            self._channel = channel.open_async_channel(self.address, self._tls)
            self._registry = registry_pb2_grpc.ModelRegistryServiceStub(self._channel)
            self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        health: Any = health_pb2_grpc.HealthStub(self._channel)
        if channel.is_secure(self.address):
            why = await _refusal(health, limit_s)
            if failed_handshake(why) is not None:  # no waiting mends that
                raise channel.no_answer(self.address, limit_s, why)
        try:
            await health.Check(health_pb2.HealthCheckRequest(), timeout=limit_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if not channel.is_answer(error, wait=True):
                raise channel.no_answer(self.address, limit_s, await _refusal(health, channel.REASON_S)) from None
        self._connected = self._has_answered = True

    async def close(self) -> None:
        """Ends the connection and whatever runs over it. Calling it again does nothing."""
        self._closed = True
        opened, self._channel = self._channel, None
        if opened is not None:
            await opened.close(None)
        blocking, self._blocking = self._blocking, None
        if blocking is not None:
            await asyncio.to_thread(blocking.close)

    async def ask(self, method: str, request: Any, timeout_s: float | None = CALL_TIMEOUT_S) -> Any:
        """The registry's answer to `request`. Raises what the gateway raised."""
        await self.connect(timeout_s)  # nothing is sent before
        patience = Patience(0.0 if method not in SAFE else min(self.retry_s, timeout_s or self.retry_s))
        while True:
            try:
                with self.errors():
                    return await getattr(self._registry, method)(request, timeout=timeout_s, metadata=self._metadata)
            except GatewayUnavailableError as error:
                await self.wait_for_return(patience, error)

    async def wait_for_return(self, patience: Patience, lost: GatewayUnavailableError) -> None:
        """Returns when the gateway answers again. Raises `lost` when `patience` is over."""
        while (pause_s := patience.pause_s()) is not None:
            await asyncio.sleep(pause_s)
            try:
                await self.connect(patience.left_s)
            except GatewayUnavailableError:
                continue
            return
        raise lost

    async def registry_stream(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """The call of a streaming method of ModelRegistryService; read it inside `errors()`."""
        await self.connect()
        return getattr(self._registry, method)(request, timeout=timeout_s, metadata=self._metadata)

    async def inference_stream(self, method: str, *request: Any, timeout_s: float | None = None) -> Any:
        """The call of a streaming method of InferenceService; read, and where it takes a stream, write it inside
        `errors()`."""
        await self.connect(timeout_s)
        return getattr(self._inference, method)(*request, timeout=timeout_s, metadata=self._metadata)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raises gRPC's errors as shardlift's."""
        try:
            yield
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self._connected = False  # it may be on its way up again: the next call waits for it
            raise status.from_rpc_error(error, self.address) from None


def reopen(address: str, timeout_s: float = channel.CONNECT_TIMEOUT_S, retry_s: float = RETRY_S) -> AsyncGateway:
    """The gateway at `address`, with the token that this process finds for it."""
    return AsyncGateway(address, token_for(address), timeout_s, retry_s)


async def _refusal(health: Any, timeout_s: float) -> str:
    """What gRPC says of an attempt to connect; nothing of one that succeeds."""
    try:
        await health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        return str(error.details() or "")
    return ""


async def receive(gateway: AsyncGateway, call: Any) -> Any:
    """The next message of `call`, or None at its end."""
    with gateway.errors():
        return at_end(await call.read())


def cancel_with(owner: object, call: Any) -> None:
    """Cancels `call` once nothing refers to `owner` any more: the event loop keeps the call itself."""
    finalizer = weakref.finalize(owner, _cancel_soon, asyncio.get_running_loop(), call)
    finalizer.atexit = False


def _cancel_soon(loop: asyncio.AbstractEventLoop, call: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and every call with it
        loop.call_soon_threadsafe(call.cancel)


def at_end(message: Any) -> Any:
    """What was read of a call: None at its end."""
    return None if message is _EOF else message
