"""The models of one cluster: loading, known, gone. The workers are its memory; this is what it knows of them now."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from ..proto.v1 import inference_pb2, inference_pb2_grpc, registry_pb2
from ..proto.v1.errors import (
    InternalError,
    LoadCancelledError,
    ModelNameTakenError,
    ModelNotFoundError,
    ModelUnavailableError,
    ShardliftError,
    one_line,
)
from ..proto.v1.status import from_rpc_error, to_error
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import CHANNEL_OPTIONS
from ..worker.records import HubToken, SourceSpec
from ..worker.service import SECRET_HEADER
from ..worker.spec import LoadReport, StageSpec
from . import requests
from .placement import Placement, call, find_placements, place
from .planning import PlannedModel, plan_model
from .tokenizer import Tokenizer
from .topology import discover

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.25
_CANARY_TIMEOUT_S = 120.0


@dataclass
class Entry:
    """A model in the registry."""

    info: registry_pb2.ModelInfo
    placement: Placement
    source: SourceSpec | None = None
    load: asyncio.Task[Any] | None = None
    cancelled: bool = False
    route: Route | None = None
    tokenizer: Tokenizer | None = None
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Route:
    """The way to a resident model: a channel to its last stage."""

    def __init__(self, address: str, secret: str) -> None:
        self.address = address
        self.metadata = [(SECRET_HEADER, secret)]
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def canary(self) -> None:
        """One token through every stage. Raises what stands in its way."""

        async def one_token() -> AsyncIterator[inference_pb2.ForwardRequest]:
            ids = Tensor(shape=[1, 1], dtype="int64", data=bytes(8))
            yield inference_pb2.ForwardRequest(input_ids=ids, logits_to_keep=1, use_cache=True)

        try:
            answers = self.stub.Forward(one_token(), metadata=self.metadata, timeout=_CANARY_TIMEOUT_S)
            async for answer in answers:
                if answer.WhichOneof("part") == "logits":
                    return
        except grpc.aio.AioRpcError as error:
            raise stage_error(error, self.address) from None
        raise InternalError("the canary came back without logits")

    async def close(self) -> None:
        await self._channel.close(None)


def stage_error(error: grpc.aio.AioRpcError, address: str) -> Exception:
    """What a failed call to a stage means to a client: that the model, not the gateway, is unavailable."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "ErrorInfo" not in str(error.trailing_metadata()):
        return ModelUnavailableError(f"the model's last stage at {address} doesn't answer: {error.details()}")
    return from_rpc_error(error, address)


