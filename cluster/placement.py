"""Stages onto their nodes and devices: a detached placement group and detached, named actors. Ray's side of a load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..proto.v1.errors import ModelUnavailableError, OutOfMemoryError, ShardliftError, WorkerDiedError, one_line
from ..worker.actor import StageWorker
from ..worker.spec import StageSpec
from . import gpu_ids
from .plan import Plan, PlannedStage

logger = logging.getLogger(__name__)
T = TypeVar("T")

NAMESPACE = "shardlift"
_STAGE_PREFIX = "stage:"
_GROUP_PREFIX = "shardlift:"
_PLACE_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0


def _actor_name(spec: StageSpec, attempt: int) -> str:
    # Ray may hold a dead one's name for a moment.
    again = f"~{attempt}" if attempt else ""
    return f"{_STAGE_PREFIX}{spec.model}:{spec.load_id}:{spec.index}{again}"


def _group_name(model: str, load_id: str) -> str:
    return f"{_GROUP_PREFIX}{model}:{load_id}"


@dataclass
class Placement:
    """What a load holds of the cluster: a placement group and the workers in it."""

    model: str
    load_id: str
    group: PlacementGroup | None = None
    workers: list[Any] = field(default_factory=list)
    bundles: list[int] = field(default_factory=list)  # of the group, for each stage; only while it loads
    _freeing: asyncio.Future[None] | None = None

    async def free(self) -> None:
        """Stops the workers and gives everything back. Never raises; whoever else calls it waits for the same end."""
        if self._freeing is None:
            self._freeing = asyncio.ensure_future(self._free())
        await asyncio.shield(self._freeing)

    async def _free(self) -> None:
        stops = [asyncio.ensure_future(_stop(worker)) for worker in self.workers]
        if stops:
            _, late = await asyncio.wait(stops, timeout=_STOP_TIMEOUT_S)
            for stop in late:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)
        for worker in self.workers:
            with contextlib.suppress(Exception):
                ray.kill(worker, no_restart=True)
        if self.group is not None:
            try:
                await _remove(self.group)
            except Exception as error:
                logger.warning("the placement group of %s may be left: %s", self.model, one_line(error, 200))


async def place(plan: Plan, specs: Sequence[StageSpec], card: bytes, placement: Placement) -> None:
    """Starts a worker for each spec on the very node and device of the plan; `placement` is filled as things come to
    be.

    Raises OutOfMemoryError when the cluster no longer has what the plan counted on.
    """
    await _set_aside(plan, placement)
    placement.bundles = list(range(len(plan.stages)))
    gpus = await _blocking(_gpus_of_nodes)
    of_node: dict[str, list[int]] = {}
    for index, stage in enumerate(plan.stages):
        if stage.device.slots and gpus[stage.device.node_id] > 1:
            of_node.setdefault(stage.device.node_id, []).append(index)
    if of_node:
        await _match(plan, placement, of_node, gpus)
    assert placement.group is not None
    for stage, spec in zip(plan.stages, specs, strict=True):
        bundle = placement.bundles[spec.index]
        placement.workers.append(_start(placement.group, bundle, stage, spec, card))


async def _set_aside(plan: Plan, placement: Placement) -> None:
    """A placement group with a bundle for each stage, on its node."""
    placement.group = placement_group(
        [_bundle(stage) for stage in plan.stages],
        strategy="PACK",
        lifetime="detached",
        name=_group_name(placement.model, placement.load_id),
        bundle_label_selector=[{"ray.io/node-id": stage.device.node_id} for stage in plan.stages],
    )
    if not await _blocking(placement.group.wait, _PLACE_TIMEOUT_S):
        raise OutOfMemoryError(
            f"Ray could not set {len(plan.stages)} devices aside for {placement.model} in {_PLACE_TIMEOUT_S:.0f} s: "
            "something else holds them; unload a model, or load with fewer stages"
        )


async def _match(
    plan: Plan, placement: Placement, of_node: Mapping[str, Sequence[int]], gpus: Mapping[str, int]
) -> None:
    """Gives each stage of these nodes, which have several GPUs, the bundle that holds its own one."""
    wanted = {node_id: {_number(plan, index): index for index in stages} for node_id, stages in of_node.items()}
    found = await _numbers(placement, of_node)
    if any(set(found[node_id]) != set(wanted[node_id]) for node_id in of_node):
        # Ray picked others. It picks anew, on every node, when what it may pick from is what is wanted.
        assert placement.group is not None
        await _remove(placement.group)
        others: list[PlacementGroup] = []
        try:
            for node_id in of_node:
                others += await _held(node_id, set(wanted[node_id]), gpus[node_id])
            await _set_aside(plan, placement)
        finally:
            await _blocking(gpu_ids.release, others)
        found = await _numbers(placement, of_node)
    for node_id, stages in of_node.items():
        if set(found[node_id]) != set(wanted[node_id]):
            raise OutOfMemoryError(
                f"Ray gave GPUs {sorted(found[node_id])} of {plan.stages[stages[0]].device.node} and not "
                f"{sorted(wanted[node_id])}: something else took them meanwhile; load again"
            )
        for bundle, number in zip(stages, found[node_id], strict=True):
            placement.bundles[wanted[node_id][number]] = bundle


async def _numbers(placement: Placement, of_node: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The GPUs that the bundles hold, by node."""
    bundles = [(placement.group, bundle) for stages in of_node.values() for bundle in stages]
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


