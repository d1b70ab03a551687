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

from ..proto.v1 import inference_pb2, inference_pb2_grpc, stage_pb2
from ..proto.v1.errors import (
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    SessionExpiredError,
    ShardliftError,
)
from ..proto.v1.frames import only_bytes
from ..proto.v1.server import HeaderGuard, abort
from ..proto.v1.status import code_of, to_error
from ..proto.v1.wire import STAGE_SERVER_OPTIONS, Assembly
from . import logs, tracing
from .admission import Admission
from .links import STEP_METHOD, StepKey
from .metrics import ServingNumbers, StageStatus
from .pipeline import IncomingStep, StagePipeline
from .session import RingSession
from .spec import MOST_IDLE_S, SessionLimits
from .stage import ResidentStage, StepInput
from .tensors import from_bytes, from_message

logger = logging.getLogger(__name__)

SECRET_HEADER = "x-shardlift-stage-secret"
# What the gateway calls a session, and how often it was begun anew: the names in its steps' keys.
SESSION_HEADER = "x-shardlift-session"
EPOCH_HEADER = "x-shardlift-epoch"


class Sessions:
    """The sessions of a model, as its last stage lets them in."""

    def __init__(self, pipeline: StagePipeline, limits: SessionLimits, tokenizer: Callable[[], Any] | None) -> None:
        self.idle_timeout_s = limits.idle_timeout_s
        self.admission = Admission(
            max_sessions=limits.max_sessions, max_waiting=limits.max_waiting, kv_tokens=limits.kv_tokens
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
                epoch=int(headers.get(EPOCH_HEADER, 0)),
                tokenizer=self._tokenizer,
                numbers=self.numbers,
                span=span,
                arrived_s=arrived_s,
            )
            try:
                yield session
            finally:
                session.end()


