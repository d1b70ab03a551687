"""Stages onto their nodes and devices: a detached placement group and detached, named actors. Ray's side of a load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelUnavailableError, OutOfMemoryError, ShardliftError, WorkerDiedError, one_line
from ..worker.actor import StageWorker
from ..worker.spec import StageSpec
from . import cards, gpu_ids
from .plan import Plan, PlannedStage

logger = logging.getLogger(__name__)
T = TypeVar("T")

NAMESPACE = "shardlift"
_STAGE_PREFIX = "stage:"
_GROUP_PREFIX = "shardlift:"
_PLACE_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_KNOCK_TIMEOUT_S = 1.0
_END_TIMEOUT_S = 15.0


def _actor_name(spec: StageSpec, again: str) -> str:
    # Ray may hold a dead one's name for a moment.
    return f"{_STAGE_PREFIX}{spec.model}:{spec.load_id}:{spec.index}{again}"


def _group_name(model: str, load_id: str) -> str:
    return f"{_GROUP_PREFIX}{model}:{load_id}"


def _again() -> str:
    return f"~{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a stage has its place: a bundle of a placement group, and what that holds. device: as the node counts."""

    group: str
    bundle: int
    node: str
    node_id: str
    device: str
    slots: int

    @classmethod
    def of(cls, message: registry_pb2.StageSeat) -> Seat:
        return cls(
            group=message.placement_group,
            bundle=message.bundle,
            node=message.node,
            node_id=message.node_id,
            device=message.device,
            slots=message.gpus,
        )

    def message(self) -> registry_pb2.StageSeat:
        return registry_pb2.StageSeat(
            placement_group=self.group,
            bundle=self.bundle,
            node=self.node,
            node_id=self.node_id,
            device=self.device,
            gpus=self.slots,
        )


@dataclass
class Placement:
    """What a load holds of the cluster: placement groups by their names, and for each stage its seat and worker."""

    model: str
    load_id: str
    groups: dict[str, PlacementGroup] = field(default_factory=dict)
    workers: list[Any] = field(default_factory=list)
    seats: list[Seat] = field(default_factory=list)
    # Of stages that are being moved: they load beside the ones in use.
    beside: list[Any] = field(default_factory=list)
    # What Ray's GCS keeps of the model; b"" where that is not known, or nothing.
    card: bytes = b""
    _freeing: asyncio.Future[None] | None = None

    @property
    def load(self) -> str:
        return f"{self.model}:{self.load_id}"

    async def keep_card(self, card: bytes) -> None:
        """Has Ray's GCS keep `card`, for the case that all workers go at once. Nothing without a Ray."""
        if card != self.card and ray.is_initialized():
            await _blocking(cards.keep, self.load, card)
            self.card = card

    async def free(self) -> None:
        """Stops the workers and gives everything back. Never raises; whoever else calls it waits for the same end."""
        if self._freeing is None:
            self._freeing = asyncio.ensure_future(self._free())
        await asyncio.shield(self._freeing)

    async def _free(self) -> None:
        # Before its workers: a controller that comes after an end in the middle of this must not bring it back.
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                await _blocking(cards.forget, self.load)
        stops = [asyncio.ensure_future(_stop(worker)) for worker in (*self.workers, *self.beside)]
        if stops:
            _, late = await asyncio.wait(stops, timeout=_STOP_TIMEOUT_S)
            for stop in late:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)
        for worker in (*self.workers, *self.beside):
            with contextlib.suppress(Exception):
                ray.kill(worker, no_restart=True)
        for group in self.groups.values():
            try:
                await _remove(group)
            except Exception as error:
                logger.warning("a placement group of %s may be left: %s", self.model, one_line(error, 200))


async def place(plan: Plan, specs: Sequence[StageSpec], card: bytes, placement: Placement) -> None:
    """Starts a worker for each spec on the very node and device of the plan; `placement` is filled as things come to
    be.

    Raises OutOfMemoryError when the cluster no longer has what the plan counted on.
    """
    # A group for each node: what a node has set aside is given back when its stages have been moved away.
    of_node: dict[str, list[int]] = {}
    for index, stage in enumerate(plan.stages):
        of_node.setdefault(stage.device.node_id, []).append(index)
    name = _group_name(placement.model, placement.load_id)
    sitting = [
        asyncio.ensure_future(_sit([plan.stages[index] for index in own], placement, f"{name}~{number}"))
        for number, own in enumerate(of_node.values())
    ]
    try:
        found = await asyncio.gather(*sitting)
    finally:
        for one in sitting:
            one.cancel()
        await asyncio.gather(*sitting, return_exceptions=True)
    seats = {
        index: seat
        for own, seated in zip(of_node.values(), found, strict=True)
        for index, seat in zip(own, seated, strict=True)
    }
    placement.seats = [seats[index] for index in range(len(plan.stages))]
    for spec in specs:
        placement.workers.append(_start(placement, spec, card, placement.seats[spec.index]))