def _number(plan: Plan, index: int) -> int:
    """Of a stage's GPU: "cuda:3" is 3."""
    return int(plan.stages[index].device.name.rpartition(":")[2])


async def place_again(plan: Plan, spec: StageSpec, card: bytes, placement: Placement, attempt: int) -> None:
    """A new worker where `spec`'s one died: on the same node, with what was set aside for it.

    attempt: 1 for the first time, and so on. Raises ModelUnavailableError when the node is gone, or nothing starts
    there.
    """
    stage = plan.stages[spec.index]
    nodes = {node["NodeID"]: node["Alive"] for node in await _blocking(ray.nodes)}
    if not nodes.get(stage.device.node_id):
        raise ModelUnavailableError(
            f"node {stage.device.node} left the cluster while stage {spec.index} was loading there: load it again"
        )
    assert placement.group is not None
    bundle = placement.bundles[spec.index]
    with contextlib.suppress(Exception):
        # Ray may only have lost sight of it: two workers must not hold one stage.
        ray.kill(placement.workers[spec.index], no_restart=True)
    worker = placement.workers[spec.index] = _start(placement.group, bundle, stage, spec, card, attempt)
    try:
        await asyncio.wait_for(call(worker.device.remote(), f"stage {spec.index}"), _PLACE_TIMEOUT_S)
    except (asyncio.TimeoutError, TimeoutError):
        raise ModelUnavailableError(
            f"no worker came up on node {stage.device.node} for stage {spec.index} in {_PLACE_TIMEOUT_S:.0f} s, in the "
            "place of one that died: look into Ray's logs there"
        ) from None


def _start(
    group: PlacementGroup, bundle: int, stage: PlannedStage, spec: StageSpec, card: bytes, attempt: int = 0
) -> Any:
    """A handle for the stage's worker, which comes up by itself."""
    actor = ray.remote(StageWorker).options(
        name=_actor_name(spec, attempt),
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        num_gpus=stage.device.slots,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
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
    return {"memory": stage.resident_bytes + stage.workspace_bytes + stage.kv_bytes}


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
    """Every load of which something still exists, with workers in no particular order."""
    found: dict[str, Placement] = {}
    groups = {group["name"]: group for group in placement_group_table().values() if group["state"] != "REMOVED"}
    for name in groups:
        if name.startswith(_GROUP_PREFIX):
            model, load_id = name.removeprefix(_GROUP_PREFIX).rsplit(":", 1)
            found[name] = Placement(model=model, load_id=load_id, group=get_placement_group(name))
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] != NAMESPACE or not entry["name"].startswith(_STAGE_PREFIX):
            continue
        model, load_id, _ = entry["name"].removeprefix(_STAGE_PREFIX).rsplit(":", 2)
        placement = found.setdefault(_group_name(model, load_id), Placement(model=model, load_id=load_id))
        with contextlib.suppress(ValueError):
            placement.workers.append(ray.get_actor(entry["name"], namespace=NAMESPACE))
    return list(found.values())
