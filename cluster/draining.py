"""A node is drained: its stages are loaded elsewhere while they serve, then the ring is closed over the new ones.

What comes first is the question whether there is room for all of them; until that is answered nothing is touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayError

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelUnavailableError, OutOfMemoryError, ShardliftError, one_line
from . import nodes
from .devices import Device
from .moves import Shortage, choose
from .nodes import Node
from .placement import silent_nodes
from .resident import Resident
from .topology import discover

_DISCOVER_TIMEOUT_S = 90.0
_SETTLE_S = 0.1


class Draining(Protocol):
    """A model of the registry, as far as a drain is concerned with it."""

    info: registry_pb2.ModelInfo
    load: asyncio.Task[None] | None
    resident: Resident | None
    discarding: asyncio.Task[None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """What a drain takes of the registry. held: the devices that models hold. placing: held while devices are chosen.
    switch: has a model take its replacements into use; returns when it has."""

    entries: Callable[[], Sequence[Draining]]
    held: Callable[[], Collection[str]]
    placing: asyncio.Lock
    switch: Callable[[Any], Awaitable[None]]


async def drain(node: Node, registered: Registered) -> AsyncIterator[registry_pb2.StageMove]:
    """Moves every stage off `node`; tells of each move twice: when it begins, and (with its seconds) when it is done.

    The node is marked before the first move. Raises OutOfMemoryError where there is no room, with nothing touched.
    """
    residents = [entry.resident for entry in registered.entries() if entry.resident is not None and _is_there(entry)]
    there = [(resident, indices) for resident in residents if (indices := resident.stages_on(node.node_id))]
    for resident, indices in there:
        await resident.prepare_moves(indices)
    async with registered.placing:
        await _choose(node, [pair for resident, indices in there for pair in _pairs(resident, indices)], registered)
        if not node.by_ray:
            await asyncio.to_thread(lambda: nodes.mark(node.node_id, drained=True))
    while (entry := _next(node, registered.entries())) is not None:
        if entry.load is not None and not entry.load.done():
            # It was on its way there when the node was marked.
            await asyncio.wait([entry.load])
            await asyncio.sleep(_SETTLE_S)  # a load that failed gives back what it has
            continue
        assert entry.resident is not None
        try:
            async for move in _move_model(node, entry, entry.resident, registered):
                yield move
        except ShardliftError:
            if entry.discarding is None:
                raise
            # It was unloaded meanwhile.


def _is_there(entry: Draining) -> bool:
    """Whether a model is neither on its way into the cluster nor out of it."""
    return entry.discarding is None and (entry.load is None or entry.load.done())


def _next(node: Node, entries: Sequence[Draining]) -> Draining | None:
    """A model with a stage on the node."""
    for entry in entries:
        if entry.discarding is not None:
            continue
        if entry.resident is not None and entry.resident.stages_on(node.node_id):
            return entry
        is_coming = entry.load is not None and not entry.load.done()
        if is_coming and any(stage.node == node.name for stage in entry.info.plan.stages):
            return entry
    return None


async def _move_model(
    node: Node, entry: Draining, resident: Resident, registered: Registered
) -> AsyncIterator[registry_pb2.StageMove]:
    indices = resident.stages_on(node.node_id)
    await resident.prepare_moves(indices)
    loading: list[asyncio.Future[None]] = []
    moves: list[registry_pb2.StageMove] = []
    began_s = time.monotonic()
    try:
        async with registered.placing:
            devices = await _choose(node, _pairs(resident, indices), registered)
            for index, device in zip(indices, devices, strict=True):
                seat, worker = await resident.seat_beside(index, device)
                loading.append(asyncio.ensure_future(resident.load_beside(index, device, seat, worker)))
                stage = entry.info.plan.stages[index]
                moves.append(
                    registry_pb2.StageMove(
                        model=entry.info.name,
                        stage=index,
                        from_node=stage.node,
                        from_device=stage.device,
                        to_node=device.node,
                        to_device=device.name,
                    )
                )
        for move in moves:
            yield move
        await asyncio.gather(*loading)
        loaded_s = time.monotonic()
        await registered.switch(entry)
        now_s = time.monotonic()
        for move in moves:
            move.seconds, move.pause_seconds = now_s - began_s, now_s - loaded_s
            yield move
    finally:
        for one in loading:
            one.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await resident.drop_replacements()


def _pairs(resident: Resident, indices: Sequence[int]) -> list[tuple[Resident, int]]:
    return [(resident, index) for index in indices]


async def _choose(node: Node, stages: Sequence[tuple[Resident, int]], registered: Registered) -> list[Device]:
    """Devices for these stages, on other nodes. Raises OutOfMemoryError where there is not room for all of them."""
    if not stages:
        return []
    without = {node.node_id, *await silent_nodes()}
    try:
        devices = await asyncio.wait_for(asyncio.to_thread(discover, registered.held(), without), _DISCOVER_TIMEOUT_S)
    except RayError as error:
        raise ModelUnavailableError(f"the devices can't be told: {one_line(error, 200)}; drain again") from None
    found = choose([resident.need(index) for resident, index in stages], devices)
    if isinstance(found, Shortage):
        raise OutOfMemoryError(
            f"node {node.name} can't be drained: {found}; unload a model or add a node, and drain again. "
            "No stage was moved"
        )
    return found
