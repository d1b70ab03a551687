"""Forward passes for asyncio. The twin of `forward`."""

from __future__ import annotations

import asyncio
from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import GatewayUnavailableError, InternalError, InvalidRequestError
from ..proto.v1.wire import Assembly
from .async_gateway import AsyncGateway, receive
from .async_session_call import AsyncSessionCall
from .cache import CacheRecord
from .forward import part
from .patience import Patience


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
        self._lock = asyncio.Lock()
        self._session = AsyncSessionCall(gateway, model)

    def __enter__(self) -> AsyncRemoteCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("an AsyncRemoteCache belongs to an open call and can't be pickled or copied")

    @property
    def closed(self) -> bool:
        return self._session.closed

    def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._session.close()

    async def step(self, asked: inference_pb2.ForwardRequest) -> Assembly:
        """The logits of one pass. Any failure of it ends the session, but for a refusal before anything is computed."""
        async with self._lock:
            if self.closed:
                raise InvalidRequestError("this cache is closed: start again from the whole prompt")
            rows, new = asked.input_ids.shape
            action = self._prepared(rows)
            action.forward.CopyFrom(asked)
            try:
                assembly, state = await self._session.forward(action)
                self._done(state, self._length + new, rows)
            except BaseException:
                if not self._session.was_refused:
                    self.close()
                raise
            return assembly
