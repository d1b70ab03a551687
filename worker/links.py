"""The way from one stage to the next: a persistent gRPC stream behind a small seam.

What goes over it are steps; what comes back are failures (stage.proto). Another transport would take this file's
place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from ..proto.v1 import stage_pb2
from ..proto.v1.credentials import stage_channel
from ..proto.v1.errors import InvalidRequestError, ModelUnavailableError, ShardliftError, one_line
from ..proto.v1.frames import bytes_message
from ..proto.v1.status import from_reason
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.tls import TLS
from ..proto.v1.wire import FRAME_BYTES, STAGE_CHANNEL_OPTIONS

# A neighbour that doesn't take a connection within this time is called unreachable.
CONNECT_TIMEOUT_S = 5.0
STEP_METHOD = "/shardlift.v1.StageService/Step"
# Steps in one message, of about 20 bytes and their input each.
MOST_GROUPED = 256

# A step with the rest of its input's bytes, or (without a key) a session's end.
_Item = tuple["StepKey | None", "stage_pb2.Step | stage_pb2.SessionEnd", Sequence[memoryview]]


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

    One task writes, so that a step's frames stay together and nobody who waits for a step, and gives up, can take the
    stream along. `on_failure(key, error)` is called for each step that failed beyond this link, and for each session's
    latest step when the link breaks: whether that one got through can't be known, and its originator can tell.
    """

    def __init__(
        self,
        address: str,
        metadata: list[tuple[str, str]],
        on_failure: Callable[[StepKey, ShardliftError], None],
        tls: TLS | None = None,
    ) -> None:
        self.address = address
        self._tls = tls
        self._metadata = metadata
        self._on_failure = on_failure
        # What is to be written; each session has one step under way, which bounds it.
        self._outbox: asyncio.Queue[_Item] = asyncio.Queue()
        self._latest: dict[str, StepKey] = {}
        self._channel: grpc.aio.Channel | None = None
        self._call: grpc.aio.StreamStreamCall | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closed = False
        self._writer = asyncio.create_task(self._write())

    def send(self, step: stage_pb2.Step, rest: Sequence[memoryview]) -> None:
        """Has a step sent; that it can't be is told to `on_failure`.

        Single-token steps that wait together go as one group, so that the next stage computes them together.
        """
        key = StepKey.of(step.key)
        if self._closed:
            self._on_failure(key, ModelUnavailableError(f"the link to the stage at {self.address} is closed"))
            return
        self._latest[key.session] = key
        self._outbox.put_nowait((key, step, rest))

    def end_session(self, session: str) -> None:
        """Tells the stages beyond to forget a session. Where the link is down, they already have."""
        if self._latest.pop(session, None) is not None and not self._closed:
            self._outbox.put_nowait((None, stage_pb2.SessionEnd(session=session), ()))

    async def close(self) -> None:
        """Ends the stream; steps under way fail."""
        self._closed = True
        self._break("the link was closed")
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(None)

    # -- the two tasks ---------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            items = [await self._outbox.get()]
            while _is_single(items[-1]) and not self._outbox.empty() and len(items) < MOST_GROUPED:
                items.append(self._outbox.get_nowait())
            call: grpc.aio.StreamStreamCall | None = None
            keys = [key for key, _, _ in items if key is not None]
            try:
                if self._call is not None and self._call.done():
                    # Its end hasn't been seen yet. These steps were not under way; those that were are lost.
                    still = [key for key in keys if self._latest.pop(key.session, None) is not None]
                    self._break("it ended the stream")
                    self._latest.update((key.session, key) for key in still)
                if not keys and self._call is None:
                    continue
                call = await self._opened()
                # Sessions may have ended, or failed, meanwhile.
                items = [item for item in items if item[0] is None or self._latest.get(item[0].session) == item[0]]
                for frame in _frames(items):
                    await call.write(frame)
            except asyncio.CancelledError:
                # Our own end, or that of the call under our hands.
                if self._closed or call is None or not call.cancelled():
                    raise
                self._break("the stream was cancelled")
            # With them TLS files that can't be used just now.
            except (
                grpc.RpcError,
                asyncio.InvalidStateError,
                OSError,
                asyncio.TimeoutError,
                InvalidRequestError,
            ) as error:
                self._break(_reason(error))

    async def _opened(self) -> grpc.aio.StreamStreamCall:
        if self._call is not None and not self._call.done():
            return self._call
        if self._channel is not None:
            await self._channel.close(None)
        self._channel = None
        self._channel = stage_channel(self.address, self._tls, STAGE_CHANNEL_OPTIONS)
        await asyncio.wait_for(_ready(self._channel), CONNECT_TIMEOUT_S)
        step = self._channel.stream_stream(
            STEP_METHOD, request_serializer=_serialized, response_deserializer=stage_pb2.StepResponse.FromString
        )
        self._call = step(None, metadata=self._metadata)
        self._reader = asyncio.create_task(self._read(self._call))
        return self._call

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        reason = "it ended the stream"
        try:
            async for response in call:
                key = StepKey.of(response.key)
                self._on_failure(key, from_reason(response.reason, response.message))
        except grpc.RpcError as error:
            reason = _reason(error)
        except asyncio.CancelledError:
            reason = "the stream was cancelled"
            if self._closed:
                raise
        if self._call is call:
            self._break(reason)

    def _break(self, reason: str) -> None:
        """The stream is gone, and the steps under way with it, those that wait to be written too."""
        call, self._call = self._call, None
        reader, self._reader = self._reader, None
        if call is not None and not call.done():
            call.cancel()
        if reader is not None and self._closed:
            reader.cancel()
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                self._outbox.get_nowait()
        lost, self._latest = list(self._latest.values()), {}
        for key in lost:
            self._on_failure(key, ModelUnavailableError(f"the stage at {self.address} can't be reached: {reason}"))


