"""The gRPC face of a stage: StageService for its neighbours, InferenceService (last stage) for the gateway."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import grpc.aio
import torch
from google.protobuf.json_format import MessageToDict

from ..proto.v1 import inference_pb2, inference_pb2_grpc, stage_pb2, stage_pb2_grpc
from ..proto.v1.errors import AuthenticationError, InternalError, InvalidRequestError, ShardliftError
from ..proto.v1.server import HeaderGuard, abort
from ..proto.v1.status import code_of, to_error
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import STAGE_SERVER_OPTIONS, Assembly
from .generation import Decoding, Forward
from .links import StepKey
from .pipeline import IncomingStep, StagePipeline
from .stage import ResidentStage, StepInput
from .tensors import check_ids, from_bytes, from_message, to_frames

logger = logging.getLogger(__name__)

SECRET_HEADER = "x-shardlift-stage-secret"


class StageServer:
    """Serves one resident stage on a port of its own until `stop`.

    The stages of a model share `secret`, made anew for each load.
    """

    def __init__(self, stage: ResidentStage, *, secret: str) -> None:
        self.pipeline = StagePipeline(stage)
        self._metadata = [(SECRET_HEADER, secret)]
        guard = HeaderGuard(SECRET_HEADER, secret, AuthenticationError("this stage belongs to another model"))
        self._server = grpc.aio.server(interceptors=[guard], options=STAGE_SERVER_OPTIONS)
        stage_pb2_grpc.add_StageServiceServicer_to_server(_StageService(self.pipeline), self._server)
        if stage.cut.is_last:
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(_InferenceService(self.pipeline), self._server)

    async def start(self, host: str) -> str:
        """Listens on a free port of `host`; gives "host:port"."""
        host = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{host}:0")
        if not port:
            raise InternalError(f"no port of {host} can be listened on")
        await self._server.start()
        return f"{host}:{port}"

    async def join(self, next_address: str) -> None:
        """Closes the ring: where this stage's results go (the last stage's token ids go to the first)."""
        await self.pipeline.join(next_address, self._metadata)

    async def stop(self, grace_s: float = 0.5) -> None:
        # The pipeline first: who waits for a step is told why, before the server cuts them off.
        await self.pipeline.close()
        await self._server.stop(grace_s)


class _StageService(stage_pb2_grpc.StageServiceServicer):
    def __init__(self, pipeline: StagePipeline) -> None:
        self._pipeline = pipeline

    async def Step(
        self, request_iterator: AsyncIterator[stage_pb2.StepRequest], context: grpc.aio.ServicerContext
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
        requests: AsyncIterator[stage_pb2.StepRequest],
        send_back: Callable[[StepKey, ShardliftError], None],
    ) -> None:
        tasks: set[asyncio.Task[None]] = set()
        head: stage_pb2.Step | None = None
        assembly: Assembly | None = None
        try:
            async for request in requests:
                kind = request.WhichOneof("frame")
                if kind == "end":
                    self._pipeline.end_session(request.end.session)
                    continue
                if kind == "step":
                    if assembly is not None:
                        raise InvalidRequestError("a step began before the one before it was whole")
                    head, assembly = request.step, Assembly(request.step.input)
                elif assembly is None:
                    raise InvalidRequestError("tensor bytes that belong to no step")
                else:
                    assembly.add(request.more)
                if head is not None and assembly is not None and assembly.complete:
                    step = _incoming(head, assembly)
                    head = assembly = None
                    if self._pipeline.stage.cut.is_last:
                        self._pipeline.arrive(step)
                    else:
                        task = asyncio.create_task(self._pipeline.pass_on(step, send_back))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()


def _incoming(head: stage_pb2.Step, assembly: Assembly) -> IncomingStep:
    return IncomingStep(
        key=StepKey.of(head.key),
        input=StepInput(
            input=from_bytes(assembly.shape, assembly.dtype, assembly.data),
            attention_mask=from_message(head.attention_mask) if head.HasField("attention_mask") else None,
            position_ids=from_message(head.position_ids).long(),
            use_cache=head.use_cache,
        ),
        reset_cache=head.reset_cache,
    )


class _InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, pipeline: StagePipeline) -> None:
        self._pipeline = pipeline

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        session = _Session(self._pipeline)
        try:
            async for response in _generate(self._pipeline, session, request):
                yield response
        except Exception as error:
            await _abort(context, error)
        finally:
            session.end()

    async def Forward(
        self, request_iterator: AsyncIterator[inference_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.ForwardResponse]:
        session = _Session(self._pipeline)
        past, batch = 0, 0
        try:
            async for request in request_iterator:
                step = _forward_step(request, past, self._pipeline.stage)
                if past and (step.input.shape[0] != batch or not step.use_cache):
                    raise InvalidRequestError(
                        f"this session keeps {past} tokens of {batch} rows: its passes need as many rows, and use_cache"
                    )
                batch = step.input.shape[0]
                forward = Forward(
                    input=step, logits_to_keep=request.logits_to_keep, reset_cache=step.use_cache and not past
                )
                logits = await session.forward(forward)
                past += step.input.shape[1] if step.use_cache else 0
                head, rest = await self._pipeline.run(lambda passed=logits: to_frames(passed))  # type: ignore[misc]
                yield inference_pb2.ForwardResponse(logits=head)
                for frame in rest:
                    yield inference_pb2.ForwardResponse(more=frame)
        except Exception as error:
            await _abort(context, error)
        finally:
            session.end()


class _Session:
    """One sequence batch's passes through the ring, numbered."""

    def __init__(self, pipeline: StagePipeline) -> None:
        self._pipeline = pipeline
        self._name = uuid.uuid4().hex
        self._number = 0

    async def forward(self, forward: Forward) -> torch.Tensor:
        key = StepKey(self._name, 0, self._number)
        self._number += 1
        return await self._pipeline.forward(
            key, forward.input, reset_cache=forward.reset_cache, logits_to_keep=forward.logits_to_keep
        )

    @property
    def cache(self) -> object:
        """This stage's cache as transformers sees it, or None."""
        cache = self._pipeline.cache(self._name)
        return None if cache is None else cache.cache

    def end(self) -> None:
        self._pipeline.finish_session(self._name)