class Registry:
    """Loads, finds and unloads models. All methods run on one event loop.

    `on_change(name, ready)` is told when a model becomes ready or stops being so.
    """

    def __init__(self, on_change: Any = lambda name, ready: None) -> None:
        self._entries: dict[str, Entry] = {}
        self._on_change = on_change
        # What one load counts on as free must not be given to another before it is taken.
        self._placing = asyncio.Lock()

    # -- questions -------------------------------------------------------------------------------------------------

    def models(self) -> list[registry_pb2.ModelInfo]:
        return [self._entries[name].info for name in sorted(self._entries)]

    def model(self, name: str) -> registry_pb2.ModelInfo:
        return self._entry(name).info

    def route(self, name: str) -> Route:
        """Raises ModelNotFoundError, and ModelUnavailableError for a model that isn't ready."""
        entry = self._entry(name)
        if entry.route is None or entry.info.state != registry_pb2.MODEL_STATE_READY:
            state = registry_pb2.ModelState.Name(entry.info.state).removeprefix("MODEL_STATE_").lower()
            raise ModelUnavailableError(
                f"model {name} is {state}{f': {entry.info.reason}' if entry.info.reason else ''}"
            )
        return entry.route

    async def tokenizer(self, name: str) -> Tokenizer:
        """The model's tokenizer, read at its first use. Raises InvalidRequestError where it has none."""
        entry = self._entry(name)
        async with entry.tokenizing:
            if entry.tokenizer is None:
                assert entry.source is not None
                entry.tokenizer = await asyncio.to_thread(Tokenizer, entry.source, None)
        return entry.tokenizer

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise ModelNotFoundError(f"no model is called {name!r} here; loaded: {known}")
        return entry

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions) -> registry_pb2.Plan:
        planned = await self._plan(source, options)
        return planned.plan.to_message()

    async def _plan(self, source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions) -> PlannedModel:
        return await asyncio.to_thread(
            lambda: plan_model(
                requests.checkpoint_request(source),
                requests.access_token(source),
                requests.model_options(options),
                requests.plan_options(options),
                discover(),
            )
        )

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load(self, request: registry_pb2.LoadModelRequest) -> AsyncIterator[registry_pb2.LoadModelResponse]:
        """Loads a model and tells what happens; the last event is `ready`.

        A failure, or the end of whoever listens, frees all that the load has taken.
        """
        name = requests.model_name(request.name, request.source.path)
        if name in self._entries:
            raise ModelNameTakenError(f"a model called {name} is here already: unload it, or choose another name")
        entry = Entry(
            info=registry_pb2.ModelInfo(name=name, state=registry_pb2.MODEL_STATE_LOADING, path=request.source.path),
            placement=Placement(model=name, load_id=uuid.uuid4().hex),
        )
        self._entries[name] = entry
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None] = asyncio.Queue()
        entry.load = asyncio.create_task(self._load(entry, request, events))
        entry.load.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await entry.load
        except asyncio.CancelledError:
            if entry.cancelled:
                raise LoadCancelledError(f"loading {name} was cancelled by unload") from None
            raise
        finally:
            if entry.info.state != registry_pb2.MODEL_STATE_READY:
                await asyncio.shield(asyncio.create_task(self._discard(entry)))

    async def _load(
        self,
        entry: Entry,
        request: registry_pb2.LoadModelRequest,
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None],
    ) -> None:
        started = time.monotonic()
        name, placement = entry.info.name, entry.placement
        token = requests.access_token(request.source)
        secret = secrets.token_urlsafe(32)
        async with self._placing:
            planned = await self._plan(request.source, request.options)
            entry.source = planned.checkpoint.source
            plan = planned.plan.to_message()
            entry.info.plan.CopyFrom(plan)
            entry.info.config_json = json.dumps(dict(planned.config))
            entry.info.generation_config_json = json.dumps(planned.checkpoint.generation_config or {})
            events.put_nowait(
                registry_pb2.LoadModelResponse(started=registry_pb2.LoadStarted(name=name, commit=plan.commit))
            )
            events.put_nowait(registry_pb2.LoadModelResponse(planned=plan))
            specs = planned.specs(name, placement.load_id, secret)
            await place(planned.plan, specs, entry.info.SerializeToString(), placement)
            for index, worker in enumerate(placement.workers):
                stage = entry.info.plan.stages[index]
                stage.device = await _device(worker, index, stage.device)
                placed = registry_pb2.StagePlaced(stage=index, node=stage.node, device=stage.device)
                events.put_nowait(registry_pb2.LoadModelResponse(placed=placed))
        reports = await _load_stages(placement.workers, specs, token, events)
        addresses = [report.address for report in reports]
        for index, worker in enumerate(placement.workers):
            await call(worker.join.remote(addresses[(index + 1) % len(addresses)]), f"stage {index}")
        entry.route = Route(addresses[-1], secret)
        await entry.route.canary()
        entry.tokenizer = await _tokenizer_or_none(entry.source, token)
        entry.info.residency.extend(_residency(index, report) for index, report in enumerate(reports))
        entry.info.load_seconds = time.monotonic() - started
        entry.info.state = registry_pb2.MODEL_STATE_READY
        card = entry.info.SerializeToString()
        await asyncio.gather(*(call(worker.set_card.remote(card), "a stage") for worker in placement.workers))
        self._on_change(name, True)
        events.put_nowait(registry_pb2.LoadModelResponse(ready=entry.info))

    # -- unloading -------------------------------------------------------------------------------------------------

    async def unload(self, name: str) -> None:
        """Frees a model, or ends its load. Returns once Ray has everything back."""
        entry = self._entry(name)
        entry.info.state = registry_pb2.MODEL_STATE_UNLOADING
        self._on_change(name, False)
        if entry.load is not None and not entry.load.done():
            entry.cancelled = True
            entry.load.cancel()
            await asyncio.gather(entry.load, return_exceptions=True)
        await asyncio.shield(asyncio.create_task(self._discard(entry)))

    async def _discard(self, entry: Entry) -> None:
        if entry.load is not None and not entry.load.done():
            entry.load.cancel()
            await asyncio.gather(entry.load, return_exceptions=True)
        if entry.route is not None:
            await entry.route.close()
        await entry.placement.free()
        if self._entries.get(entry.info.name) is entry:
            del self._entries[entry.info.name]

    async def close(self, *, unload: bool) -> None:
        """Leaves the registry. Models stay resident for the next one, unless `unload`; loads under way end."""
        for entry in list(self._entries.values()):
            if unload or entry.info.state != registry_pb2.MODEL_STATE_READY:
                await self._discard(entry)
            elif entry.route is not None:
                await entry.route.close()

    # -- after a restart -------------------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Finds the models that workers hold; frees what an interrupted load has left."""
        for placement in await find_placements():
            try:
                entry = await self._recognize(placement)
            except (ShardliftError, grpc.aio.AioRpcError, TimeoutError, asyncio.TimeoutError) as error:
                logger.warning("freeing what is left of %s: %s", placement.model, one_line(error))
                await placement.free()
                continue
            self._entries[entry.info.name] = entry
            self._on_change(entry.info.name, True)

    async def _recognize(self, placement: Placement) -> Entry:
        answers = await asyncio.wait_for(
            asyncio.gather(*(call(worker.describe.remote(), "a stage") for worker in placement.workers)), timeout=30
        )
        stages: dict[int, tuple[Any, StageSpec, LoadReport]] = {}
        info = registry_pb2.ModelInfo()
        for worker, (fields, card, report, joined) in zip(placement.workers, answers, strict=True):
            spec = StageSpec.from_json({**fields, "records": [], "versions": {}})
            if report is None or not joined:
                raise ModelUnavailableError(f"stage {spec.index} never finished loading")
            stages[spec.index] = (worker, spec, report)
            info.ParseFromString(card)
        _, spec, _ = next(iter(stages.values()))
        if sorted(stages) != list(range(spec.num_stages)) or info.state != registry_pb2.MODEL_STATE_READY:
            raise ModelUnavailableError(f"only stages {sorted(stages)} of {spec.num_stages} are left")
        placement.workers = [stages[index][0] for index in sorted(stages)]
        route = Route(stages[spec.num_stages - 1][2].address, spec.secret)
        await route.canary()
        return Entry(info=info, placement=placement, source=spec.source, route=route)


