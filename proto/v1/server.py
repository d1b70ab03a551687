"""What every server of the contract does alike: let calls in by a secret header, and end failed ones with a status."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import NoReturn

import grpc
import grpc.aio

from .errors import AuthenticationError
from .status import to_status


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """Ends a call with the status of `error`, its reason among the details."""
    await context.abort_with_status(to_status(error))  # type: ignore[attr-defined] # missing in grpc-stubs
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