async def _generate(
    pipeline: StagePipeline, session: _Session, request: inference_pb2.GenerateRequest
) -> AsyncIterator[inference_pb2.GenerateResponse]:
    input_ids = check_ids("input_ids", from_message(request.input_ids))
    attention_mask = _mask(request.attention_mask) if request.HasField("attention_mask") else None
    model = pipeline.stage.model
    decoding = await pipeline.run(
        lambda: Decoding(
            model,
            input_ids,
            attention_mask,
            MessageToDict(request.generation),
            seed=request.seed if request.HasField("seed") else None,
            output_logits=request.output_logits,
            output_scores=request.output_scores,
        )
    )
    yield inference_pb2.GenerateResponse(
        accepted=inference_pb2.PromptAccepted(batch=decoding.rows, prompt_tokens=decoding.prompt_tokens)
    )
    for forward in await pipeline.run(decoding.prefill):
        logits = await session.forward(forward)
    while True:
        step = await pipeline.run(lambda passed=logits: _advance(decoding, passed, session))  # type: ignore[misc]
        for response in step.responses:
            yield response
        if step.next is None:
            break
        logits = await session.forward(step.next)
    yield inference_pb2.GenerateResponse(
        finished=inference_pb2.GenerationFinished(
            new_tokens=decoding.new_tokens, reason="stop" if decoding.stopped_early else "length"
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Advanced:
    """What to tell of a step, and the next pass, if there is one."""

    responses: list[inference_pb2.GenerateResponse]
    next: Forward | None


def _advance(decoding: Decoding, logits: torch.Tensor, session: _Session) -> _Advanced:
    """Chooses the next tokens and prepares their pass, in one turn on the computing thread.

    The bytes of tensors that don't fit one message follow it, the logits' first.
    """
    step = decoding.advance(logits)
    message = inference_pb2.GeneratedStep(token_ids=step.tokens)
    later: list[inference_pb2.GenerateResponse] = []
    for tensor, field in ((step.logits, message.logits), (step.scores, message.scores)):
        if tensor is not None:
            head, rest = to_frames(tensor)
            field.CopyFrom(head)
            later += [inference_pb2.GenerateResponse(more=frame) for frame in rest]
    return _Advanced(
        responses=[inference_pb2.GenerateResponse(step=message), *later],
        next=None if step.finished else decoding.next_forward(session.cache),
    )


def _forward_step(request: inference_pb2.ForwardRequest, past: int, stage: ResidentStage) -> StepInput:
    input_ids = check_ids("input_ids", from_message(request.input_ids))
    batch, length = input_ids.shape
    attention_mask = _mask(request.attention_mask) if request.HasField("attention_mask") else None
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
        raise InvalidRequestError(
            f"attention_mask has shape {list(attention_mask.shape)}; past and new tokens need {[batch, past + length]}"
        )
    if request.HasField("position_ids"):
        position_ids = check_ids("position_ids", from_message(request.position_ids))
        if position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
            raise InvalidRequestError(
                f"position_ids has shape {list(position_ids.shape)}; the new tokens need {[batch, length]}"
            )
    else:
        position_ids = stage.positions(attention_mask, past, length)
    return StepInput(
        input=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=request.use_cache
    )


def _mask(message: Tensor) -> torch.Tensor:
    return check_ids("attention_mask", from_message(message))


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    ours = to_error(error)
    if ours is not error:
        logger.exception("request failed")
    await abort(context, ours)
