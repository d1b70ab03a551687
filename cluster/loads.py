"""One load: stages told to load, watched, joined to a ring, tried out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelUnavailableError, ShardliftError, one_line
from ..worker.records import HubToken, SourceSpec
from ..worker.spec import LoadReport, StageSpec
from .placement import call
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.25
_PROGRESS_TIMEOUT_S = 2.0


async def load_stages(
    workers: Sequence[Any],
    specs: Sequence[StageSpec],
    token: HubToken,
    tell: Callable[[registry_pb2.StageProgress], None],
) -> list[LoadReport]:
    """Loads all stages at once, telling how far each is. The first failure is raised, whatever the others do."""
    loads = [
        asyncio.ensure_future(call(worker.load.remote(token), f"stage {index}")) for index, worker in enumerate(workers)
    ]
    watch = asyncio.create_task(_watch(workers, specs, loads, tell))
    try:
        reports = await asyncio.gather(*loads)
    finally:
        watch.cancel()
        for load in loads:
            load.cancel()
        await asyncio.gather(watch, *loads, return_exceptions=True)
    for index, (spec, report) in enumerate(zip(specs, reports, strict=True)):
        tell(_done(index, spec, report))
    return reports


async def _watch(
    workers: Sequence[Any],
    specs: Sequence[StageSpec],
    loads: Sequence[asyncio.Future[LoadReport]],
    tell: Callable[[registry_pb2.StageProgress], None],
) -> None:
    """Tells of each stage at intervals, and of its end once. A worker that hangs holds nobody else up."""
    told: set[int] = set()

    async def look(index: int) -> None:
        load, spec = loads[index], specs[index]
        if load.done():
            if not load.cancelled() and load.exception() is None:
                told.add(index)
                tell(_done(index, spec, load.result()))
            return
        with contextlib.suppress(ShardliftError, asyncio.TimeoutError, TimeoutError):
            fetched, tensors = await asyncio.wait_for(
                call(workers[index].progress.remote(), f"stage {index}"), _PROGRESS_TIMEOUT_S
            )
            progress = registry_pb2.StageProgress(
                stage=index,
                fetched_bytes=fetched,
                fetch_bytes=spec.fetch_bytes,
                tensors_loaded=tensors,
                tensors=len(spec.records),
            )
            tell(progress)

    while True:
        await asyncio.gather(*(look(index) for index in range(len(workers)) if index not in told))
        await asyncio.sleep(_PROGRESS_INTERVAL_S)


def _done(index: int, spec: StageSpec, report: LoadReport) -> registry_pb2.StageProgress:
    return registry_pb2.StageProgress(
        stage=index,
        fetched_bytes=report.fetched_bytes,
        fetch_bytes=spec.fetch_bytes,
        tensors_loaded=len(spec.records),
        tensors=len(spec.records),
        resident_bytes=report.measured_bytes,
        done=True,
    )


async def join_ring(workers: Sequence[Any], addresses: Sequence[str]) -> None:
    """Tells each stage its next one, and the last the first."""
    await asyncio.gather(
        *(
            call(worker.join.remote(addresses[(index + 1) % len(addresses)]), f"stage {index}")
            for index, worker in enumerate(workers)
        )
    )


async def actual_device(worker: Any, index: int, planned: str) -> str:
    """Ray chooses among a node's GPUs; the map tells which one it was."""
    actual = str(await call(worker.device.remote(), f"stage {index}"))
    return actual if actual.startswith("cuda") else planned


def residency(index: int, report: LoadReport) -> registry_pb2.StageResidency:
    """What a worker measured, as it goes over the wire."""
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


async def tokenizer_or_none(source: SourceSpec, token: HubToken) -> Tokenizer | None:
    """Read while the token is at hand. A checkpoint may well have none: a text request will say so."""
    try:
        return await asyncio.to_thread(Tokenizer, source, token)
    except ShardliftError as error:
        logger.info("no tokenizer: %s", one_line(error))
        return None


def check_complete(stages: Sequence[int], spec: StageSpec) -> None:
    """Raises ModelUnavailableError unless `stages` are all of a load's."""
    if sorted(stages) != list(range(spec.num_stages)):
        raise ModelUnavailableError(f"only stages {sorted(stages)} of {spec.num_stages} are left")