async def _device(worker: Any, index: int, planned: str) -> str:
    """Ray chooses among a node's GPUs; the map tells which one it was."""
    actual = await call(worker.device.remote(), f"stage {index}")
    return actual if actual.startswith("cuda") else planned


async def _load_stages(
    workers: list[Any],
    specs: list[StageSpec],
    token: HubToken,
    events: asyncio.Queue[registry_pb2.LoadModelResponse | None],
) -> list[LoadReport]:
    """Loads all stages at once, telling how far each is. The first failure is raised."""
    loads = [
        asyncio.ensure_future(call(worker.load.remote(token), f"stage {index}")) for index, worker in enumerate(workers)
    ]
    pending: set[asyncio.Future[Any]] = set(loads)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_PROGRESS_INTERVAL_S, return_when=asyncio.FIRST_EXCEPTION
            )
            for load in done:
                load.result()
            for index, (worker, spec, load) in enumerate(zip(workers, specs, loads, strict=True)):
                if load in done or load in pending:
                    events.put_nowait(await _progress(index, worker, spec, load))
        return [load.result() for load in loads]
    finally:
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)


async def _progress(
    index: int, worker: Any, spec: StageSpec, load: asyncio.Future[LoadReport]
) -> registry_pb2.LoadModelResponse:
    progress = registry_pb2.StageProgress(stage=index, fetch_bytes=spec.fetch_bytes, tensors=len(spec.records))
    if load.done():
        report = load.result()
        progress.fetched_bytes, progress.tensors_loaded = report.fetched_bytes, len(spec.records)
        progress.resident_bytes, progress.done = report.measured_bytes, True
    else:
        with contextlib.suppress(ModelUnavailableError):
            progress.fetched_bytes, progress.tensors_loaded = await call(worker.progress.remote(), f"stage {index}")
    return registry_pb2.LoadModelResponse(progress=progress)


def _residency(index: int, report: LoadReport) -> registry_pb2.StageResidency:
    return registry_pb2.StageResidency(
        stage=index,
        measured_bytes=report.measured_bytes,
        fetched_bytes=report.fetched_bytes,
        modules=[
            registry_pb2.ModuleResidency(
                module=module.module, dtype=module.dtype, bytes=module.size_bytes, device=module.device
            )
            for module in report.modules
        ],
    )


async def _tokenizer_or_none(source: SourceSpec, token: HubToken) -> Tokenizer | None:
    """Read now, while the token is at hand. A checkpoint may well have none: a text request will say so."""
    try:
        return await asyncio.to_thread(Tokenizer, source, token)
    except ShardliftError as error:
        logger.info("no tokenizer: %s", one_line(error))
        return None
    except Exception as error:
        logger.warning("no tokenizer: %s", to_error(error))
        return None
