"""A conversation with a remote model, for asyncio. The twin of `session`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InvalidRequestError
from . import tensors
from .answer import Answer, Step
from .async_gateway import AsyncGateway
from .async_session_call import AsyncSessionCall
from .deadline import Deadline
from .session_record import Generating, SessionRecord, Turn

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    from .async_handle import AsyncRemoteModel


class AsyncRemoteSession(SessionRecord):
    """As RemoteSession, with coroutines for what asks the gateway.

    The keys and values are freed by `close()`, by the end of an `async with` block, or when nothing refers to it any
    more. Its turns are taken one after another. A turn that is refused before anything is computed leaves it as it was;
    any other failure, and the cancellation of a turn's task, ends it.
    """

    def __init__(
        self,
        model: AsyncRemoteModel,
        gateway: AsyncGateway,
        *,
        idle_timeout_s: float | None = None,
        adapters: inference_pb2.AdapterChoice | None = None,
        reserve_tokens: int | None = None,
    ) -> None:
        super().__init__(model, adapters, reserve_tokens)
        self._learn = model._learn
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None  # the task whose turn it is
        self._call = AsyncSessionCall(gateway, model.name, idle_timeout_s)

    async def __aenter__(self) -> AsyncRemoteSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        return self._call.closed

    async def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._call.close()

    async def rollback(self, length: int) -> None:
        """Forgets all but the first `length` ids of each row."""
        async with self._alone():
            self._roll_back(length)

    async def generate(
        self,
        new_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """As `RemoteSession.generate`: new ids [R, N] → the whole sequences so far [R, L]."""
        async with self._alone():
            with self._in_time(timeout_s):
                running = self._generation(new_ids, generation_config, kwargs, attention_mask=attention_mask, seed=seed)
                collected = running.collected(streamer)
                try:
                    async with contextlib.aclosing(self._run(running)) as events:
                        async for event in events:
                            if isinstance(event, Answer):
                                collected.start(event.batch)
                            else:
                                collected.add(event)
                finally:
                    collected.end()
                return collected.result

    async def stream(
        self,
        new_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        seed: int | None = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Step]:
        """As `RemoteSession.stream`, with `async for`. Leaving it early ends the session."""
        async with self._alone():
            with self._in_time(timeout_s):
                running = self._generation(new_ids, generation_config, kwargs, attention_mask=attention_mask, seed=seed)
                async with contextlib.aclosing(self._run(running)) as events:
                    async for event in events:
                        if isinstance(event, Step):
                            yield event

    async def forward(self, ids: Any, *, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        """As `RemoteSession.forward`: ids [R, N] → the logits of their positions [R, N, vocabulary]."""
        async with self._alone():
            turn = Turn(self, ids, attention_mask)
            action = self._forward_action(turn, position_ids)
            try:
                assembly, state = await self._call.forward(action)
                self._take(turn, turn.new, turn.mask, state)
            except BaseException:
                self._fail()
                raise
            return tensors.to_torch(assembly)

    __call__ = forward

    # Inside

    def _in_time(self, timeout_s: float | None) -> AbstractContextManager[None]:
        """Ends the session where what is done within takes longer."""
        return Deadline(timeout_s, self._model.name).within(
            lambda seconds: asyncio.get_running_loop().call_later(seconds, self._call.close)
        )

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One turn at a time. A stream's lasts until its end, so one within it would wait for ever."""
        if self._owner is not None and self._owner is asyncio.current_task():
            raise InvalidRequestError("a turn of this session is still being streamed: read it to its end first")
        async with self._lock:
            self._owner = asyncio.current_task()
            try:
                await self._learn()
                yield
            finally:
                self._owner = None

    async def _run(self, running: Generating) -> AsyncGenerator[Answer | Step, None]:
        """The turn: its answer once it is accepted, then each step."""
        action = running.begin()
        try:
            await self._call.send(action)
            while not running.over:
                if (event := running.feed(await self._call.receive())) is not None:
                    yield event
        except BaseException:  # the end of whoever reads it, too
            self._fail()
            raise
        finally:
            running.end()

    def _fail(self) -> None:
        """Ends the session, unless the turn was refused before it began."""
        if not self._call.was_refused:
            self._call.close()
