"""Stages onto their nodes and devices: a detached placement group and detached, named actors. Ray's side of a load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..proto.v1.errors import ModelUnavailableError, OutOfMemoryError, ShardliftError, one_line
from ..worker.actor import StageWorker
from ..worker.spec import StageSpec
from .plan import Plan, PlannedStage

logger = logging.getLogger(__name__)

NAMESPACE = "shardlift"
_STAGE_PREFIX = "stage:"
_PLACE_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0


def _actor_name(spec: StageSpec) -> str:
    return f"{_STAGE_PREFIX}{spec.model}:{spec.load_id}:{spec.index}"


def _group_name(model: str, load_id: str) -> str:
    return f"shardlift:{model}:{load_id}"


@dataclass
class Placement:
    """What a load holds of the cluster: a placement group and the workers in it."""

    model: str
    load_id: str
    group: PlacementGroup | None = None
    workers: list[Any] = field(default_factory=list)

    async def free(self) -> None:
        """Stops the workers and gives everything back. Never raises; twice is as good as once."""
        workers, self.workers = self.workers, []
        group, self.group = self.group, None
        if workers:
            stops = [asyncio.ensure_future(_wait(worker.stop.remote())) for worker in workers]
            await asyncio.wait(stops, timeout=_STOP_TIMEOUT_S)
            for stop in stops:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)
            for worker in workers:
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(worker, no_restart=True)
        if group is not None:
            with contextlib.suppress(RayError, ValueError):
                await asyncio.to_thread(remove_placement_group, group)


async def place(plan: Plan, specs: Sequence[StageSpec], card: bytes, placement: Placement) -> None:
    """Starts a worker for each spec where the plan wants it; `placement` is filled as things come to be.

    Raises OutOfMemoryError when the cluster no longer has what the plan counted on.
    """
    placement.group = placement_group(
        [_bundle(stage) for stage in plan.stages],
        strategy="PACK",
        lifetime="detached",
        name=_group_name(placement.model, placement.load_id),
        bundle_label_selector=[{"ray.io/node-id": stage.device.node_id} for stage in plan.stages],
    )
    if not await asyncio.to_thread(placement.group.wait, _PLACE_TIMEOUT_S):
        raise OutOfMemoryError(
            f"Ray could not set {len(plan.stages)} devices aside for {placement.model} in {_PLACE_TIMEOUT_S:.0f} s: "
            "something else holds them; unload a model, or load with fewer stages"
        )
    for index, (stage, spec) in enumerate(zip(plan.stages, specs, strict=True)):
        actor = ray.remote(StageWorker).options(
            name=_actor_name(spec),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            num_gpus=stage.device.slots,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=index),
        )
        placement.workers.append(actor.remote(spec.to_json(), card))


def _bundle(stage: PlannedStage) -> dict[str, float]:
    """What Ray sets aside for a stage: its GPU, or as much of the node's memory as it will hold."""
    if stage.device.slots:
        return {"GPU": stage.device.slots}
    return {"memory": stage.resident_bytes}


async def call(reference: Any, what: str) -> Any:
    """Awaits a worker's answer; what it raised is raised here as itself, its death as ModelUnavailableError."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ShardliftError):
            raise cause from None
        raise
    except RayActorError as error:
        raise ModelUnavailableError(f"the worker of {what} died: {one_line(error, 200)}") from None


async def _wait(reference: Any) -> None:
    with contextlib.suppress(RayError):
        await reference


async def find_placements() -> list[Placement]:
    """Every load whose workers still exist, with workers in no particular order."""
    found: dict[tuple[str, str], Placement] = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] != NAMESPACE or not entry["name"].startswith(_STAGE_PREFIX):
            continue
        model, load_id, _ = entry["name"].removeprefix(_STAGE_PREFIX).rsplit(":", 2)
        placement = found.setdefault((model, load_id), Placement(model=model, load_id=load_id))
        with contextlib.suppress(ValueError):
            placement.workers.append(ray.get_actor(entry["name"], namespace=NAMESPACE))
    for placement in found.values():
        with contextlib.suppress(ValueError):
            placement.group = get_placement_group(_group_name(placement.model, placement.load_id))
    return list(found.values())
