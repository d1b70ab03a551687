"""The way from one stage to the next: a persistent gRPC stream behind a small seam.

What goes over it are steps; what comes back are failures (stage.proto). Another transport would take this file's
place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from ..proto.v1 import stage_pb2, stage_pb2_grpc
from ..proto.v1.errors import ModelUnavailableError, ShardliftError, one_line
from ..proto.v1.status import from_reason
from ..proto.v1.wire import CHANNEL_OPTIONS

logger = logging.getLogger(__name__)

# A neighbour that doesn't take a connection within this time is called unreachable.
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class StepKey:
    """Names one step of one session of one epoch."""

    session: str
    epoch: int
    number: int

    @classmethod
    def of(cls, message: stage_pb2.StepKey) -> StepKey:
        return cls(message.session, message.epoch, message.number)

    def message(self) -> stage_pb2.StepKey:
        return stage_pb2.StepKey(session=self.session, epoch=self.epoch, number=self.number)


class Link:
    """The stream to the next stage of the ring, opened at the first step and again after a break.

    `on_failure(key, error)` is called for each step that failed beyond this link, and for each session's latest step
    when the link itself breaks: whether that one got through can't be known, and its originator can tell.
    """

    def __init__(
        self,
        address: str,
        metadata: list[tuple[str, str]],
        on_failure: Callable[[StepKey, ShardliftError], None],
    ) -> None:
        self.address = address
        self._metadata = metadata
        self._on_failure = on_failure
        self._channel: grpc.aio.Channel | None = None
        self._call: grpc.aio.StreamStreamCall | None = None
        self._reader: asyncio.Task[None] | None = None
        # One step's frames must not be torn apart by another's.
        self._writing = asyncio.Lock()
        self._latest: dict[str, StepKey] = {}

    async def send(self, step: stage_pb2.Step, rest: Iterator[bytes]) -> None:
        """Sends a step whole. Raises ModelUnavailableError when the next stage can't be reached."""
        key = StepKey.of(step.key)
        async with self._writing:
            self._latest[key.session] = key
            try:
                call = await self._opened()
                await call.write(stage_pb2.StepRequest(step=step))
                for frame in rest:
                    await call.write(stage_pb2.StepRequest(more=frame))
            except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError, asyncio.TimeoutError) as error:
                self._latest.pop(key.session, None)
                await self._drop()
                raise ModelUnavailableError(
                    f"the stage at {self.address} can't be reached: {_reason(error)}"
                ) from error

    async def end_session(self, session: str) -> None:
        """Tells the stages beyond to forget a session; does nothing where the link is down, as they then already do."""
        async with self._writing:
            self._latest.pop(session, None)
            if self._call is None or self._call.done():
                return
            try:
                await self._call.write(stage_pb2.StepRequest(end=stage_pb2.SessionEnd(session=session)))
            except (grpc.RpcError, asyncio.InvalidStateError):
                await self._drop()

    async def close(self) -> None:
        await self._drop()

    async def _opened(self) -> grpc.aio.StreamStreamCall:
        if self._call is not None and not self._call.done():
            return self._call
        await self._drop()
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        await asyncio.wait_for(self._channel.channel_ready(), CONNECT_TIMEOUT_S)
        self._call = stage_pb2_grpc.StageServiceStub(self._channel).Step(metadata=self._metadata)
        self._reader = asyncio.create_task(self._read(self._call))
        return self._call

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            async for response in call:
                key = StepKey.of(response.key)
                if self._latest.get(key.session) == key:
                    del self._latest[key.session]
                self._on_failure(key, from_reason(response.reason, response.message))
            reason = "it ended the stream"
        except grpc.RpcError as error:
            reason = _reason(error)
        # A stream that ends on its own took the steps under way with it.
        lost, self._latest = list(self._latest.values()), {}
        for key in lost:
            self._on_failure(key, ModelUnavailableError(f"the stage at {self.address} was lost: {reason}"))

    async def _drop(self) -> None:
        reader, self._reader = self._reader, None
        call, self._call = self._call, None
        channel, self._channel = self._channel, None
        if reader is not None and reader is not asyncio.current_task():
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        if call is not None:
            call.cancel()
        if channel is not None:
            await channel.close(None)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {one_line(Exception(error.details() or ''))}"
    return one_line(error) if str(error) else f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
