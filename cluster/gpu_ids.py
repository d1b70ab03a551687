"""Which GPU of a node a bundle holds, and how to get the ones that a plan names.

Ray counts a node's GPUs, and picks which ones a bundle gets. So those that are not wanted are held for a moment, each
by a placement group of its own, until what is wanted is all that is free. Blocking.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Sequence

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..proto.v1.errors import OutOfMemoryError, one_line
from ..worker import own_gpus

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 60.0
_HOLD_TIMEOUT_S = 2.0


def ids_of(bundles: Sequence[tuple[PlacementGroup, int]]) -> list[int]:
    """The GPU that each of these bundles (a group's, by index) of one GPU holds, as its node counts them.

    Raises OutOfMemoryError.
    """
    probe = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(_own_number)
    references = [
        probe.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        ).remote()
        for group, bundle in bundles
    ]
    try:
        found: list[int] = ray.get(references, timeout=_PROBE_TIMEOUT_S)
    except RayError as error:
        raise OutOfMemoryError(f"a GPU that Ray set aside can't be used: {one_line(error, 200)}") from None
    return found


def free_ids(node_id: str, most: int) -> set[int]:
    """The GPUs of a node that nobody holds: they are held for a moment to learn of them. most: how many it has."""
    held = _hold(node_id, most)
    release(held)
    return set(held.values())


def hold_all_but(node_id: str, wanted: Collection[int], most: int) -> list[PlacementGroup]:
    """Holds the node's free GPUs except those `wanted`; the groups returned are the caller's to remove.

    most: how many GPUs the node has. Raises OutOfMemoryError where a wanted one isn't free.
    """
    held = _hold(node_id, most)
    missing = sorted(set(wanted) - set(held.values()))
    if missing:
        release(held)
        raise OutOfMemoryError(
            f"GPU {missing[0]} of the node is held by something that Ray knows of; free are {sorted(held.values())}: "
            "name others in device_map, or leave the choice to the plan"
        )
    release(group for group, number in held.items() if number in wanted)
    return [group for group, number in held.items() if number not in wanted]


def _hold(node_id: str, most: int) -> dict[PlacementGroup, int]:
    """A group for each GPU that could be had, and which one it holds.

    Not by Ray's count of what is free: that lags behind what was just given back.
    """
    held: list[PlacementGroup] = []
    try:
        while len(held) < most:
            held.append(placement_group([{"GPU": 1}], bundle_label_selector=[{"ray.io/node-id": node_id}]))
            if not held[-1].wait(_HOLD_TIMEOUT_S):
                release([held.pop()])
                break
        return dict(zip(held, ids_of([(group, 0) for group in held]), strict=True))
    except BaseException:
        release(held)
        raise


def release(groups: Iterable[PlacementGroup]) -> None:
    """Removes them all, whatever happens on the way."""
    for group in list(groups):
        with contextlib.suppress(Exception):
            remove_placement_group(group)


def _own_number() -> int:
    number = own_gpus.own()
    assert number is not None
    return number