async def _sit(stages: Sequence[PlannedStage], placement: Placement, name: str) -> list[Seat]:
    """A placement group called `name`, with a bundle on the very device of each stage."""
    await _set_aside(stages, placement, name)
    gpus = await _blocking(_gpus_of_nodes)
    of_node: dict[str, list[int]] = {}
    for index, stage in enumerate(stages):
        if stage.device.slots and gpus[stage.device.node_id] > 1:
            of_node.setdefault(stage.device.node_id, []).append(index)
    bundles = list(range(len(stages)))
    if of_node:
        bundles = await _match(stages, placement, name, of_node, gpus)
    return [
        Seat(
            group=name,
            bundle=bundle,
            node=stage.device.node,
            node_id=stage.device.node_id,
            device=stage.device.name,
            slots=stage.device.slots,
        )
        for bundle, stage in zip(bundles, stages, strict=True)
    ]


async def _set_aside(stages: Sequence[PlannedStage], placement: Placement, name: str) -> None:
    """A placement group with a bundle for each stage, on its node."""
    group = placement.groups[name] = placement_group(
        [_bundle(stage) for stage in stages],
        strategy="PACK",
        lifetime="detached",
        name=name,
        bundle_label_selector=[{"ray.io/node-id": stage.device.node_id} for stage in stages],
    )
    if not await _blocking(group.wait, _PLACE_TIMEOUT_S):
        raise OutOfMemoryError(
            f"Ray could not set {len(stages)} devices aside for {placement.model} in {_PLACE_TIMEOUT_S:.0f} s: "
            "something else holds them; unload a model, or load with fewer stages"
        )


async def _match(
    stages: Sequence[PlannedStage],
    placement: Placement,
    name: str,
    of_node: Mapping[str, Sequence[int]],
    gpus: Mapping[str, int],
) -> list[int]:
    """The bundle of each stage, such that each stage of these nodes, which have several GPUs, has its own one."""
    wanted = {node_id: {_number(stages[index]): index for index in own} for node_id, own in of_node.items()}
    found = await _numbers(placement.groups[name], of_node)
    if any(set(found[node_id]) != set(wanted[node_id]) for node_id in of_node):
        # Ray picked others. It picks anew, on every node, when what it may pick from is what is wanted.
        await _remove(placement.groups[name])
        others: list[PlacementGroup] = []
        try:
            for node_id in of_node:
                others += await _held(node_id, set(wanted[node_id]), gpus[node_id])
            await _set_aside(stages, placement, name)
        finally:
            await _blocking(gpu_ids.release, others)
        found = await _numbers(placement.groups[name], of_node)
    bundles = list(range(len(stages)))
    for node_id, own in of_node.items():
        if set(found[node_id]) != set(wanted[node_id]):
            raise OutOfMemoryError(
                f"Ray gave GPUs {sorted(found[node_id])} of {stages[own[0]].device.node} and not "
                f"{sorted(wanted[node_id])}: something else took them meanwhile; load again"
            )
        for bundle, number in zip(own, found[node_id], strict=True):
            bundles[wanted[node_id][number]] = bundle
    return bundles


