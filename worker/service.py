"""The gRPC face of a stage: StageService for its neighbours, InferenceService (last stage) for the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..proto.v1 import inference_pb2, inference_pb2_grpc, limits, saving_pb2, stage_pb2
from ..proto.v1.credentials import listen
from ..proto.v1.errors import (
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    ModelBusyError,
    OutOfMemoryError,
    SessionExpiredError,
    ShardliftError,
)
from ..proto.v1.server import Checked, HeaderGuard, TolerantReading, abort, readable
from ..proto.v1.status import code_of, to_error, to_refusal
from ..proto.v1.tls import TLS
from ..proto.v1.wire import MAX_CALLS, STAGE_SERVER_OPTIONS
from . import logs, tracing
from .adapter_fetch import fetch_tensors
from .adapter_spec import AdapterSpec
from .admission import Admission, Room
from .links import STEP_METHOD, StepKey
from .metrics import ServingNumbers, StageStatus
from .pipeline import IncomingStep, StagePipeline
from .records import HubToken
from .save_call import SaveCall
from .session import RingSession
from .sources import Cancel
from .spec import MOST_IDLE_S, ModuleBytes, SessionLimits
from .stage import ResidentStage
from .step_frames import StepFrames, read_frame

logger = logging.getLogger(__name__)

SECRET_HEADER = "x-shardlift-stage-secret"
# What the gateway calls a session, and how often it was begun anew: the names in its steps' keys.
SESSION_HEADER = "x-shardlift-session"
EPOCH_HEADER = "x-shardlift-epoch"


class Sessions:
    """The sessions of a model, as its last stage lets them in."""

    def __init__(self, pipeline: StagePipeline, limits: SessionLimits, tokenizer: Callable[[], Any] | None) -> None:
        self.idle_timeout_s = limits.idle_timeout_s
        self.idle_place_s = limits.idle_place_s
        self.admission = Admission(
            max_sessions=limits.max_sessions,
            max_waiting=limits.max_waiting,
            kv_tokens=limits.kv_tokens,
            wait_s=limits.wait_s,
            rooms=rooms_of(limits.rooms),
        )
        self.numbers = ServingNumbers()
        self._pipeline = pipeline
        self._tokenizer = tokenizer

    @contextlib.asynccontextmanager
    async def open(self, context: grpc.aio.ServicerContext, method: str) -> AsyncIterator[RingSession]:
        """A session for the length of a call, once it is its turn. Named by the call's headers, if it has a name."""
        headers = dict(context.invocation_metadata() or ())
        name = str(headers.get(SESSION_HEADER, ""))
        logs.note(session=name)
        arrived_s = time.perf_counter()
        with tracing.span(f"stage {method}", tracing.given(context.invocation_metadata()), session=name) as span:
            ticket = await self.admission.enter()
            entered_s = time.perf_counter()
            self.numbers.queue_s.append(entered_s - arrived_s)
            span.past("queue", arrived_s, entered_s)
            session = RingSession(
                self._pipeline,
                ticket,
                name=name,
                epoch=_epoch(str(headers.get(EPOCH_HEADER, "0"))),
                tokenizer=self._tokenizer,
                numbers=self.numbers,
                span=span,
                arrived_s=arrived_s,
            )
            try:
                yield session
            finally:
                session.end()


def rooms_of(rooms: Sequence[tuple[int, int]]) -> list[Room]:
    """As SessionLimits has them."""
    return [Room(bytes_=bytes_, token_bytes=token_bytes) for bytes_, token_bytes in rooms]


def _epoch(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text[:10]) == int(text[:11]) < 1 << 32):
        raise InvalidRequestError(f"{EPOCH_HEADER} is {text[:20]!r}, not a number of 32 bits")
    return int(text)


