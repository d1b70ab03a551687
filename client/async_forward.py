"""Forward passes for asyncio. The twin of `forward` and `session_call`."""

from __future__ import annotations

import asyncio
from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import GatewayUnavailableError, InternalError, InvalidRequestError, ShardliftError
from ..proto.v1.status import from_refusal
from ..proto.v1.wire import Assembly
from .async_gateway import AsyncGateway, cancel_with, receive
from .cache import CacheRecord
from .forward import part
from .patience import Patience
from .session_call import done, forward_part


async def once(gateway: AsyncGateway, asked: inference_pb2.ForwardRequest) -> Assembly:
    """The logits of one pass that leaves nothing behind, and so may be asked for again where the gateway is lost."""
    patience = Patience(gateway.retry_s)
    while True:
        try:
            return await _once(gateway, asked)
        except GatewayUnavailableError as error:
            await gateway.wait_for_return(patience, error)


async def _once(gateway: AsyncGateway, asked: inference_pb2.ForwardRequest) -> Assembly:
    call = await gateway.inference_stream("Forward")
    try:
        with gateway.errors():
            await call.write(asked)
            await call.done_writing()
        assembly = Assembly(part(await receive(gateway, call), "logits").logits)
        while not assembly.complete:
            assembly.add(part(await receive(gateway, call), "more").more)
        if await receive(gateway, call) is not None:
            raise InternalError("the gateway went on after the end of a forward pass")
        return assembly
    finally:
        call.cancel()


class AsyncRemoteCache(CacheRecord):
    """Keys and values of a session, on the model's workers: what `past_key_values` is for an AsyncRemoteModel.

    It grows with each pass that it is given to. Freed by `close()`, by the end of a `with` block, or when nothing
    refers to it any more. Passes of one cache are taken one after another.
    """

    def __init__(self, gateway: AsyncGateway, model: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._model = model
        self._lock = asyncio.Lock()
        self._call: Any = None
        self._closed = False

    def __enter__(self) -> AsyncRemoteCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("an AsyncRemoteCache belongs to an open call and can't be pickled or copied")

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def step(self, asked: inference_pb2.ForwardRequest) -> Assembly:
        """The logits of one pass. Any failure of it ends the session, but for a refusal before anything is computed."""
        async with self._lock:
            if self._closed:
                raise InvalidRequestError("this cache is closed: start again from the whole prompt")
            rows, new = asked.input_ids.shape
            action = self._prepared(rows)
            action.forward.CopyFrom(asked)
            try:
                if self._call is None:
                    action.model = self._model
                    self._call = await self._gateway.inference_stream("Session")
                    cancel_with(self, self._call)
                with self._gateway.errors():
                    await self._call.write(action)
                assembly = Assembly(forward_part(await self._receive(), "logits").logits)
                while not assembly.complete:
                    assembly.add(forward_part(await self._receive(), "more").more)
                self._done(done(await self._receive()), self._length + new, rows)
            except _RefusedError as error:
                raise error.reason from None
            except BaseException:
                self.close()
                raise
            return assembly

    async def _receive(self) -> inference_pb2.SessionResponse:
        response: inference_pb2.SessionResponse | None = await receive(self._gateway, self._call)
        if response is None:
            raise InternalError("the gateway ended a session in the middle of an answer")
        if response.HasField("refused"):
            raise _RefusedError(from_refusal(response.refused))
        return response


class _RefusedError(Exception):
    """The session is as it was before."""

    def __init__(self, reason: ShardliftError) -> None:
        super().__init__(reason)
        self.reason = reason