def _serialized(message: stage_pb2.StepRequest | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _is_single(item: _Item) -> bool:
    """Whether it is a single-token step, which may go in a group with others."""
    step = item[1]
    return isinstance(step, stage_pb2.Step) and not item[2] and list(step.input.shape[1:2]) == [1]


def _frames(items: Sequence[_Item]) -> Iterator[stage_pb2.StepRequest | bytes]:
    """The messages of `items`, in their order; a tensor's later bytes as serialized messages."""
    together: list[stage_pb2.Step] = []
    for item in [*items, None]:
        if item is not None and _is_single(item):
            step = item[1]
            assert isinstance(step, stage_pb2.Step)
            # With their masks, which may be larger than what they mask.
            size = sum(one.ByteSize() for one in together) + step.ByteSize()
            if not together or (_is_alike(step, together[0]) and size <= 2 * FRAME_BYTES):
                together.append(step)
                continue
            yield _group(together)
            together = [step]
            continue
        if together:
            yield _group(together)
            together = []
        if item is None:
            return
        _, what, rest = item
        if isinstance(what, stage_pb2.SessionEnd):
            yield stage_pb2.StepRequest(end=what)
        else:
            yield stage_pb2.StepRequest(step=what)
            for frame in rest:
                yield bytes_message(stage_pb2.StepRequest.MORE_FIELD_NUMBER, frame)


def _is_alike(step: stage_pb2.Step, other: stage_pb2.Step) -> bool:
    return step.input.dtype == other.input.dtype and step.input.shape[1:] == other.input.shape[1:]


def _group(steps: Sequence[stage_pb2.Step]) -> stage_pb2.StepRequest:
    if len(steps) == 1:
        return stage_pb2.StepRequest(step=steps[0])
    shape = [sum(step.input.shape[0] for step in steps), *steps[0].input.shape[1:]]
    data = b"".join(step.input.data for step in steps)
    rows = []
    for step in steps:
        # Its extents stay, so that the other side can take it apart.
        step.input.ClearField("data")
        rows.append(step)
    return stage_pb2.StepRequest(
        group=stage_pb2.StepGroup(steps=rows, input=Tensor(shape=shape, dtype=steps[0].input.dtype, data=data))
    )


async def _ready(channel: grpc.aio.Channel) -> None:
    """Returns once `channel` is connected. Raises ConnectionError at the first refusal: no stage comes back there."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise ConnectionError("connection, or TLS, refused")
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {one_line(Exception(error.details() or ''))}"
    return one_line(error) if str(error) else f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
