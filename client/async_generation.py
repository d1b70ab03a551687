"""A running `Generate` call, for asyncio. The twin of `generation`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import DeadlineExceededError, GatewayUnavailableError
from .answer import Answer, Answered, Step
from .async_gateway import AsyncGateway, cancel_with, receive
from .deadline import Deadline
from .patience import Patience


class AsyncGeneration(Answered, AsyncIterator[Step]):
    """A `Generate` call, started when first iterated over: `async for` its steps.

    `batch`, `prompt_tokens` and `prompt_ids` are known after `start()` or the first step, `new_tokens` and
    `finish_reason` at the end. Leaving it early (`aclose`, the end of an `async with` block, the task's cancellation)
    cancels the call. A gateway that goes away meanwhile is waited for, and asked to go on behind the last step.
    """

    def __init__(
        self,
        gateway: AsyncGateway,
        asked: inference_pb2.GenerateRequest,
        *,
        draws: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """draws: from torch's global generator. timeout_s: beyond which it ends with DeadlineExceededError."""
        super().__init__(Answer(asked, draws=draws))
        self._closed = False
        self._gateway = gateway
        self._patience = Patience(gateway.retry_s)
        self._deadline = Deadline(timeout_s, asked.model)
        self._call: Any = None

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels the call where it is still running."""
        self._cancel()

    async def start(self) -> None:
        """Returns once the gateway has accepted the prompt. Raises what it refused it with."""
        while not self._closed and not self._answer.accepted:
            await self._advance()

    async def __anext__(self) -> Step:
        while not self._closed and not self._answer.over:
            if (step := await self._advance()) is not None:
                return step
        raise StopAsyncIteration

    def _cancel(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()
        self._answer.abandon()

    async def _advance(self) -> Step | None:
        """Takes one message; a step, where that makes one whole."""
        try:
            if self._call is None:
                await self._begin(self._answer.begin())
            try:
                response = await receive(self._gateway, self._call)
            except GatewayUnavailableError as error:
                await self._go_on(error)
                return None
            except DeadlineExceededError as error:
                raise self._deadline.error(error) from None
            self._patience.heard()
            return None if self._closed else self._answer.feed(response)
        except BaseException:  # the task's cancellation, too
            self._cancel()
            raise

    async def _go_on(self, lost: GatewayUnavailableError) -> None:
        if self._answer.finished:
            self._answer.feed(None)  # nothing but the call's end was lost
            return
        if (asked := self._answer.resumed()) is None:
            raise lost
        try:
            await self._gateway.wait_for_return(self._patience.within(self._deadline.left_s), lost)
        except GatewayUnavailableError:
            if self._deadline.passed:
                raise self._deadline.error(lost) from None
            raise
        await self._begin(asked)

    async def _begin(self, asked: inference_pb2.GenerateRequest) -> None:
        self._call = await self._gateway.inference_stream("Generate", asked, timeout_s=self._deadline.left_s)
        cancel_with(self, self._call)