async def _numbers(group: PlacementGroup, of_node: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The GPUs that the bundles hold, by node."""
    bundles = [(group, bundle) for stages in of_node.values() for bundle in stages]
    found = iter(await _blocking(gpu_ids.ids_of, bundles))
    return {node_id: [next(found) for _ in stages] for node_id, stages in of_node.items()}


async def _held(node_id: str, wanted: set[int], most: int) -> list[PlacementGroup]:
    """As `gpu_ids.hold_all_but`; if nobody waits for it any more, what it has got is given back."""

    def give_back(done: asyncio.Future[list[PlacementGroup]]) -> None:
        if done.exception() is None:
            gpu_ids.release(done.result())

    holding = asyncio.ensure_future(_blocking(gpu_ids.hold_all_but, node_id, wanted, most))
    try:
        return await asyncio.shield(holding)
    except asyncio.CancelledError:
        holding.add_done_callback(give_back)
        raise


def _number(stage: PlannedStage) -> int:
    """Of a stage's GPU: "cuda:3" is 3."""
    return int(stage.device.name.rpartition(":")[2])


async def place_again(spec: StageSpec, card: bytes, placement: Placement) -> None:
    """A new worker where `spec`'s one died: on the same node, with what was set aside for it.

    Raises ModelUnavailableError when the node is gone, or nothing starts there.
    """
    seat = placement.seats[spec.index]
    if not await is_there(seat.node_id):
        raise ModelUnavailableError(f"node {seat.node}, which held stage {spec.index}, left the cluster")
    if seat.group not in placement.groups:
        raise ModelUnavailableError(f"Ray has given away what was set aside for stage {spec.index} on {seat.node}")
    await _replace(spec, card, placement)
    coming = asyncio.ensure_future(call(placement.workers[spec.index].device.remote(), f"stage {spec.index}"))
    try:
        deadline = time.monotonic() + _PLACE_TIMEOUT_S
        while not (await asyncio.wait([coming], timeout=1.0))[0]:
            if not await is_there(seat.node_id):
                raise ModelUnavailableError(f"node {seat.node}, which held stage {spec.index}, left the cluster")
            if time.monotonic() > deadline:
                raise ModelUnavailableError(
                    f"no worker came up on node {seat.node} for stage {spec.index} in {_PLACE_TIMEOUT_S:.0f} s, in the "
                    "place of one that died: look into Ray's logs there"
                )
        await coming
    finally:
        coming.cancel()


async def place_elsewhere(stage: PlannedStage, spec: StageSpec, card: bytes, placement: Placement) -> None:
    """A new worker for `spec` on the device of `stage`, in the place of a lost one. Raises OutOfMemoryError as `place`
    does."""
    seat = await _sit_anew(stage, placement)
    await kill(placement.workers[spec.index])
    worker = _start(placement, spec, card, seat, _again())
    await take_seat(spec.index, seat, worker, placement)


async def place_beside(stage: PlannedStage, spec: StageSpec, card: bytes, placement: Placement) -> tuple[Seat, Any]:
    """A second worker for `spec`, on the device of `stage`; the first one stays. To be given to `take_seat` or
    `leave_seat`. Raises OutOfMemoryError as `place` does."""
    seat = await _sit_anew(stage, placement)
    worker = _start(placement, spec, card, seat, _again())
    placement.beside.append(worker)
    return seat, worker


async def take_seat(index: int, seat: Seat, worker: Any, placement: Placement) -> None:
    """Puts a worker in the place of a stage's former one, which ends; gives back what that one sat on."""
    await kill(placement.workers[index])
    before, placement.seats[index] = placement.seats[index].group, seat
    placement.workers[index] = worker
    if worker in placement.beside:
        placement.beside.remove(worker)
    await _leave(before, placement)


async def leave_seat(seat: Seat, worker: Any, placement: Placement) -> None:
    """Ends a worker of `place_beside` that nobody has taken."""
    await kill(worker)
    if worker in placement.beside:
        placement.beside.remove(worker)
    await _leave(seat.group, placement)


async def leave_unused(placement: Placement) -> None:
    """Gives back groups that no stage sits on: what a move left that was interrupted by the end of its gateway."""
    for name in list(placement.groups):
        await _leave(name, placement)


async def _leave(name: str, placement: Placement) -> None:
    if name in placement.groups and all(seat.group != name for seat in placement.seats):
        with contextlib.suppress(Exception):
            await _remove(placement.groups.pop(name))


async def _sit_anew(stage: PlannedStage, placement: Placement) -> Seat:
    name = _group_name(placement.model, placement.load_id) + _again()
    try:
        (seat,) = await _sit([stage], placement, name)
    except BaseException:
        group = placement.groups.pop(name, None)
        if group is not None:
            await asyncio.shield(_remove(group))
        raise
    return seat


async def _replace(spec: StageSpec, card: bytes, placement: Placement) -> None:
    await kill(placement.workers[spec.index])
    placement.workers[spec.index] = _start(placement, spec, card, placement.seats[spec.index], _again())


async def kill(worker: Any) -> None:
    """Ends a worker that is taken for dead: Ray may only have lost sight of it, and two must not hold one stage."""
    with contextlib.suppress(Exception):
        await _blocking(lambda: ray.kill(worker, no_restart=True))


async def end_process(node_id: str, pid: int) -> None:
    """Ends a worker's process that answers nobody, and so not Ray either: what it holds must come free."""
    end = ray.remote(num_cpus=0, max_retries=0)(_end_process).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    with contextlib.suppress(Exception):
        await asyncio.wait_for(_blocking(lambda: ray.get(end.remote(pid), timeout=_END_TIMEOUT_S)), _END_TIMEOUT_S + 1)


def _end_process(pid: int) -> None:
    with contextlib.suppress(OSError):
        # By its name: the number may be another process's by now.
        if StageWorker.__name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


async def is_there(node_id: str) -> bool:
    """Whether a node answers: not just in Ray's books, which it leaves many seconds after its end."""
    nodes = [node for node in await _blocking(ray.nodes) if node["NodeID"] == node_id and node["Alive"]]
    return bool(nodes) and await _answers(nodes[0])


async def silent_nodes() -> set[str]:
    """Ids of the nodes that Ray takes for alive, and that don't answer."""
    nodes = [node for node in await _blocking(ray.nodes) if node["Alive"]]
    answers = await asyncio.gather(*(_answers(node) for node in nodes))
    return {node["NodeID"] for node, answered in zip(nodes, answers, strict=True) if not answered}


async def _answers(node: Mapping[str, Any]) -> bool:
    try:
        _, writer = await asyncio.wait_for(
            asyncio.open_connection(node["NodeManagerAddress"], node["NodeManagerPort"]), _KNOCK_TIMEOUT_S
        )
    except (OSError, asyncio.TimeoutError, TimeoutError):
        return False
    writer.close()
    return True


def _start(placement: Placement, spec: StageSpec, card: bytes, seat: Seat, again: str = "") -> Any:
    """A handle for the stage's worker, which comes up by itself."""
    actor = ray.remote(StageWorker).options(
        name=_actor_name(spec, again),
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        num_gpus=seat.slots,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement.groups[seat.group], placement_group_bundle_index=seat.bundle
        ),
    )
    return actor.remote(spec.to_json(), card)