class StageServer:
    """Serves one resident stage on a port of its own until `stop`.

    The stages of a model share `secret`, made anew for each load. tokenizer: gives the checkpoint's own, for stop
    strings. tls: files for both ends of the connections between stages, which are mutual then.
    """

    def __init__(
        self,
        stage: ResidentStage,
        *,
        secret: str,
        num_stages: int = 1,
        limits: SessionLimits | None = None,
        tokenizer: Callable[[], Any] | None = None,
        tls: TLS | None = None,
    ) -> None:
        self._tls = tls
        self.pipeline = StagePipeline(stage, num_stages=num_stages)
        self.sessions = Sessions(self.pipeline, limits or SessionLimits(), tokenizer)
        self._metadata = [(SECRET_HEADER, secret)]
        guard = HeaderGuard(SECRET_HEADER, secret, AuthenticationError("this stage belongs to another model"))
        self._server = grpc.aio.server(
            interceptors=[guard, TolerantReading()], options=STAGE_SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in grpc-stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._stage_service = _StageService(self.pipeline)
        self._server.add_generic_rpc_handlers((_handlers(self._stage_service),))
        if stage.cut.is_last:
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(_InferenceService(self.sessions), self._server)

    async def start(self, host: str) -> str:
        """Listens on a free port of `host`; gives "host:port"."""
        host = f"[{host}]" if ":" in host else host
        port = listen(self._server, f"{host}:0", self._tls)
        if not port:
            raise InternalError(f"no port of {host} can be listened on")
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    async def join(self, next_address: str) -> None:
        """Closes the ring: where this stage's results go (the last stage's token ids go to the first).

        Sessions under way end: a joined ring is a new one.
        """
        await self.pipeline.join(next_address, self._metadata, self._tls)

    async def load_adapter(self, spec: AdapterSpec, token: HubToken, cancel: Cancel) -> tuple[ModuleBytes, ...]:
        """Fetches and attaches this stage's part of an adapter; gives what it holds. A failure leaves nothing behind.

        Once more, it is put in the place of what was there. Raises the errors of sources and of `StageAdapters.load`.
        """
        adapters = self.pipeline.stage.adapters
        tensors = await asyncio.to_thread(fetch_tensors, spec, adapters.records(spec), token, cancel)

        def attach() -> tuple[ModuleBytes, ...]:
            adapters.remove(spec.name)
            return adapters.load(spec, tensors)

        return await self.pipeline.run("", attach)

    async def delete_adapter(self, name: str) -> None:
        """Takes an adapter off; nothing happens where it isn't there."""
        stage = self.pipeline.stage

        def take_off() -> None:
            stage.adapters.remove(name)
            if stage.device.type == "cuda":
                torch.cuda.empty_cache()

        await self.pipeline.run("", take_off)

    def status(self) -> StageStatus:
        """How it is now; without its tokens per second, which only who reads at intervals knows."""
        admission, numbers = self.sessions.admission, self.sessions.numbers
        batches = list(self.pipeline.compute.batches.items())
        return StageStatus(
            sessions=self.pipeline.sessions,
            kv_bytes=self.pipeline.kv_bytes,
            running=len(admission.running),
            waiting=admission.waiting,
            max_sessions=admission.max_sessions,
            reserved_tokens=admission.reserved_tokens,
            limit_tokens=admission.kv_tokens,
            prompt_tokens=numbers.prompt_tokens,
            generated_tokens=numbers.generated_tokens,
            batches=sum(count for _, count in batches),
            batch_sessions=sum(size * count for size, count in batches),
        )

    async def stop(self, grace_s: float = 0.5) -> None:
        # The pipeline first: who waits for a step is told why, before the server cuts them off.
        await self.pipeline.close()
        await self._stage_service.close()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _handlers(service: _StageService) -> grpc.GenericRpcHandler:
    """StageService as its generated code would register it, but for tensors' bytes, which pass protobuf by."""
    _, name, method = STEP_METHOD.split("/")
    step = grpc.stream_stream_rpc_method_handler(
        service.Step, request_deserializer=read_frame, response_serializer=stage_pb2.StepResponse.SerializeToString
    )
    save = grpc.stream_stream_rpc_method_handler(
        service.Save,
        request_deserializer=saving_pb2.SaveRequest.FromString,
        response_serializer=saving_pb2.SaveResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(name, {method: step, "Save": save})


class _StageService:
    def __init__(self, pipeline: StagePipeline) -> None:
        self._pipeline = pipeline
        self._saves: set[SaveCall] = set()

    async def close(self) -> None:
        """Ends the saves under way; returns once they have taken back what they wrote."""
        await asyncio.gather(*(save.close() for save in self._saves))

    async def Save(
        self, request_iterator: AsyncIterator[saving_pb2.SaveRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[saving_pb2.SaveResponse]:
        call = SaveCall(self._pipeline)
        self._saves.add(call)
        try:
            async for request in request_iterator:
                match request.WhichOneof("action"):
                    case "begin":
                        yield saving_pb2.SaveResponse(part=await call.begin(request.begin))
                    case "write":
                        async with contextlib.aclosing(call.write(request.write)) as responses:
                            async for response in responses:
                                yield response
                        yield saving_pb2.SaveResponse(written=saving_pb2.SaveFinished())
                    case "commit":
                        await call.commit()
                        yield saving_pb2.SaveResponse(committed=saving_pb2.SaveFinished())
        except Exception as error:
            await _abort(context, error)
        finally:
            await call.close()
            self._saves.discard(call)

    async def Step(
        self, request_iterator: AsyncIterator[stage_pb2.StepRequest | memoryview], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[stage_pb2.StepResponse]:
        failures: asyncio.Queue[stage_pb2.StepResponse | None] = asyncio.Queue()

        def send_back(key: StepKey, error: ShardliftError) -> None:
            failures.put_nowait(
                stage_pb2.StepResponse(
                    key=key.message(), code=code_of(error), message=str(error), reason=type(error).__name__
                )
            )

        reading = asyncio.create_task(self._read(request_iterator, send_back))
        reading.add_done_callback(lambda _: failures.put_nowait(None))
        try:
            while (failure := await failures.get()) is not None:
                yield failure
            if (error := reading.exception()) is not None:
                await abort(context, error)
        finally:
            reading.cancel()
            self._pipeline.forget_sender(send_back)

    async def _read(
        self,
        requests: AsyncIterator[stage_pb2.StepRequest | memoryview],
        send_back: Callable[[StepKey, ShardliftError], None],
    ) -> None:
        take = self._pipeline.arrive if self._pipeline.stage.cut.is_last else self._take(send_back)
        stage = self._pipeline.stage
        frames = StepFrames(takes_ids=stage.cut.is_first, width=stage.width)
        async for request in requests:
            came = frames.add(readable(request))
            if isinstance(came, str):
                self._pipeline.end_session(came)
            elif came:
                take(came)

    def _take(self, send_back: Callable[[StepKey, ShardliftError], None]) -> Callable[[Sequence[IncomingStep]], None]:
        return lambda steps: self._pipeline.pass_on(steps, send_back)


class _InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            limits.check_generate(readable(request))
            async with self._sessions.open(context, "Generate") as session:
                async for response in session.generate(request):
                    yield response
        except Exception as error:
            await _abort(context, error)

    async def Forward(
        self, request_iterator: AsyncIterator[inference_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.ForwardResponse]:
        try:
            async with self._sessions.open(context, "Forward") as session:
                async for request in Checked(request_iterator, limits.check_forward):
                    async for response in session.answer(request, cached=request.use_cache):
                        yield response
        except Exception as error:
            await _abort(context, error)

    async def Session(
        self, request_iterator: AsyncIterator[inference_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.SessionResponse]:
        try:
            async with self._sessions.open(context, "Session") as session:
                idle_s = 0.0
                requests = Checked(request_iterator, limits.check_session)
                while (request := await self._next(requests, idle_s, session)) is not None:
                    idle_s = idle_s or request.idle_timeout_s
                    before = session.state
                    try:
                        await session.resume()
                        async for response in _act(session, request):
                            yield response
                    except _REFUSALS as error:
                        if not session.go_back(before):
                            raise
                        yield inference_pb2.SessionResponse(refused=to_refusal(error))
                        continue
                    done = inference_pb2.SessionState(length=session.length, rows=session.rows)
                    yield inference_pb2.SessionResponse(done=done)
        except Exception as error:
            await _abort(context, error)

    async def _next(
        self, requests: AsyncIterator[inference_pb2.SessionRequest], idle_s: float, session: RingSession
    ) -> inference_pb2.SessionRequest | None:
        limit_s = min(idle_s or self._sessions.idle_timeout_s, MOST_IDLE_S)
        soon_s = min(self._sessions.idle_place_s, limit_s)
        coming = asyncio.ensure_future(anext(requests, None))
        try:
            for wait_s in (soon_s, limit_s - soon_s):
                if (await asyncio.wait([coming], timeout=wait_s))[0]:
                    return coming.result()
                # It lets others run; not at once, for its user may be driving a generation step by step.
                session.rest()
        finally:
            coming.cancel()
        raise SessionExpiredError(
            f"nothing came for this session in {limit_s:g} s, its idle time: its keys and values are freed; begin "
            "a new one"
        )


# What an action may be refused with before anything is computed.
_REFUSALS = (InvalidRequestError, ModelBusyError, OutOfMemoryError)


async def _act(
    session: RingSession, request: inference_pb2.SessionRequest
) -> AsyncIterator[inference_pb2.SessionResponse]:
    if request.HasField("keep"):
        session.keep(request.keep)
    if request.rows:
        session.select_rows(tuple(request.rows))
    if request.HasField("reserve_tokens"):
        session.hold(request.reserve_tokens)
    kind = request.WhichOneof("action")
    if kind is not None and request.HasField("adapters") and not getattr(request, kind).HasField("adapters"):
        getattr(request, kind).adapters.CopyFrom(request.adapters)
    match kind:
        case "forward":
            async for passed in session.answer(request.forward, cached=True):
                yield inference_pb2.SessionResponse(forward=passed)
        case "generate":
            async for generated in session.generate(request.generate, cached=True):
                yield inference_pb2.SessionResponse(generate=generated)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    ours = to_error(error)
    if ours is not error:
        logger.exception("request failed")
    await abort(context, ours)