class StageServer:
    """Serves one resident stage on a port of its own until `stop`.

    The stages of a model share `secret`, made anew for each load. tokenizer: gives the checkpoint's own, for stop
    strings.
    """

    def __init__(
        self,
        stage: ResidentStage,
        *,
        secret: str,
        num_stages: int = 1,
        limits: SessionLimits | None = None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.pipeline = StagePipeline(stage, num_stages=num_stages)
        self.sessions = Sessions(self.pipeline, limits or SessionLimits(), tokenizer)
        self._metadata = [(SECRET_HEADER, secret)]
        guard = HeaderGuard(SECRET_HEADER, secret, AuthenticationError("this stage belongs to another model"))
        self._server = grpc.aio.server(interceptors=[guard], options=STAGE_SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in grpc-stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((_handlers(_StageService(self.pipeline)),))
        if stage.cut.is_last:
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(_InferenceService(self.sessions), self._server)

    async def start(self, host: str) -> str:
        """Listens on a free port of `host`; gives "host:port"."""
        host = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{host}:0")
        if not port:
            raise InternalError(f"no port of {host} can be listened on")
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    async def join(self, next_address: str) -> None:
        """Closes the ring: where this stage's results go (the last stage's token ids go to the first).

        Sessions under way end: a joined ring is a new one.
        """
        await self.pipeline.join(next_address, self._metadata)

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
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _handlers(service: _StageService) -> grpc.GenericRpcHandler:
    """StageService as its generated code would register it, but for tensors' bytes, which pass protobuf by."""
    _, name, method = STEP_METHOD.split("/")
    step = grpc.stream_stream_rpc_method_handler(
        service.Step, request_deserializer=_read, response_serializer=stage_pb2.StepResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler(name, {method: step})


def _read(message: bytes) -> stage_pb2.StepRequest | memoryview:
    more = only_bytes(stage_pb2.StepRequest.MORE_FIELD_NUMBER, message)
    return stage_pb2.StepRequest.FromString(message) if more is None else more


def _more(request: stage_pb2.StepRequest) -> bytes | None:
    return request.more if request.HasField("more") else None


class _StageService:
    def __init__(self, pipeline: StagePipeline) -> None:
        self._pipeline = pipeline

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
        head: stage_pb2.Step | None = None
        assembly: Assembly | None = None
        take = self._pipeline.arrive if self._pipeline.stage.cut.is_last else self._take(send_back)
        async for request in requests:
            more = request if isinstance(request, memoryview) else _more(request)
            if more is not None:
                if assembly is None:
                    raise InvalidRequestError("tensor bytes that belong to no step")
                assembly.add(more)
            else:
                assert not isinstance(request, memoryview)
                if assembly is not None and not request.HasField("end"):
                    raise InvalidRequestError("a step began before the one before it was whole")
                match request.WhichOneof("frame"):
                    case "end":
                        self._pipeline.end_session(request.end.session)
                    case "group":
                        take(_apart(request.group))
                    case "step":
                        head, assembly = request.step, Assembly(request.step.input)
            if head is not None and assembly is not None and assembly.complete:
                take([_incoming(head, from_bytes(assembly.shape, assembly.dtype, assembly.data))])
                head = assembly = None

    def _take(self, send_back: Callable[[StepKey, ShardliftError], None]) -> Callable[[Sequence[IncomingStep]], None]:
        return lambda steps: self._pipeline.pass_on(steps, send_back)


def _apart(group: stage_pb2.StepGroup) -> list[IncomingStep]:
    """A group's steps. Raises InvalidRequestError where their rows are not those of the input."""
    rows = [step.input.shape[0] if step.input.shape else 0 for step in group.steps]
    whole = from_message(group.input)
    if not rows or min(rows) < 1 or sum(rows) != whole.shape[0]:
        raise InvalidRequestError(f"a group of {whole.shape[0]} rows whose steps have {rows}")
    return [_incoming(step, part) for step, part in zip(group.steps, whole.split(rows), strict=True)]


def _incoming(head: stage_pb2.Step, tensor: torch.Tensor) -> IncomingStep:
    return IncomingStep(
        key=StepKey.of(head.key),
        input=StepInput(
            input=tensor,
            attention_mask=from_message(head.attention_mask) if head.HasField("attention_mask") else None,
            position_ids=from_message(head.position_ids).long(),
            use_cache=head.use_cache,
            one_by_one=head.one_by_one,
        ),
        reset_cache=head.reset_cache,
        keep=head.keep if head.HasField("keep") else None,
        rows=tuple(head.rows),
    )


class _InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
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
                async for request in request_iterator:
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
                requests = aiter(request_iterator)
                while (request := await self._next(requests, idle_s)) is not None:
                    idle_s = idle_s or request.idle_timeout_s
                    async for response in _act(session, request):
                        yield response
                    done = inference_pb2.SessionState(length=session.length, rows=session.rows)
                    yield inference_pb2.SessionResponse(done=done)
        except Exception as error:
            await _abort(context, error)

    async def _next(
        self, requests: AsyncIterator[inference_pb2.SessionRequest], idle_s: float
    ) -> inference_pb2.SessionRequest | None:
        limit_s = min(idle_s or self._sessions.idle_timeout_s, MOST_IDLE_S)
        try:
            return await asyncio.wait_for(anext(requests, None), limit_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise SessionExpiredError(
                f"nothing came for this session in {limit_s:g} s, its idle time: its keys and values are freed; begin "
                "a new one"
            ) from None


async def _act(
    session: RingSession, request: inference_pb2.SessionRequest
) -> AsyncIterator[inference_pb2.SessionResponse]:
    if request.HasField("keep"):
        await session.keep(request.keep)
    if request.rows:
        session.select_rows(tuple(request.rows))
    match request.WhichOneof("action"):
        case "forward":
            async for passed in session.answer(request.forward, cached=True):
                yield inference_pb2.SessionResponse(forward=passed)
        case "generate":
            async for generated in session.generate(request.generate):
                yield inference_pb2.SessionResponse(generate=generated)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    ours = to_error(error)
    if ours is not error:
        logger.exception("request failed")
    await abort(context, ours)