# Ray's blocking calls get threads of their own: those that free something must not wait behind a slow Hub.
_threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="placement")


async def _blocking(function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *arguments)


async def _remove(group: PlacementGroup) -> None:
    """Returns once the nodes have their resources back: when the group is really gone."""
    await _blocking(remove_placement_group, group)
    for _ in range(50):
        if (await _blocking(placement_group_table, group)).get("state") in (None, "REMOVED"):
            return
        await asyncio.sleep(0.1)


def _gpus_of_nodes() -> Counter[str]:
    return Counter({node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]})


async def _stop(worker: Any) -> None:
    with contextlib.suppress(RayError):
        await worker.stop.remote()


def _bundle(stage: PlannedStage) -> dict[str, float]:
    """What Ray sets aside for a stage: its GPU, or as much of the node's memory as the plan counts on."""
    if stage.device.slots:
        return {"GPU": stage.device.slots}
    return {"memory": stage.resident_bytes + stage.workspace_bytes + stage.kv_budget_bytes}


async def call(reference: Any, what: str) -> Any:
    """Awaits a worker's answer; what it raised is raised here as itself, its death as WorkerDiedError."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ShardliftError):
            raise cause from None
        raise
    except RayError as error:
        raise WorkerDiedError(f"the worker of {what} died: {one_line(error, 200)}") from None


async def find_placements() -> list[Placement]:
    """Every load of which something still exists, be it its card alone; with workers in no particular order."""
    found: dict[str, Placement] = {}

    def of(load: str) -> Placement:
        model, load_id = load.rsplit(":", 1)
        return found.setdefault(load, Placement(model=model, load_id=load_id))

    groups = {group["name"]: group for group in placement_group_table().values() if group["state"] != "REMOVED"}
    for name in groups:
        if name.startswith(_GROUP_PREFIX):
            of(name.removeprefix(_GROUP_PREFIX).partition("~")[0]).groups[name] = get_placement_group(name)
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] != NAMESPACE or not entry["name"].startswith(_STAGE_PREFIX):
            continue
        placement = of(entry["name"].removeprefix(_STAGE_PREFIX).rsplit(":", 1)[0])
        with contextlib.suppress(ValueError):
            placement.workers.append(ray.get_actor(entry["name"], namespace=NAMESPACE))
    for load, card in (await _blocking(cards.find)).items():
        of(load).card = card
    return list(found.values())
