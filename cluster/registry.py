"""The models of one cluster: loading, known, gone. The workers are its memory; this is what it knows of them now."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import (
    LoadCancelledError,
    ModelNameTakenError,
    ModelNotFoundError,
    ModelUnavailableError,
    ShardliftError,
    WorkerDiedError,
    one_line,
)
from ..worker.records import SourceSpec
from ..worker.spec import LoadReport, StageSpec
from . import loads, requests
from .placement import Placement, call, find_placements, place, place_again
from .planning import OutlinedModel, PlannedModel, outline_model
from .route import Route
from .seen_speeds import SeenSpeeds
from .tokenizer import Tokenizer
from .topology import discover

logger = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT_S = 30.0
_CHECK_TIMEOUT_S = 10.0
# Progress that nobody reads is dropped beyond this; what must arrive is told all the same.
_MAX_WAITING_EVENTS = 1000
_MAX_WAITING_PIECES = 64  # of a timeline, a MiB each


@dataclass
class Entry:
    """A model in the registry."""

    info: registry_pb2.ModelInfo
    placement: Placement
    source: SourceSpec | None = None
    load: asyncio.Task[None] | None = None
    route: Route | None = None
    tokenizer: Tokenizer | None = None
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)
    discarding: asyncio.Task[None] | None = None
    checking: asyncio.Task[None] | None = None
    is_listened_to: bool = True


class Registry:
    """Loads, finds and unloads models. All methods run on one event loop.

    `on_change(name, state)` is told of each new state of a model.
    """

    def __init__(self, on_change: Callable[[str, int], None] = lambda name, state: None) -> None:
        self._entries: dict[str, Entry] = {}
        self._on_change = on_change
        self._speeds = SeenSpeeds()
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
            reason = f": {entry.info.reason}" if entry.info.reason else ""
            raise ModelUnavailableError(f"model {name} is {state}{reason}")
        return entry.route

    async def tokenizer(self, name: str) -> Tokenizer:
        """The model's tokenizer, read at its first use. Raises InvalidRequestError where it has none."""
        entry = self._entry(name)
        async with entry.tokenizing:
            if entry.tokenizer is None:
                assert entry.source is not None
                entry.tokenizer = await asyncio.to_thread(Tokenizer, entry.source, None)
        return entry.tokenizer

    def serves(self, route: Route) -> bool:
        """Whether the model behind `route` is to stay: not unloaded, and not being so."""
        return any(entry.route is route and entry.discarding is None for entry in self._entries.values())

    def doubt(self, name: str) -> None:
        """A call to the model failed: finds out whether the model still answers, and says so from then on."""
        entry = self._entries.get(name)
        if entry is not None and entry.checking is None and entry.info.state == registry_pb2.MODEL_STATE_READY:
            entry.checking = asyncio.create_task(self._check(entry))

    async def _check(self, entry: Entry) -> None:
        assert entry.route is not None
        try:
            await entry.route.canary(_CHECK_TIMEOUT_S)
        except ShardliftError as error:
            if entry.info.state == registry_pb2.MODEL_STATE_READY:
                entry.info.reason = f"{one_line(error)} (unload it, and load it again)"
                self._set_state(entry, registry_pb2.MODEL_STATE_UNAVAILABLE)
        finally:
            entry.checking = None

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self._entries)) or "none"
            raise ModelNotFoundError(f"no model is called {name!r} here; loaded: {known}")
        return entry

    def _set_state(self, entry: Entry, state: registry_pb2.ModelState) -> None:
        entry.info.state = state
        self._on_change(entry.info.name, state)

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions) -> registry_pb2.Plan:
        outlined = await _outline(source, options)
        speeds = requests.given_speeds(options, self._speeds.of(outlined.checkpoint.source))
        async with self._placing:  # both may hold GPUs for a moment, to learn which are free
            return (await self._spread(outlined, options)).plan.to_message(speeds)

    async def _spread(self, outlined: OutlinedModel, options: registry_pb2.LoadOptions) -> PlannedModel:
        held = {f"{stage.node}/{stage.device}" for entry in self._entries.values() for stage in entry.info.plan.stages}
        return await asyncio.to_thread(lambda: outlined.spread(requests.plan_options(options), discover(held)))

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load(self, request: registry_pb2.LoadModelRequest) -> AsyncIterator[registry_pb2.LoadModelResponse]:
        """Loads a model and tells what happens; the last event is `ready`.

        A failure, or the end of whoever listens, frees all that the load has taken.
        """
        name = requests.model_name(request.name, request.source.path)
        if name in self._entries:
            raise ModelNameTakenError(f"a model called {name} is here already: unload it, or choose another name")
        entry = Entry(
            info=registry_pb2.ModelInfo(name=name, path=request.source.path),
            placement=Placement(model=name, load_id=uuid.uuid4().hex),
        )
        self._entries[name] = entry
        self._set_state(entry, registry_pb2.MODEL_STATE_LOADING)
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None] = asyncio.Queue()
        entry.load = asyncio.create_task(self._load(entry, request, events))
        entry.load.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            if entry.load.cancelled():
                raise LoadCancelledError(f"loading {name} was cancelled by an unload")
            entry.load.result()
        finally:
            entry.is_listened_to = False
            if entry.info.state != registry_pb2.MODEL_STATE_READY:
                await self._discard(entry)

    async def _load(
        self,
        entry: Entry,
        request: registry_pb2.LoadModelRequest,
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None],
    ) -> None:
        started = time.monotonic()
        name, placement, info = entry.info.name, entry.placement, entry.info
        token = requests.access_token(request.source)
        transfer = requests.transfer_options(request.options)
        secret = secrets.token_urlsafe(32)

        def tell(**event: Any) -> None:
            events.put_nowait(registry_pb2.LoadModelResponse(**event))

        def tell_progress(progress: registry_pb2.StageProgress) -> None:
            if progress.done or events.qsize() < _MAX_WAITING_EVENTS:
                tell(progress=progress)

        outlined = await _outline(request.source, request.options)
        entry.source = outlined.checkpoint.source
        info.config_json = json.dumps(dict(outlined.config))
        info.generation_config_json = json.dumps(outlined.checkpoint.generation_config or {})
        tell(started=registry_pb2.LoadStarted(name=name, commit=entry.source.commit))
        async with self._placing:
            planned = await self._spread(outlined, request.options)
            speeds = requests.given_speeds(request.options, self._speeds.of(entry.source))
            info.plan.CopyFrom(planned.plan.to_message(speeds))
            tell(planned=info.plan)
            specs = planned.specs(name, placement.load_id, secret, transfer)
            await place(planned.plan, specs, info.SerializeToString(), placement)

        async def tell_place(index: int) -> None:
            stage = info.plan.stages[index]
            stage.device = await loads.actual_device(placement.workers[index], index, stage.device)
            tell(placed=registry_pb2.StagePlaced(stage=index, node=stage.node, device=stage.device))

        respawns: Counter[int] = Counter()

        async def respawn(index: int, error: WorkerDiedError) -> None:
            tell(warning=f"{one_line(error)}; another one loads its part anew")
            respawns[index] += 1
            await place_again(planned.plan, specs[index], info.SerializeToString(), placement, respawns[index])

        reports = await loads.load_stages(placement.workers, specs, token, tell_progress, tell_place, respawn)
        addresses = [report.address for report in reports]
        await loads.join_ring(placement.workers, addresses)
        entry.route = Route(addresses[-1], secret)
        await entry.route.canary()
        entry.tokenizer = await loads.tokenizer_or_none(entry.source, token)
        info.residency.extend(loads.residency(index, report) for index, report in enumerate(reports))
        self._speeds.learn(entry.source, [stage.device for stage in planned.plan.stages], reports)
        info.load_seconds = time.monotonic() - started
        # The workers first: ready is what a restarted controller would find ready.
        ready = registry_pb2.ModelInfo()
        ready.CopyFrom(info)
        ready.state = registry_pb2.MODEL_STATE_READY
        card = ready.SerializeToString()
        await asyncio.gather(*(call(worker.set_card.remote(card), "a stage") for worker in placement.workers))
        self._set_state(entry, registry_pb2.MODEL_STATE_READY)
        if transfer.trace:
            try:
                async for piece in loads.traces(placement.workers):
                    tell(trace=piece)
                    while events.qsize() > _MAX_WAITING_PIECES and entry.is_listened_to:
                        await asyncio.sleep(0.05)
            except Exception as error:
                # The model is there; its trace is not worth losing it.
                tell(warning=f"the timeline is incomplete: {one_line(error)}")
        tell(ready=info)

    # -- unloading -------------------------------------------------------------------------------------------------

    async def unload(self, name: str) -> None:
        """Frees a model, or ends its load. Returns once Ray has everything back."""
        await self._discard(self._entry(name))

    async def _discard(self, entry: Entry) -> None:
        """Frees what an entry holds; whoever else asks for it waits for the same end."""
        if entry.discarding is None:
            entry.discarding = asyncio.create_task(self._free(entry))
        await asyncio.shield(entry.discarding)

    async def _free(self, entry: Entry) -> None:
        self._set_state(entry, registry_pb2.MODEL_STATE_UNLOADING)
        tasks = [task for task in (entry.load, entry.checking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The workers before the route: they tell those who wait for an answer why there will be none.
        await entry.placement.free()
        if entry.route is not None:
            await entry.route.close()
        if self._entries.get(entry.info.name) is entry:
            del self._entries[entry.info.name]
        self._on_change(entry.info.name, registry_pb2.MODEL_STATE_UNSPECIFIED)

    async def close(self, *, unload: bool) -> None:
        """Leaves the registry. Models stay resident for the next one, unless `unload`; loads under way end."""
        for entry in list(self._entries.values()):
            if unload or entry.info.state not in (
                registry_pb2.MODEL_STATE_READY,
                registry_pb2.MODEL_STATE_UNAVAILABLE,
            ):
                await self._discard(entry)
            elif entry.route is not None:
                await entry.route.close()

    # -- after a restart -------------------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Finds the models that workers hold; frees what an interrupted load has left. To be called before serving."""
        await asyncio.gather(*(self._recover(placement) for placement in await find_placements()))

    async def _recover(self, placement: Placement) -> None:
        try:
            entry = await self._recognize(placement)
        except Exception as error:
            # Whatever it is, a gateway that can't start would be worse.
            logger.warning("freeing what is left of %s: %s", placement.model, one_line(error))
            await placement.free()
            return
        self._entries[entry.info.name] = entry
        self._on_change(entry.info.name, entry.info.state)

    async def _recognize(self, placement: Placement) -> Entry:
        answers = await asyncio.wait_for(
            asyncio.gather(*(call(worker.describe.remote(), "a stage") for worker in placement.workers)),
            timeout=_DESCRIBE_TIMEOUT_S,
        )
        stages: dict[int, tuple[Any, StageSpec, LoadReport]] = {}
        info = registry_pb2.ModelInfo()
        for worker, (fields, card, report, joined) in zip(placement.workers, answers, strict=True):
            spec = StageSpec.from_json({**fields, "records": [], "versions": {}})
            if report is None or not joined:
                raise ModelUnavailableError(f"stage {spec.index} never finished loading")
            stages[spec.index] = (worker, spec, report)
            info.ParseFromString(card)
        if not stages or info.state != registry_pb2.MODEL_STATE_READY:
            raise ModelUnavailableError("it never became ready")
        _, spec, _ = next(iter(stages.values()))
        loads.check_complete(list(stages), spec)
        placement.workers = [stages[index][0] for index in sorted(stages)]
        route = Route(stages[spec.num_stages - 1][2].address, spec.secret)
        try:
            await route.canary()
        except BaseException:
            await route.close()
            raise
        return Entry(info=info, placement=placement, source=spec.source, route=route)


async def _outline(source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions) -> OutlinedModel:
    return await asyncio.to_thread(
        lambda: outline_model(
            requests.checkpoint_request(source), requests.access_token(source), requests.model_options(options)
        )
    )
