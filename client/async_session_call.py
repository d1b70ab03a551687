"""One running `Session` call, for asyncio. The twin of `session_call`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError, ShardliftError
from ..proto.v1.status import from_refusal
from ..proto.v1.wire import Assembly
from .async_gateway import AsyncGateway, cancel_with, receive
from .session_call import done, forward_part


class AsyncSessionCall:
    """The call is the session: what it holds on the workers is freed when it ends, by `close` or with this object.

    It begins with the first request.
    """

    def __init__(self, gateway: AsyncGateway, model: str, idle_timeout_s: float | None = None) -> None:
        self._gateway = gateway
        self._model = model
        self._idle_timeout_s = idle_timeout_s or 0.0
        self._call: Any = None
        self._was_refused = False
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
        if self._call is not None:
            self._call.cancel()

    async def send(self, asked: inference_pb2.SessionRequest) -> None:
        """Starts an action. What is never retried: a session that is lost is lost."""
        self._was_refused = False
        if self._call is None:
            asked.model, asked.idle_timeout_s = self._model, self._idle_timeout_s
            self._call = await self._gateway.inference_stream("Session")
            cancel_with(self, self._call)
            if self._closed:  # meanwhile, by another task
                self._call.cancel()
        try:
            # A call that is over takes nothing more, and what it ended with is what is received.
            with self._gateway.errors(), contextlib.suppress(asyncio.InvalidStateError):
                await self._call.write(asked)
        except (ShardliftError, asyncio.CancelledError) as error:
            raise self._explained(error) from None

    async def receive(self) -> inference_pb2.SessionResponse:
        """The next message of the action's answer. Raises what the action was refused with."""
        try:
            response: inference_pb2.SessionResponse | None = await receive(self._gateway, self._call)
        except (ShardliftError, asyncio.CancelledError) as error:
            raise self._explained(error) from None
        if response is None:
            raise InternalError("the gateway ended a session in the middle of an answer")
        if response.HasField("refused"):
            self._was_refused = True
            raise from_refusal(response.refused)
        return response

    async def forward(self, asked: inference_pb2.SessionRequest) -> tuple[Assembly, inference_pb2.SessionState]:
        """The logits of a pass, and what the session then holds."""
        await self.send(asked)
        assembly = Assembly(forward_part(await self.receive(), "logits").logits)
        while not assembly.complete:
            assembly.add(forward_part(await self.receive(), "more").more)
        return assembly, done(await self.receive())

    def _explained(self, error: BaseException) -> BaseException:
        """`error`, but for what a call's own cancellation, by another task, is to who waits for its answer."""
        if self._closed:
            return InvalidRequestError("this session was closed in the middle of an answer")
        return error
