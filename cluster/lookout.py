"""The cluster as it is now, put together for those who look: the registry, the stages' own words, and Ray's.

Nobody is asked while nobody looks. Whoever looks within a second of another gets what that one got.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelNotFoundError, one_line
from ..worker.metrics import StageStatus
from .inventory import Inventory
from .placement import call
from .registry import Entry, Registry

logger = logging.getLogger(__name__)

LEAST_INTERVAL_S = 1.0
_STATUS_TIMEOUT_S = 1.5
_FRESH_S = 0.9
_MOST_NODES_AGE_S = 10.0


class Lookout:
    """All methods run on the registry's event loop."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._inventory = Inventory()
        # Its own: a node that doesn't answer must not hold a load up.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inventory")
        self._nodes: list[registry_pb2.NodeView] = []
        self._nodes_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[registry_pb2.ClusterView] | None = None
        self._looked_s = float("-inf")

    async def view(self, model: str = "") -> registry_pb2.ClusterView:
        """Everything, or what concerns `model` alone. Raises ModelNotFoundError for one that isn't there."""
        if model:
            self._registry.model(model)
        view = await self._fresh()
        if not model:
            return view
        of_model = next((each for each in view.models if each.name == model), None)
        while of_model is None:
            # It came after the last look, or it isn't there.
            self._registry.model(model)
            self._looked_s = float("-inf")
            view = await self._fresh()
            of_model = next((each for each in view.models if each.name == model), None)
        places = {stage.node for stage in of_model.stages}
        return registry_pb2.ClusterView(
            unix_s=view.unix_s,
            nodes=[node for node in view.nodes if node.node in places],
            models=[of_model],
            events=[event for event in view.events if event.model == model],
        )

    async def watch(self, model: str = "", interval_s: float = 0.0) -> AsyncIterator[registry_pb2.ClusterView]:
        """`view`, whenever it is another one; to the end of `model`, or for ever."""
        last = b""
        if model:
            self._registry.model(model)
        while not model or self._registry.has(model):
            try:
                view = await self.view(model)
            except ModelNotFoundError:
                return
            compared = registry_pb2.ClusterView()
            compared.CopyFrom(view)
            compared.unix_s = 0.0
            if (now := compared.SerializeToString(deterministic=True)) != last:
                last = now
                yield view
            await asyncio.sleep(max(interval_s, LEAST_INTERVAL_S))

    async def close(self) -> None:
        for task in (self._looking, self._asking):
            if task is not None:
                task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _fresh(self) -> registry_pb2.ClusterView:
        if self._looking is None or (self._looking.done() and time.monotonic() - self._looked_s > _FRESH_S):
            self._looked_s = time.monotonic()
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> registry_pb2.ClusterView:
        await self._ask_for_nodes()
        entries = self._registry.entries()
        models = await asyncio.gather(*(self._model(entry) for entry in entries))
        return registry_pb2.ClusterView(
            unix_s=time.time(), nodes=self._nodes, models=models, events=self._registry.events.of()
        )

    async def _ask_for_nodes(self) -> None:
        """Has the nodes anew, or what was known of them while they take their time."""

        async def ask() -> None:
            loop = asyncio.get_running_loop()
            try:
                self._nodes = await loop.run_in_executor(self._thread, self._inventory.nodes)
                self._nodes_s = time.monotonic()
            except Exception as error:
                logger.warning("the nodes can't be told: %s", one_line(error, 200))

        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(ask())
        patience_s = _STATUS_TIMEOUT_S if time.monotonic() - self._nodes_s < _MOST_NODES_AGE_S else _MOST_NODES_AGE_S
        await asyncio.wait([self._asking], timeout=patience_s)

    async def _model(self, entry: Entry) -> registry_pb2.ModelView:
        info = entry.info
        view = registry_pb2.ModelView(
            name=info.name,
            state=info.state,
            reason=info.reason,
            path=info.path,
            quantization=info.plan.quantization,
            recoveries=info.recoveries,
            recovery_seconds=info.recovery_seconds,
            load_seconds=entry.load_seconds,
            kv_tokens=info.plan.kv_tokens,
        )
        is_loading = info.state == registry_pb2.MODEL_STATE_LOADING
        workers = list(entry.placement.workers)
        statuses = [None] * len(workers) if is_loading else await asyncio.gather(*map(_status, workers))
        measured = {stage.stage: stage.measured_bytes for stage in info.residency}
        for stage in info.plan.stages:
            status = statuses[stage.index] if stage.index < len(statuses) else None
            view.stages.append(
                registry_pb2.StageView(
                    index=stage.index,
                    node=stage.node,
                    device=stage.device,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    resident_bytes=measured.get(stage.index, stage.resident_bytes),
                    workspace_bytes=stage.workspace_bytes,
                    kv_bytes=0 if status is None else status.kv_bytes,
                    kv_budget_bytes=stage.kv_budget_bytes,
                    sessions=0 if status is None else status.sessions,
                    answers=status is not None,
                    progress=entry.progress.get(stage.index) if is_loading else None,
                )
            )
        if statuses and (last := statuses[-1]) is not None:
            view.sessions_running, view.sessions_waiting = last.running, last.waiting
            view.max_sessions, view.reserved_tokens = last.max_sessions, last.reserved_tokens
            view.generated_tokens, view.tokens_per_second = last.generated_tokens, last.tokens_per_second
        return view


async def _status(worker: object) -> StageStatus | None:
    """What a stage says of itself; None where it doesn't answer."""
    if worker is None:
        return None
    try:
        status: StageStatus = await asyncio.wait_for(
            call(worker.status.remote(), "a stage"),  # type: ignore[attr-defined] # a handle of Ray's
            _STATUS_TIMEOUT_S,
        )
    except Exception:
        # It is lost, or hangs; the model's state tells of it as soon as it is known.
        return None
    return status
