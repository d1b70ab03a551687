"""What every server of the contract does alike: let calls in by a secret header, refuse what can't be read or is too
much, and end failed calls with a status."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from .errors import AuthenticationError, InvalidRequestError
from .status import to_status

Request = TypeVar("Request")
# Services that come with gRPC, whose code looks at no request before it uses it.
_GRPCS_OWN = "/grpc."


async def abort(context: grpc.aio.ServicerContext, error: BaseException, model: str = "") -> NoReturn:
    """Ends a call with the status of `error`, its reason among the details. model: that the call was about."""
    await context.abort_with_status(to_status(error, model))  # type: ignore[attr-defined] # missing in grpc-stubs
    raise AssertionError("an abort always raises")


class HeaderGuard(grpc.aio.ServerInterceptor):
    """Lets in only calls whose metadata has `expected` under `header`, compared in constant time.

    Others end with `refusal`. Methods whose path begins with one of `open_paths` need no header.
    """

    def __init__(
        self, header: str, expected: str, refusal: AuthenticationError, open_paths: tuple[str, ...] = ()
    ) -> None:
        self._header = header
        self._expected = expected.encode()
        self._open_paths = open_paths

        async def refuse(request: object, context: grpc.aio.ServicerContext) -> None:
            await abort(context, refusal)

        self._refusal = grpc.stream_stream_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = str(dict(details.invocation_metadata or ()).get(self._header, ""))
        if details.method.startswith(self._open_paths) or hmac.compare_digest(given.encode(), self._expected):
            return await continuation(details)
        return self._refusal


class Malformed:
    """In the place of a request whose bytes are no message."""

    # Of which model it is: what is told beside an error.
    name = model = ""

    def __init__(self, error: Exception) -> None:
        self.error = InvalidRequestError(f"the request can't be read: {type(error).__name__} in its protobuf message")


def readable(request: Request) -> Request:
    """`request` itself. Raises InvalidRequestError for one that could not be read."""
    if isinstance(request, Malformed):
        raise request.error
    return request


class Checked(Generic[Request]):
    """Requests of a stream, each passed to `check`, which raises, before anybody sees it."""

    def __init__(self, requests: AsyncIterator[Request], check: Callable[[Request], None]) -> None:
        self._requests = aiter(requests)
        self._check = check

    def __aiter__(self) -> Checked[Request]:
        return self

    async def __anext__(self) -> Request:
        request = await anext(self._requests)
        self._check(readable(request))
        return request


class TolerantReading(grpc.aio.ServerInterceptor):
    """Has requests that are no messages come as Malformed, where gRPC would end the call with UNKNOWN and log a
    traceback. `readable` and `Checked` then refuse them with INVALID_ARGUMENT; of unary calls, and of gRPC's own
    services (health, reflection), this does."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler: Any = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        tolerant = handler._replace(request_deserializer=_tolerant(handler.request_deserializer))
        if tolerant.unary_unary is not None:
            tolerant = tolerant._replace(unary_unary=_refusing(tolerant.unary_unary))
        elif details.method.startswith(_GRPCS_OWN):
            if tolerant.unary_stream is not None:
                tolerant = tolerant._replace(unary_stream=_refusing(tolerant.unary_stream))
            elif tolerant.stream_stream is not None:
                tolerant = tolerant._replace(stream_stream=_refusing_among(tolerant.stream_stream))
        return tolerant


def _tolerant(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def tolerant(message: bytes) -> Any:
        try:
            return read(message)
        except DecodeError as error:
            return Malformed(error)

    return tolerant


def _refusing_among(behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def refusing(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(Checked(requests, lambda request: None), context):
                yield response
        except InvalidRequestError as error:
            await abort(context, error)

    return refusing


def _refusing(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def refusing(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, Malformed):
            await abort(context, request.error)
        return await behaviour(request, context)

    return refusing
