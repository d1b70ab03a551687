"""A model that is resident: its stages, their workers, and how a lost one is brought back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelUnavailableError, OutOfMemoryError, ShardliftError, WorkerDiedError, one_line
from ..proto.v1.tls import TLS
from ..worker.adapter_spec import AttachedAdapter
from ..worker.anatomy import Cut
from ..worker.records import FileVersion, HubToken, SourceSpec
from ..worker.service import SECRET_HEADER
from ..worker.spec import LoadReport, ModuleBytes, StageSpec
from ..worker.tokenizer import tokenizer_files
from ..worker.tracing import OFF, Span
from . import loads, requests
from .adapter_room import added, kv_tokens_beside, rooms_beside
from .adapters import BaseModel, OutlinedAdapter, cuts_of
from .devices import Device
from .moves import Need, Shortage, choose
from .nodes import drained_ids
from .placement import (
    Placement,
    Seat,
    call,
    end_process,
    is_there,
    kill,
    leave_seat,
    place_again,
    place_beside,
    place_elsewhere,
    silent_nodes,
    take_seat,
)
from .plan import PlannedStage
from .planning import OutlinedModel, outline_model
from .route import Route
from .topology import discover
from .vigil import Vigil, lost_stages

logger = logging.getLogger(__name__)

_TRIES_IN_PLACE = 2  # what kills every worker there will kill the next one too
_DISCOVER_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A second worker of a stage, loaded on `device` and not yet in use. began_s: on the monotonic clock."""

    device: Device
    name: str  # of the device, as the worker counts it
    seat: Seat
    worker: Any
    report: LoadReport
    began_s: float


