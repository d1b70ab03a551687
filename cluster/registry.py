"""The models of one cluster: loading, known, gone. The workers are its memory; this is what it knows of them now."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..proto.v1 import inference_pb2, registry_pb2
from ..proto.v1.errors import (
    GatewayUnavailableError,
    InvalidDeviceMapError,
    InvalidRequestError,
    LoadCancelledError,
    ModelBusyError,
    ModelNameTakenError,
    ModelNotFoundError,
    ModelUnavailableError,
    OutOfMemoryError,
    WorkerDiedError,
    one_line,
)
from ..worker import logs, tracing
from ..worker.adapter_spec import AttachedAdapter
from ..worker.adapters import check_adapter_name
from ..worker.records import SourceSpec
from ..worker.spec import LoadReport, StageSpec
from . import adapters, loads, nodes, requests
from .adapter_room import kv_tokens_beside
from .adapters import OutlinedPath
from .devices import as_seen_by_worker
from .draining import Registered, drain
from .events import Events, GatewayNumbers, state_name
from .gateway_options import GatewayOptions
from .nodes import Node
from .placement import Placement, Seat, call, find_placements, kill, leave_unused, place, place_again
from .planning import OutlinedModel, PlannedModel
from .resident import Resident
from .route import Route
from .seen_speeds import SeenSpeeds
from .tokenizer import Tokenizer
from .topology import discover

logger = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT_S = 30.0
# A recovery that another loss interrupts begins again at once, so many times; then more and more slowly.
_HASTY_TRIES = 3
_RETRY_S = 1.0
_MOST_RETRY_S = 10.0
# Progress that nobody reads is dropped beyond this; what must arrive is told all the same.
_MAX_WAITING_EVENTS = 1000
# Nodes that Ray is ending are asked for so often; a move that didn't work is tried again so much later.
_FOLLOW_S = 2.0
_AGAIN_S = 15.0
_SWITCH_POLL_S = 0.05
_MAX_WAITING_PIECES = 64  # of a timeline, a MiB each


@dataclass
class Entry:
    """A model in the registry."""

    info: registry_pb2.ModelInfo
    placement: Placement
    source: SourceSpec | None = None
    load: asyncio.Task[None] | None = None
    resident: Resident | None = None
    tokenizer: Tokenizer | None = None
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)
    discarding: asyncio.Task[None] | None = None
    recovering: asyncio.Task[None] | None = None
    # The first try of a recovery, for those who wait for it.
    attempt: asyncio.Future[None] | None = None
    is_listened_to: bool = True
    # How many calls and sessions compute with each adapter.
    adapter_uses: Counter[str] = field(default_factory=Counter)
    # One change of the adapters at a time.
    adapting: asyncio.Lock = field(default_factory=asyncio.Lock)
    changes: set[asyncio.Task[None]] = field(default_factory=set)
    # How far each stage's load is, and since when it goes on.
    progress: dict[int, registry_pb2.StageProgress] = field(default_factory=dict)
    begun_s: float = field(default_factory=time.monotonic)

    @property
    def route(self) -> Route | None:
        return None if self.resident is None else self.resident.route

    @property
    def load_seconds(self) -> float:
        """How long the load took, or has taken until now."""
        if self.info.state == registry_pb2.MODEL_STATE_LOADING:
            return time.monotonic() - self.begun_s
        return self.info.load_seconds


class Registry:
    """Loads, finds and unloads models. All methods run on one event loop.

    `on_change(name, state)` is told of each new state of a model. options: of the gateway in front of it.
    """

    def __init__(
        self,
        on_change: Callable[[str, int], None] = lambda name, state: None,
        options: GatewayOptions = GatewayOptions(),  # noqa: B008 - a value
    ) -> None:
        self._options = options
        self.events = Events()
        self.numbers = GatewayNumbers()
        self._entries: dict[str, Entry] = {}
        self._on_change = on_change
        self._speeds = SeenSpeeds()
        # What one load counts on as free must not be given to another before it is taken.
        self._placing = asyncio.Lock()
        # Two nodes that are drained at once must not get each other's stages.
        self._draining = asyncio.Lock()
        # Names, by their ids, as last asked for.
        self._drained: dict[str, str] = {}
        self._following: asyncio.Task[None] | None = None
        self._is_closed = False

    # -- questions -------------------------------------------------------------------------------------------------

    def models(self) -> list[registry_pb2.ModelInfo]:
        return [self._told(self._entries[name]) for name in sorted(self._entries)]

    def entries(self) -> list[Entry]:
        return [self._entries[name] for name in sorted(self._entries)]

    def has(self, name: str) -> bool:
        return name in self._entries

    def model(self, name: str) -> registry_pb2.ModelInfo:
        return self._told(self._entry(name))

    def _told(self, entry: Entry) -> registry_pb2.ModelInfo:
        seats = {seat.node_id: None for seat in entry.placement.seats}
        entry.info.drained_nodes[:] = [self._drained[node_id] for node_id in seats if node_id in self._drained]
        return entry.info

    def route(self, name: str) -> Route:
        """Raises ModelNotFoundError, and ModelUnavailableError for a model that isn't ready."""
        entry = self._entry(name)
        if entry.route is None or entry.info.state != registry_pb2.MODEL_STATE_READY:
            state = state_name(entry.info.state)
            reason = f": {entry.info.reason}" if entry.info.reason else ""
            raise ModelUnavailableError(f"model {name} is {state}{reason}")
        return entry.route

    async def tokenizer(self, name: str) -> Tokenizer:
        """The model's tokenizer, read at its first use. Raises InvalidRequestError where it has none."""
        entry = self._entry(name)
        async with entry.tokenizing:
            if entry.tokenizer is None:
                assert entry.source is not None
                trusted = entry.resident is not None and entry.resident.trust_remote_code
                entry.tokenizer = await asyncio.to_thread(Tokenizer, entry.source, None, trusted)
        return entry.tokenizer

    async def ready_route(self, name: str) -> Route:
        """As `route`, but waits for a lost stage that is being brought back."""
        entry = self._entry(name)
        if entry.attempt is not None:
            await asyncio.shield(entry.attempt)
        return self.route(name)

    async def ready_resident(self, name: str) -> Resident:
        """The stages of a model that is ready, as `ready_route`."""
        await self.ready_route(name)
        resident = self._entry(name).resident
        assert resident is not None
        return resident

    async def next_route(self, name: str, failed: Route) -> Route:
        """The route after a call over `failed` has failed: has the model looked after, and waits until it is well.

        Raises ModelUnavailableError where it was unloaded, or does not get well for now.
        """
        if self._is_closed:
            # Not the model's fault: who asks another gateway, or the next one here, is answered.
            raise GatewayUnavailableError("the gateway is stopping: ask again, or another one")
        entry = next((entry for entry in self._entries.values() if entry.info.name == name), None)
        if entry is None or entry.discarding is not None:
            # Whichever of its stages went first, this is why.
            raise ModelUnavailableError(f"model {name} was unloaded")
        if entry.route is failed:
            self._suspect(entry)
        return await self.ready_route(name)

    # -- adapters --------------------------------------------------------------------------------------------------

    def adapters(self, name: str, choice: inference_pb2.AdapterChoice | None) -> tuple[str, ...]:
        """The adapters that a request to the model means: those of its `choice`, or the model's own.

        Raises ModelNotFoundError, ModelUnavailableError, and InvalidRequestError for one that isn't there.
        """
        entry = self._entry(name)
        if choice is None or not choice.names:
            return tuple(entry.info.default_adapters) if choice is None else ()
        if entry.resident is None:
            self.route(name)  # says why
        known = [adapter.name for adapter in entry.info.adapters]
        if unknown := [each for each in choice.names if each not in known]:
            raise InvalidRequestError(
                f"model {name} has no adapter {unknown[0]!r}; loaded: {', '.join(known) or 'none'}"
            )
        return tuple(choice.names)

    @contextlib.contextmanager
    def using(self, name: str, adapters: Sequence[str]) -> Iterator[None]:
        """Within it, these adapters of the model can't be deleted."""
        uses = self._entry(name).adapter_uses
        uses.update(adapters)
        try:
            yield
        finally:
            uses.subtract(adapters)

    async def load_adapter(self, request: registry_pb2.LoadAdapterRequest) -> registry_pb2.ModelInfo:
        """Attaches an adapter to a resident model; to all of its stages, or to none.

        Where nobody waits for it any more, it is taken off again.
        """
        name = check_adapter_name(request.name or adapters.DEFAULT_NAME)
        entry = self._entry(request.model)
        await self.ready_route(request.model)
        is_wanted = [True]
        change = asyncio.create_task(self._attach(entry, name, request.source, is_wanted))
        await self._watched(entry, change, is_wanted)
        return entry.info

    async def _watched(self, entry: Entry, change: asyncio.Task[None], is_wanted: list[bool]) -> None:
        """Waits for `change`, which goes on to its end whatever becomes of this."""
        entry.changes.add(change)
        change.add_done_callback(entry.changes.discard)
        try:
            await asyncio.shield(change)
        except asyncio.CancelledError:
            if change.cancelled():
                raise ModelUnavailableError(f"model {entry.info.name} was unloaded") from None
            is_wanted[0] = False
            change.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _attach(
        self, entry: Entry, name: str, source: registry_pb2.ModelSource, is_wanted: Sequence[bool]
    ) -> None:
        resident = entry.resident
        assert resident is not None
        async with entry.adapting:
            if name in resident.adapters:
                raise InvalidRequestError(
                    f"model {entry.info.name} has an adapter {name!r} already: delete it, or choose another name"
                )
            token = requests.access_token(source)
            outlined = await asyncio.to_thread(adapters.outline, name, source, token, resident.base)
            try:
                await resident.attach(outlined, token)
            except WorkerDiedError as error:
                self._suspect(entry)
                raise ModelUnavailableError(
                    f"adapter {name} isn't attached, load it again: {one_line(error)}"
                ) from None
            if not is_wanted[0]:
                await resident.detach(name)

    async def delete_adapter(self, model: str, name: str) -> registry_pb2.ModelInfo:
        """Takes an adapter off. Raises ModelBusyError while requests or sessions compute with it."""
        entry = self._entry(model)
        await self.ready_route(model)
        change = asyncio.create_task(self._detach(entry, name))
        await self._watched(entry, change, [True])
        return entry.info

    async def _detach(self, entry: Entry, name: str) -> None:
        resident = entry.resident
        assert resident is not None
        async with entry.adapting:
            self.adapters(entry.info.name, inference_pb2.AdapterChoice(names=[name]))
            if uses := entry.adapter_uses[name]:
                raise ModelBusyError(
                    f"adapter {name} of model {entry.info.name} is in use by {uses} requests or sessions: delete it "
                    "when they have ended"
                )
            await resident.detach(name)

    # -- recovery --------------------------------------------------------------------------------------------------

    def _suspect(self, entry: Entry) -> None:
        """A stage may be lost: finds out, and brings it back."""
        if self._is_closed:
            return
        if entry.recovering is None and entry.discarding is None and entry.resident is not None:
            entry.attempt = asyncio.get_running_loop().create_future()
            self._set_state(entry, registry_pb2.MODEL_STATE_RECOVERING)
            entry.recovering = asyncio.create_task(self._recover_stages(entry, entry.resident, entry.attempt))

    async def _recover_stages(self, entry: Entry, resident: Resident, attempt: asyncio.Future[None]) -> None:
        """Tries until the model is well again; capacity may return at any time."""
        started, tries, name = time.monotonic(), 0, entry.info.name
        logs.note(model=name, load_id=entry.placement.load_id)
        span = tracing.span("recover", model=name)
        self._tell(entry, "stages-lost", "a stage doesn't answer; looking after it")
        lost: set[int] = set()
        try:
            while True:
                try:
                    lost |= set(await resident.restore(self._held, self._placing, span))
                    break
                except Exception as error:
                    tries += 1
                    logger.warning("model %s is not well yet: %s", name, one_line(error))
                    if isinstance(error, ModelUnavailableError) and tries < _HASTY_TRIES:
                        continue  # another stage was lost meanwhile
                    if entry.info.reason != one_line(error):
                        self._tell(entry, "unavailable", one_line(error), merge=True)
                    entry.info.reason = one_line(error)
                    self._set_state(entry, registry_pb2.MODEL_STATE_UNAVAILABLE)
                    _settle(attempt, ModelUnavailableError(f"model {name} is unavailable: {entry.info.reason}"))
                    await asyncio.sleep(min(_RETRY_S * tries, _MOST_RETRY_S))
            entry.info.reason = ""
            if lost:
                entry.info.recoveries += 1
                entry.info.recovery_seconds = time.monotonic() - started
                self.numbers.recovered(name, len(lost), entry.info.recovery_seconds)
                stages = ", ".join(map(str, sorted(lost)))
                took = f"{entry.info.recovery_seconds:.1f} s"
                self._tell(entry, "recovered", f"stage{'s'[: len(lost) > 1]} {stages} back after {took}")
            else:
                self._tell(entry, "recovered", "no stage was lost")
            entry.recovering = entry.attempt = None
            self._set_state(entry, registry_pb2.MODEL_STATE_READY)
            resident.watch(lambda _: self._suspect(entry))
            _settle(attempt, None)
        finally:
            _settle(attempt, ModelUnavailableError(f"model {name} was unloaded"))
            span.note(stages=sorted(lost), tries=tries)
            span.end()

    def _tell(self, entry: Entry, kind: str, text: str, *, merge: bool = False) -> None:
        """Records an event of a model."""
        self.events.record(kind, text, model=entry.info.name, load_id=entry.placement.load_id, merge=merge)

    def _held(self) -> set[str]:
        """Devices that models hold."""
        return {f"{stage.node}/{stage.device}" for entry in self._entries.values() for stage in entry.info.plan.stages}

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
        requests.check_remote_code(source, allowed=self._options.allow_remote_code)
        outlined = (await _outline(source, options)).model
        speeds = requests.given_speeds(options, self._speeds.of(outlined.checkpoint.source))
        async with self._placing:  # both may hold GPUs for a moment, to learn which are free
            return (await self._spread(outlined, options)).plan.to_message(speeds)

    async def _spread(self, outlined: OutlinedModel, options: registry_pb2.LoadOptions) -> PlannedModel:
        held = self._held()
        try:
            return await asyncio.to_thread(lambda: outlined.spread(requests.plan_options(options), discover(held)))
        except (OutOfMemoryError, InvalidRequestError, InvalidDeviceMapError) as error:
            await self._look_at_nodes()
            if not self._drained or "device" not in str(error):
                raise
            names = ", ".join(sorted(self._drained.values()))
            raise type(error)(f"{error}; drained nodes are left out: {names} (`shardlift undrain`)") from None

    # -- nodes -----------------------------------------------------------------------------------------------------

    async def nodes(self) -> list[registry_pb2.NodeInfo]:
        """The cluster's nodes, with the stages on each."""
        return [self._node_info(node) for node in await self._look_at_nodes()]

    async def drain(self, text: str) -> AsyncIterator[registry_pb2.DrainNodeResponse]:
        """Takes a node out of plans and moves its stages elsewhere, telling of each move. See `draining`."""
        node = nodes.find(text, await self._look_at_nodes())
        async with self._draining:
            began: set[tuple[str, int]] = set()
            moves = drain(node, self._registered())
            try:
                async for move in moves:
                    at = (move.model, move.stage)
                    if at in began:
                        began.remove(at)
                        yield registry_pb2.DrainNodeResponse(moved=move)
                    else:
                        began.add(at)
                        yield registry_pb2.DrainNodeResponse(moving=move)
            finally:
                await moves.aclose()  # type: ignore[attr-defined]
                await self._look_at_nodes()
        found = nodes.find(node.node_id, await self._look_at_nodes())
        yield registry_pb2.DrainNodeResponse(drained=self._node_info(found))

    async def undrain(self, text: str) -> registry_pb2.NodeInfo:
        """Lets plans use a node again. Raises InvalidRequestError where Ray itself is ending it."""
        node = nodes.find(text, await self._look_at_nodes())
        if node.by_ray:
            raise InvalidRequestError(
                f"node {node.name} is being ended by Ray itself, which can't be taken back: start a new one"
            )
        await asyncio.to_thread(lambda: nodes.mark(node.node_id, drained=False))
        return self._node_info(nodes.find(node.node_id, await self._look_at_nodes()))

    async def follow_nodes(self) -> None:
        """Keeps an eye on the nodes that Ray is ending, and moves their stages away as long as there is time."""
        await self._look_at_nodes()
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        tried: dict[str, float] = {}
        leaving: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(_FOLLOW_S)
                try:
                    if not await asyncio.to_thread(nodes.ending_ids):
                        continue
                    found = await self._look_at_nodes()
                except Exception as error:
                    logger.warning("the nodes can't be asked for: %s", one_line(error))
                    continue
                for node in found:
                    if node.by_ray and time.monotonic() - tried.get(node.node_id, -_AGAIN_S) >= _AGAIN_S:
                        tried[node.node_id] = time.monotonic()
                        task = asyncio.create_task(self._leave_node(node))
                        leaving.add(task)
                        task.add_done_callback(leaving.discard)
        finally:
            for task in leaving:
                task.cancel()

    async def _leave_node(self, node: Node) -> None:
        if not any(seat.node_id == node.node_id for entry in self._entries.values() for seat in entry.placement.seats):
            return
        logger.info("Ray is ending node %s: its stages are moved elsewhere", node.name)
        try:
            async for _ in self.drain(node.node_id):
                pass
        except Exception as error:
            # When it has gone, its stages are lost, and brought back where there is room.
            logger.warning("node %s is about to end, and %s", node.name, one_line(error))

    def _registered(self) -> Registered:
        return Registered(
            entries=lambda: list(self._entries.values()), held=self._held, placing=self._placing, switch=self._switch
        )

    async def _switch(self, entry: Entry) -> None:
        """Has a model take its replacements into use: as a recovery that has lost nothing."""
        resident, name = entry.resident, entry.info.name
        assert resident is not None
        while resident.waits_for_switch:
            if entry.discarding is not None:
                raise ModelUnavailableError(f"model {name} was unloaded")
            if self._is_closed:
                raise GatewayUnavailableError("the gateway is stopping: drain again")
            # Where a recovery is under way, it takes them at its next try.
            self._suspect(entry)
            await asyncio.sleep(_SWITCH_POLL_S)
        if entry.attempt is not None:
            await asyncio.shield(entry.attempt)

    async def _look_at_nodes(self) -> list[Node]:
        found = await asyncio.to_thread(nodes.nodes)
        self._drained = {node.node_id: node.name for node in found if node.is_drained}
        return found

    def _node_info(self, node: Node) -> registry_pb2.NodeInfo:
        stages = [
            registry_pb2.StageAt(model=entry.info.name, stage=index, node=node.name, device=stage.device)
            for entry in self._entries.values()
            for index, (seat, stage) in enumerate(zip(entry.placement.seats, entry.info.plan.stages, strict=False))
            if seat.node_id == node.node_id
        ]
        return registry_pb2.NodeInfo(
            name=node.name,
            node_id=node.node_id,
            hostname=node.hostname,
            drained=node.is_drained,
            by_ray=node.by_ray,
            stages=stages,
        )

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load(
        self, request: registry_pb2.LoadModelRequest, traceparent: str = ""
    ) -> AsyncIterator[registry_pb2.LoadModelResponse]:
        """Loads a model and tells what happens; the last event is `ready`.

        A failure, or the end of whoever listens, frees all that the load has taken. traceparent: of the caller's span.
        """
        requests.check_remote_code(request.source, allowed=self._options.allow_remote_code)
        name = requests.model_name(request.name, request.source.path)
        if name in self._entries:
            self.events.record("refused", "a load under a name that is taken", model=name, merge=True)
            raise ModelNameTakenError(f"a model called {name} is here already: unload it, or choose another name")
        entry = Entry(
            info=registry_pb2.ModelInfo(name=name, path=request.source.path),
            placement=Placement(model=name, load_id=uuid.uuid4().hex),
        )
        self._entries[name] = entry
        self._set_state(entry, registry_pb2.MODEL_STATE_LOADING)
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None] = asyncio.Queue()
        self._tell(entry, "load-started", f"loading {request.source.path}")
        entry.load = asyncio.create_task(self._traced_load(entry, request, events, traceparent))
        entry.load.add_done_callback(lambda _: events.put_nowait(None))
        entry.load.add_done_callback(lambda load: self._loaded(entry, load))
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

    def _loaded(self, entry: Entry, load: asyncio.Task[None]) -> None:
        """Counts and tells how a load ended."""
        name = entry.info.name
        if load.cancelled():
            self.numbers.loads[name, "cancelled"] += 1
            self._tell(entry, "load-cancelled", f"given up after {time.monotonic() - entry.begun_s:.1f} s")
        elif (error := load.exception()) is not None:
            self.numbers.loads[name, "failed"] += 1
            # Before anything was placed, the request couldn't be met; afterwards, something broke.
            self._tell(entry, "load-failed" if entry.placement.workers else "refused", one_line(error))
        else:
            self.numbers.loads[name, "ready"] += 1
            count = len(entry.info.plan.stages)
            took = f"{entry.info.load_seconds:.1f} s"
            self._tell(entry, "load-ready", f"{count} stage{'s'[: count > 1]} resident after {took}")

    async def _traced_load(
        self,
        entry: Entry,
        request: registry_pb2.LoadModelRequest,
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None],
        traceparent: str,
    ) -> None:
        logs.note(model=entry.info.name, load_id=entry.placement.load_id)
        with tracing.span("load", traceparent, model=entry.info.name, load_id=entry.placement.load_id) as span:
            await self._load(entry, request, events, span)

    async def _load(
        self,
        entry: Entry,
        request: registry_pb2.LoadModelRequest,
        events: asyncio.Queue[registry_pb2.LoadModelResponse | None],
        span: tracing.Span,
    ) -> None:
        started = entry.begun_s
        name, placement, info = entry.info.name, entry.placement, entry.info
        transfer = requests.transfer_options(request.options)
        serving = requests.serving_options(request.options)
        secret = secrets.token_urlsafe(32)

        def tell(**event: Any) -> None:
            events.put_nowait(registry_pb2.LoadModelResponse(**event))

        def tell_progress(progress: registry_pb2.StageProgress) -> None:
            entry.progress[progress.stage] = progress
            if progress.done or events.qsize() < _MAX_WAITING_EVENTS:
                tell(progress=progress)

        with span.child("resolve"):
            path = await _outline(request.source, request.options)
        outlined, adapter = path.model, path.adapter
        request = registry_pb2.LoadModelRequest(name=name, source=path.base, options=request.options)
        if request.options.HasField("adapter"):
            request.options.adapter.ClearField("token")  # they are kept, and tokens aren't
        token = requests.access_token(path.base)
        entry.source = outlined.checkpoint.source
        info.config_json = json.dumps(dict(outlined.config))
        info.generation_config_json = json.dumps(dict(outlined.generation_config))
        tell(started=registry_pb2.LoadStarted(name=name, commit=entry.source.commit))
        for note in outlined.layout.outline.notes:
            tell(warning=note)
        async with self._placing:
            with span.child("plan"):
                planned = await self._spread(outlined, request.options)
            speeds = requests.given_speeds(request.options, self._speeds.of(entry.source))
            info.plan.CopyFrom(planned.plan.to_message(speeds))
            if adapter is not None:
                sizes = [adapter.outline.bytes_of(cut) for cut in adapters.cuts_of(info.plan)]
                kv_tokens_beside(info.plan.stages, sizes, adapter.spec.name)
            tell(planned=info.plan)
            settings = self._options.log
            specs = [
                replace(spec, log_format=settings.format, log_level=settings.level)
                for spec in planned.specs(name, placement.load_id, secret, transfer, serving, self._options.stage_tls)
            ]
            info.quantization_config_json = json.dumps(dict(specs[0].quantization)) if specs[0].quantization else ""
            card = registry_pb2.ModelCard(info=info).SerializeToString()
            with span.child("place", stages=len(specs)):
                await place(planned.plan, specs, card, placement)

        async def tell_place(index: int) -> None:
            stage = info.plan.stages[index]
            stage.device = await loads.actual_device(placement.workers[index], index, stage.device)
            tell(placed=registry_pb2.StagePlaced(stage=index, node=stage.node, device=stage.device))

        async def respawn(index: int, error: WorkerDiedError) -> None:
            tell(warning=f"{one_line(error)}; another one loads its part anew")
            await place_again(specs[index], card, placement)

        with span.child("stages") as stages_span:
            reports = await loads.load_stages(
                placement.workers, specs, token, tell_progress, tell_place, respawn, stages_span.traceparent
            )
        resident = entry.resident = Resident(info, request, token, placement, reports, specs)
        with span.child("join"):
            await resident.join()
        entry.tokenizer = await loads.tokenizer_or_none(entry.source, token, request.source.trust_remote_code)
        info.residency.extend(loads.residency(index, report) for index, report in enumerate(reports))
        info.footprint.CopyFrom(loads.footprint(reports))
        self._speeds.learn(entry.source, [stage.device for stage in planned.plan.stages], reports)
        if adapter is not None:
            assert path.adapter_source is not None
            await resident.attach(adapter, requests.access_token(path.adapter_source))
            info.default_adapters.append(adapter.spec.name)
        info.load_seconds = time.monotonic() - started
        # The workers first: ready is what a restarted controller would find ready.
        await resident.keep_card()
        self._set_state(entry, registry_pb2.MODEL_STATE_READY)
        resident.watch(lambda _: self._suspect(entry))
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
        tasks = [task for task in (entry.load, entry.recovering, *entry.changes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The workers before the route: they tell those who wait for an answer why there will be none.
        await entry.placement.free()
        if entry.resident is not None:
            await entry.resident.close()
        if self._entries.get(entry.info.name) is entry:
            del self._entries[entry.info.name]
            if entry.resident is not None:
                self._tell(entry, "unloaded", "its memory is free")
        self._on_change(entry.info.name, registry_pb2.MODEL_STATE_UNSPECIFIED)

    async def close(self, *, unload: bool) -> None:
        """Leaves the registry. Models stay resident for the next one, unless `unload`; loads under way end, and calls
        too: GatewayUnavailableError tells them to ask the next gateway."""
        self._is_closed = True
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        for entry in list(self._entries.values()):
            if unload or entry.info.state not in (
                registry_pb2.MODEL_STATE_READY,
                registry_pb2.MODEL_STATE_UNAVAILABLE,
                registry_pb2.MODEL_STATE_RECOVERING,
            ):
                await self._discard(entry)
            elif entry.resident is not None:
                if entry.recovering is not None:
                    entry.recovering.cancel()
                    await asyncio.gather(entry.recovering, return_exceptions=True)
                await entry.resident.close()

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
        resident = entry.resident
        assert resident is not None
        self._entries[entry.info.name] = entry
        if any(placement.workers):
            found = f"resident on {len(entry.info.plan.stages)} stages since before this gateway"
        else:
            found = "none of its stages answers; they are loaded again"
        self._tell(entry, "found", found)
        try:
            await resident.settle_adapters()
            await resident.connect()
        except Exception as error:
            logger.warning("model %s is not well: %s", entry.info.name, one_line(error))
            self._suspect(entry)
        else:
            resident.watch(lambda _: self._suspect(entry))
        self._on_change(entry.info.name, entry.info.state)

    async def _recognize(self, placement: Placement) -> Entry:
        """The model that these workers hold, of which some may have gone; or all, where its card is kept."""
        answers = await asyncio.gather(
            *(
                asyncio.wait_for(call(worker.describe.remote(), "a stage"), _DESCRIBE_TIMEOUT_S)
                for worker in placement.workers
            ),
            return_exceptions=True,
        )
        stages: dict[int, tuple[Any, StageSpec, LoadReport]] = {}
        latest = b""
        for worker, answer in zip(placement.workers, answers, strict=True):
            if isinstance(answer, BaseException):
                await kill(worker)
                continue
            fields, bytes_, report, joined = answer
            spec = StageSpec.from_json({**fields, "records": []})
            if report is None or not joined:
                await kill(worker)  # of a load, or a recovery, that nobody leads to its end
                continue
            stages[spec.index] = (worker, spec, report)
            latest = max(bytes_, latest, key=_recoveries)
        latest = max(latest, placement.card, key=_recoveries)
        card = registry_pb2.ModelCard.FromString(latest)
        if card.info.state != registry_pb2.MODEL_STATE_READY:
            raise ModelUnavailableError("it never became ready")
        if stages:
            _, some, _ = next(iter(stages.values()))
        else:
            # All of them will be new, and so may be what they share.
            some = replace(_spec_of(card), secret=secrets.token_urlsafe(32))
        placement.workers = [stages[index][0] if index in stages else None for index in range(some.num_stages)]
        placement.seats = [Seat.of(seat) for seat in card.seats]
        await leave_unused(placement)
        numbers = range(some.num_stages)
        specs = [
            stages[index][1]
            if index in stages
            else replace(some, index=index, device=as_seen_by_worker(card.info.plan.stages[index].device))
            for index in numbers
        ]
        reports = [stages[index][2] if index in stages else None for index in numbers]
        request = registry_pb2.LoadModelRequest(name=card.info.name, source=card.source, options=card.options)
        token = requests.access_token(card.source)
        resident = Resident(card.info, request, token, placement, reports, specs, latest)
        attached = [AttachedAdapter.from_json(json.loads(text)) for text in card.adapters_json]
        resident.adapters = {each.spec.name: each for each in attached}
        return Entry(info=card.info, placement=placement, source=some.source, resident=resident)


def _spec_of(card: registry_pb2.ModelCard) -> StageSpec:
    """What the specs of all stages have in common. Raises ModelUnavailableError for a card that doesn't say."""
    if not card.spec_json:
        raise ModelUnavailableError("none of its workers is left")
    return StageSpec.from_json(json.loads(card.spec_json))


def _recoveries(card: bytes) -> tuple[bool, int]:
    """Of two cards of a model, the later one counts: it knows where stages have moved."""
    read = registry_pb2.ModelCard.FromString(card)
    return read.info.state == registry_pb2.MODEL_STATE_READY, read.info.recoveries + read.info.moves


def _settle(attempt: asyncio.Future[None], error: Exception | None) -> None:
    if attempt.done():
        return
    if error is None:
        attempt.set_result(None)
    else:
        attempt.set_exception(error)
        attempt.exception()  # seen, even where nobody waits


async def _outline(source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions) -> OutlinedPath:
    return await asyncio.to_thread(adapters.outline_path, source, options)