class Resident:
    """Stages that have loaded, joined to a ring. All methods run on one event loop.

    info: the registry's, which changes here when a stage moves. request: as it came, without its token. specs: known
    where this process has planned the load; else made again from the checkpoint when one is needed. card: what the
    workers, or Ray's GCS, carry of it already.
    """

    def __init__(
        self,
        info: registry_pb2.ModelInfo,
        request: registry_pb2.LoadModelRequest,
        token: HubToken,
        placement: Placement,
        reports: Sequence[LoadReport | None],
        specs: Sequence[StageSpec],
        card: bytes = b"",
    ) -> None:
        self.info = info
        self.placement = placement
        self._request = request
        self._token = token
        # None for a stage that is lost.
        self._reports = list(reports)
        self._specs = list(specs)
        self.adapters: dict[str, AttachedAdapter] = {}
        # Their Hub tokens, where they came with one.
        self._adapter_tokens: dict[str, HubToken] = {}
        self._outlined: OutlinedModel | None = None
        self._card = card
        # By stage: what the next `restore` puts in the place of what is there.
        self._ready: dict[int, Replacement] = {}
        self._vigil: Vigil | None = None
        self.route: Route | None = None

    @property
    def tls(self) -> TLS | None:
        """The stages'."""
        return self._specs[0].tls

    @property
    def trust_remote_code(self) -> bool:
        """Whether the checkpoint's own code was let run."""
        return self._request.source.trust_remote_code

    @property
    def source(self) -> SourceSpec:
        return self._specs[0].source

    @property
    def addresses(self) -> list[str]:
        """The stages', in order. Raises ModelUnavailableError where one is known to be lost."""
        return [report.address for report in self._all_reports()]

    def tokenizer_files(self) -> dict[str, bytes]:
        """What the checkpoint's tokenizer is made of. Raises what reading them raises."""
        return dict(tokenizer_files(self.source, self._token))

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [(SECRET_HEADER, self._specs[0].secret)]

    # -- joining ---------------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Closes the ring over the workers that there are, and takes a token through it."""
        await loads.join_ring(self.placement.workers, self.addresses)
        await self.connect()

    async def connect(self) -> None:
        """Takes a token through the ring. Raises ModelUnavailableError where a stage is known to be lost."""
        route = Route(self._all_reports()[-1].address, self._specs[0].secret, self.tls)
        try:
            await route.canary()
        except BaseException:
            await route.close()
            raise
        old, self.route = self.route, route
        if old is not None:
            await old.close()

    async def keep_card(self) -> None:
        """Gives every worker, and Ray's GCS, what a new controller would need to know."""
        info = registry_pb2.ModelInfo()
        info.CopyFrom(self.info)
        info.state, info.reason = registry_pb2.MODEL_STATE_READY, ""
        source = registry_pb2.ModelSource()
        source.CopyFrom(self._request.source)
        source.ClearField("token")
        self._card = registry_pb2.ModelCard(
            info=info,
            source=source,
            options=self._request.options,
            seats=[seat.message() for seat in self.placement.seats],
            adapters_json=[json.dumps(attached.to_json()) for attached in self.adapters.values()],
            spec_json=json.dumps(self._common_spec()),
        ).SerializeToString()
        was_kept = bool(self.placement.card)
        try:
            await asyncio.gather(
                *(call(worker.set_card.remote(self._card), "a stage") for worker in self.placement.workers)
            )
        except WorkerDiedError:
            if was_kept:
                await self.placement.keep_card(self._card)
            raise
        # The workers first: a model is resident from when all of them say so.
        await self.placement.keep_card(self._card)

    def _common_spec(self) -> dict[str, Any]:
        """What the stages' specs have in common, for a controller that finds none of them. Without their secret."""
        spec = replace(self._specs[0], secret="", records=(), versions=self._versions)
        return spec.to_json()

    @property
    def _versions(self) -> dict[str, FileVersion]:
        """Of all files that stages have read, as far as they are known."""
        return {file: version for spec in self._specs for file, version in spec.versions.items()}

    def watch(self, on_loss: Callable[[int], None]) -> None:
        """Calls `on_loss` when a stage ends, until the next `watch` or `close`."""
        assert self.route is not None
        assert self._vigil is None
        self._vigil = Vigil(self.addresses, self.metadata, on_loss, self.tls)

    async def close(self) -> None:
        """Lets go of the stages; they stay."""
        await self._unwatch()
        if self.route is not None:
            await self.route.close()

    async def _unwatch(self) -> None:
        vigil, self._vigil = self._vigil, None
        if vigil is not None:
            await vigil.close()

    def _all_reports(self) -> list[LoadReport]:
        found = [report for report in self._reports if report is not None]
        if len(found) < len(self._reports):
            lost = [index for index, report in enumerate(self._reports) if report is None]
            raise ModelUnavailableError(f"stages {lost} of {len(self._reports)} are lost")
        return found

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def base(self) -> BaseModel:
        """What adapters are injected into."""
        spec = self._specs[0]
        return BaseModel(
            config=spec.config,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
            quantize_experts=spec.quantize_experts,
            source=spec.source,
            anatomy=spec.anatomy,
            code=spec.code,
        )

    @property
    def cuts(self) -> list[Cut]:
        return cuts_of(self.info.plan)

    async def attach(self, adapter: OutlinedAdapter, token: HubToken) -> None:
        """Attaches an adapter on every stage, or where one fails on none.

        Raises OutOfMemoryError before anything is fetched where it has no room, and what a stage has failed with.
        """
        name, workers = adapter.spec.name, list(self.placement.workers)
        predicted = [adapter.outline.bytes_of(cut) for cut in self.cuts]
        await self._limit_tokens([predicted], name)
        spec = adapter.spec.to_json()
        try:
            results = await asyncio.gather(
                *(
                    call(worker.load_adapter.remote(spec, token), f"stage {index}")
                    for index, worker in enumerate(workers)
                ),
                return_exceptions=True,
            )
            stages: list[tuple[ModuleBytes, ...]] = []
            for result in results:
                if isinstance(result, BaseException):
                    raise result
                stages.append(tuple(result))
            if any(now is not then for now, then in zip(self.placement.workers, workers, strict=True)):
                raise ModelUnavailableError(f"a stage was lost while adapter {name} was attached: load it again")
            attached = AttachedAdapter(spec=adapter.spec, stages=tuple(stages))
            await self._limit_tokens([attached.stage_bytes], name)
        except BaseException:
            await self._take_off(name)
            await self._limit_tokens([], name)
            raise
        self.adapters[name] = attached
        self._adapter_tokens[name] = token
        self.tell_adapters()
        await self._try_keep_card()

    def adapter_token(self, name: str) -> HubToken:
        """The Hub token that the adapter was loaded with."""
        return self._adapter_tokens.get(name)

    async def detach(self, name: str) -> None:
        """Takes an adapter off every stage; one that is lost meanwhile comes back without it."""
        del self.adapters[name]
        self._adapter_tokens.pop(name, None)
        self.tell_adapters()
        # First of all: a new controller must not take it for one that is there.
        await self._try_keep_card()
        await self._take_off(name)
        await self._limit_tokens([], name)

    async def settle_adapters(self) -> None:
        """After a controller has ended: takes off what the stages have, and no card tells of."""
        for worker in self.placement.workers:
            if worker is None:
                continue
            with contextlib.suppress(WorkerDiedError):  # it comes back with what it should have
                for name in await call(worker.adapters.remote(), "a stage"):
                    if name not in self.adapters:
                        await call(worker.delete_adapter.remote(name), "a stage")

    def tell_adapters(self) -> None:
        """Brings `info` up to date: which adapters there are, and what the stages hold with them."""
        info = self.info
        del info.adapters[:]
        for attached in self.adapters.values():
            spec = attached.spec
            info.adapters.add(
                name=spec.name,
                path=spec.path,
                commit=spec.source.commit,
                kind=spec.kind,
                config_json=json.dumps(dict(spec.config)),
                stage_bytes=attached.stage_bytes,
            )
        kept = [name for name in info.default_adapters if name in self.adapters]
        del info.default_adapters[:]
        info.default_adapters.extend(kept)
        for index, report in enumerate(self._reports):
            if report is not None:
                modules = [module for attached in self.adapters.values() for module in attached.stages[index]]
                info.residency[index].CopyFrom(loads.residency(index, report, modules))
        info.plan.kv_tokens = self._kv_tokens([], "")

    def _kv_tokens(self, more: Sequence[Sequence[int]], name: str) -> int:
        return kv_tokens_beside(self.info.plan.stages, self._adapter_bytes(more), name)

    def _adapter_bytes(self, more: Sequence[Sequence[int]]) -> list[int]:
        """What adapters hold on each stage, with `more` of them."""
        sizes = [*(attached.stage_bytes for attached in self.adapters.values()), *more]
        return added(sizes, len(self.info.plan.stages))

    async def _limit_tokens(self, more: Sequence[Sequence[int]], name: str) -> None:
        """Has the last stage let in what there is room for beside the adapters, and `more` of them."""
        tokens = self._kv_tokens(more, name)
        rooms = rooms_beside(self.info.plan.stages, self._adapter_bytes(more))
        try:
            await call(self.placement.workers[-1].limit_tokens.remote(tokens, rooms), "the last stage")
        except WorkerDiedError:
            if more:
                raise
            logger.info("model %s has lost its last stage, which will learn its limit anew", self.info.name)

    async def _take_off(self, name: str) -> None:
        results = await asyncio.gather(
            *(
                call(worker.delete_adapter.remote(name), f"stage {index}")
                for index, worker in enumerate(self.placement.workers)
            ),
            return_exceptions=True,
        )
        for result in results:
            # A stage that is lost has no adapter, and is noticed by others.
            if isinstance(result, BaseException) and not isinstance(result, ModelUnavailableError):
                raise result

    async def _try_keep_card(self) -> None:
        try:
            await self.keep_card()
        except WorkerDiedError as error:
            logger.warning(
                "a card of model %s will be kept when its stages are back: %s", self.info.name, one_line(error)
            )

    async def _attach_again(self, index: int) -> None:
        """Gives a stage that has come back the adapters that the others have."""
        worker = self.placement.workers[index]
        for name, attached in list(self.adapters.items()):
            token = self.adapter_token(name)
            modules = await call(worker.load_adapter.remote(attached.spec.to_json(), token), f"stage {index}")
            stages = [*attached.stages[:index], tuple(modules), *attached.stages[index + 1 :]]
            self.adapters[name] = replace(attached, stages=tuple(stages))

    # -- recovery --------------------------------------------------------------------------------------------------

    async def restore(self, held: Callable[[], set[str]], placing: asyncio.Lock, span: Span = OFF) -> list[int]:
        """Brings lost stages back, where they were or elsewhere, and closes the ring again; which stages these were.

        held: gives the devices that models hold. placing: held while a device is chosen. Raises OutOfMemoryError where
        no device has room for a stage, and whatever else keeps one from coming back; a later try goes on from what
        this one has reached.
        """
        await self._unwatch()
        await self._take_replacements()
        addresses = {index: report.address for index, report in enumerate(self._reports) if report is not None}
        silent = await lost_stages(addresses, self.metadata, self.tls)
        # Processes that hold on to their device, and answer nobody.
        hanging = {index: report.pid for index, report in enumerate(self._reports) if report and silent.get(index)}
        for index in silent:
            self._reports[index] = None
        lost = [index for index, report in enumerate(self._reports) if report is None]
        if lost:
            await self._complete_specs(lost)
            results = await asyncio.gather(
                *(self._bring_back(index, hanging.get(index), placing, held, span) for index in lost),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        with span.child("join"):
            await self.join()
        if self.adapters:
            self.tell_adapters()
            await self._limit_tokens([], "")
        await self.keep_card()
        return lost

    async def _bring_back(
        self, index: int, hanging: int | None, placing: asyncio.Lock, held: Callable[[], set[str]], span: Span
    ) -> None:
        """A stage's worker anew. hanging: the process of the old one, where it hangs."""
        spec, seat = self._specs[index], self.placement.seats[index]
        await kill(self.placement.workers[index])
        failure: ShardliftError = ModelUnavailableError(f"node {seat.node} left the cluster")
        if seat.node_id in await asyncio.to_thread(drained_ids):
            failure = ModelUnavailableError(f"node {seat.node} is drained")
        elif await is_there(seat.node_id):
            if hanging is not None:
                await end_process(seat.node_id, hanging)
            for _ in range(_TRIES_IN_PLACE):
                try:
                    await place_again(spec, self._card, self.placement)
                    return await self._load(index, span)
                except WorkerDiedError as error:
                    failure = error
                except ModelUnavailableError as error:
                    failure = error
                    break
        logger.warning("stage %s of %s goes elsewhere: %s", index, self.info.name, one_line(failure))
        async with placing:
            await self._move(index, held, failure)
        await self._load(index, span)

    async def _move(self, index: int, held: Callable[[], set[str]], why: ShardliftError) -> None:
        """A worker for the stage on a device that has room for it, the smallest of these."""
        stage, spec = self.info.plan.stages[index], self._specs[index]
        gone = await silent_nodes()
        try:
            devices = await asyncio.wait_for(asyncio.to_thread(discover, held(), gone), _DISCOVER_TIMEOUT_S)
        except RayError as error:  # another node may go while it is asked
            raise ModelUnavailableError(
                f"stage {index} is lost, and the devices can't be told: {one_line(error, 200)}"
            ) from None
        found = choose([self.need(index)], devices)
        if isinstance(found, Shortage):
            raise OutOfMemoryError(
                f"stage {index} is lost ({one_line(why)}) and needs {found.need.bytes_:,} bytes of a {found.need.kind} "
                "device, which no other has free: it comes back when one has"
            )
        (device,) = found
        await place_elsewhere(self._planned(index, device), spec, self._card, self.placement)
        stage.node, stage.device, stage.capacity_bytes = device.node, device.name, device.capacity_bytes

    def need(self, index: int) -> Need:
        """What a device must have for a stage to go there."""
        stage = self.info.plan.stages[index]
        return Need(
            what=f"stage {index} of {self.info.name}",
            kind="cuda" if self._specs[index].device.startswith("cuda") else "cpu",
            bytes_=stage.resident_bytes + stage.workspace_bytes + stage.kv_budget_bytes,
        )

    def _planned(self, index: int, device: Device) -> PlannedStage:
        stage = self.info.plan.stages[index]
        return PlannedStage(
            device=device,
            cut=self._specs[index].cut,
            resident_bytes=stage.resident_bytes,
            fetch_bytes=stage.fetch_bytes,
            kv_bytes_per_token=stage.kv_bytes_per_token,
            modules=tuple(stage.modules),
            workspace_bytes=stage.workspace_bytes,
            kv_bytes=stage.kv_bytes,
            kv_budget_bytes=stage.kv_budget_bytes,
        )

    async def _load(self, index: int, span: Span) -> None:
        worker = self.placement.workers[index]
        report: LoadReport = await call(worker.load.remote(self._token, span.traceparent), f"stage {index}")
        stage = self.info.plan.stages[index]
        stage.device = await loads.actual_device(worker, index, stage.device)
        await self._attach_again(index)
        self._reports[index] = report
        self.info.residency[index].CopyFrom(loads.residency(index, report))

    # -- moves -----------------------------------------------------------------------------------------------------

    def stages_on(self, node_id: str) -> list[int]:
        """Stages that have their seats on a node."""
        return [index for index, seat in enumerate(self.placement.seats) if seat.node_id == node_id]

    @property
    def waits_for_switch(self) -> bool:
        """Whether there is a replacement that is not in use yet."""
        return bool(self._ready)

    async def prepare_moves(self, indices: Sequence[int]) -> None:
        """Finds out all that loading these stages again takes. Raises what stands against it; touches nothing."""
        await self._complete_specs(indices)

    async def seat_beside(self, index: int, device: Device) -> tuple[Seat, Any]:
        """A second worker for a stage, on `device`: for `load_beside`."""
        return await place_beside(self._planned(index, device), self._specs[index], self._card, self.placement)

    async def load_beside(self, index: int, device: Device, seat: Seat, worker: Any) -> None:
        """Loads a stage into a second worker, which the next `restore` puts in the place of the first. Where that
        fails, or is given up, the second one goes."""
        began_s = time.monotonic()
        try:
            report: LoadReport = await call(worker.load.remote(self._token), f"stage {index}")
            name = await loads.actual_device(worker, index, device.name)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(leave_seat(seat, worker, self.placement)))
            raise
        self._ready[index] = Replacement(
            device=device, name=name, seat=seat, worker=worker, report=report, began_s=began_s
        )

    async def drop_replacements(self) -> None:
        """Lets go of those that are not in use."""
        while self._ready:
            _, replacement = self._ready.popitem()
            await leave_seat(replacement.seat, replacement.worker, self.placement)

    async def _take_replacements(self) -> None:
        """Puts each replacement into its stage's place. What is there ends first: two must not answer for one stage."""
        while self._ready:
            index, new = self._ready.popitem()
            old = self.placement.workers[index]
            if old is not None:
                # Who computes there is told to come again, rather than cut off.
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(call(old.stop.remote(), f"stage {index}"), _STOP_TIMEOUT_S)
            await take_seat(index, new.seat, new.worker, self.placement)
            self._reports[index] = new.report
            stage = self.info.plan.stages[index]
            stage.node, stage.device = new.device.node, new.name
            stage.capacity_bytes = new.device.capacity_bytes
            # Now, not when it was loaded: others may have come since.
            await self._attach_again(index)
            self.info.residency[index].CopyFrom(loads.residency(index, new.report))
            self.info.moves += 1

    async def _complete_specs(self, lost: Sequence[int]) -> None:
        """Has the specs of `lost` stages with all that a load needs, of the very same bytes that the others hold."""
        if all(self._specs[index].records for index in lost):
            return
        if self._outlined is None:
            source = registry_pb2.ModelSource()
            source.CopyFrom(self._request.source)
            if self.source.kind == "hub":
                source.revision = self.source.commit
            options = self._request.options
            self._outlined = await asyncio.to_thread(
                lambda: outline_model(
                    requests.checkpoint_request(source),
                    self._token,
                    requests.model_options(options),
                    # As the other stages hold it, whatever nodes would say now.
                    lambda _: "" if self._specs[0].keep_packing else "the model was loaded unpacked",
                )
            )
        model = self._outlined
        known = self._versions
        for index in lost:
            stage = self.info.plan.stages[index]
            layers = len(model.layout.outline.sizes.layers)
            cut = Cut(first=stage.first_layer, end=stage.last_layer + 1, num_layers=layers)
            records = model.layout.records_of(cut, model.checkpoint.records)
            versions = {record.file: model.checkpoint.versions[record.file] for record in records}
            self._specs[index] = replace(
                self._specs[index],
                index=index,
                cut=cut,
                records=records,
                # A file that others have read must still be what it was: the load itself finds out.
                versions={file: known.get(file, version) for file, version in versions.items()},
            )
