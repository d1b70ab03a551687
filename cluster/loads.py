"""One load: stages told to load, watched, joined to a ring, tried out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelUnavailableError, ShardliftError, WorkerDiedError, one_line
from ..proto.v1.wire import FRAME_BYTES
from ..worker.records import HubToken, SourceSpec
from ..worker.spec import LoadReport, ModuleBytes, StageSpec
from .pace import Pace
from .placement import call
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.25
_PROGRESS_TIMEOUT_S = 2.0
_RESPAWNS = 2  # of one stage during one load: what kills every worker will kill the next one too


async def load_stages(
    workers: Sequence[Any],
    specs: Sequence[StageSpec],
    token: HubToken,
    tell: Callable[[registry_pb2.StageProgress], None],
    placed: Callable[[int], Awaitable[None]],
    respawn: Callable[[int, WorkerDiedError], Awaitable[None]],
    traceparent: str = "",
) -> list[LoadReport]:
    """Loads all stages at once, telling how far each is. The first failure is raised, whatever the others do.

    A worker that dies is put in its place in `workers` again by `respawn`, and loads its own part anew. `placed` is
    awaited before each stage's load, whenever it has a worker.
    """

    async def load(index: int) -> LoadReport:
        deaths = 0
        death: WorkerDiedError | None = None
        while True:
            try:
                if death is not None:
                    await respawn(index, death)  # which may die, too
                await placed(index)
                report: LoadReport = await call(workers[index].load.remote(token, traceparent), f"stage {index}")
                return report
            except WorkerDiedError as error:
                deaths, death = deaths + 1, error
                if deaths > _RESPAWNS:
                    raise ModelUnavailableError(
                        f"{one_line(error)}; {deaths} workers of this stage died while loading: look into its node's "
                        "memory and Ray's logs"
                    ) from None

    loading = [asyncio.ensure_future(load(index)) for index in range(len(workers))]
    watch = asyncio.create_task(_watch(workers, specs, loading, tell))
    try:
        reports = await asyncio.gather(*loading)
    finally:
        watch.cancel()
        for one in loading:
            one.cancel()
        await asyncio.gather(watch, *loading, return_exceptions=True)
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
    paces = [Pace() for _ in workers]

    async def look(index: int) -> None:
        load = loads[index]
        if load.done():
            if not load.cancelled() and load.exception() is None:
                told.add(index)
                tell(_done(index, specs[index], load.result()))
            return
        with contextlib.suppress(Exception):  # whatever one stage's answer is, the others' are told
            snapshot = await asyncio.wait_for(
                call(workers[index].progress.remote(), f"stage {index}"), _PROGRESS_TIMEOUT_S
            )
            tell(paces[index].progress(index, snapshot, time.monotonic()))

    while True:
        await asyncio.gather(*(look(index) for index in range(len(workers)) if index not in told))
        await asyncio.sleep(_PROGRESS_INTERVAL_S)


def _done(index: int, spec: StageSpec, report: LoadReport) -> registry_pb2.StageProgress:
    bytes_ = report.cached_bytes or report.fetched_bytes
    return registry_pb2.StageProgress(
        stage=index,
        fetched_bytes=bytes_,
        fetch_bytes=report.cached_bytes or spec.fetch_bytes,
        tensors_loaded=len(spec.records),
        tensors=len(spec.records),
        resident_bytes=report.measured_bytes,
        done=True,
        bytes_per_second=bytes_ / report.seconds if report.seconds else 0.0,
        cached=bool(report.cached_bytes),
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
    """What the worker has, as it counts it; CPU workers share a node, and know of no number."""
    actual = str(await call(worker.device.remote(), f"stage {index}"))
    return actual if ":" in actual else planned


def footprint(reports: Sequence[LoadReport]) -> registry_pb2.Footprint:
    """What all workers hold, as transformers counts it."""
    return registry_pb2.Footprint(
        parameter_bytes=sum(report.parameter_bytes for report in reports),
        buffer_bytes=sum(report.buffer_bytes for report in reports),
    )


def residency(index: int, report: LoadReport, more: Sequence[ModuleBytes] = ()) -> registry_pb2.StageResidency:
    """What a worker measured, as it goes over the wire; with `more` modules, which came after its load."""
    return registry_pb2.StageResidency(
        stage=index,
        measured_bytes=report.measured_bytes + sum(module.size_bytes for module in more),
        fetched_bytes=report.fetched_bytes,
        load=registry_pb2.StageLoad(
            seconds=report.seconds,
            cached_bytes=report.cached_bytes,
            phases=[
                registry_pb2.PhaseTime(name=phase.name, seconds=phase.seconds, bytes=phase.bytes_)
                for phase in report.phases
            ],
            bottleneck=report.bottleneck,
            link=report.link,
            connections=report.connections,
        ),
        modules=[
            registry_pb2.ModuleResidency(
                module=module.module, dtype=module.dtype, bytes=module.size_bytes, device=module.device
            )
            for module in (*report.modules, *more)
        ],
    )


async def traces(workers: Sequence[Any]) -> AsyncIterator[registry_pb2.LoadTrace]:
    """The timelines of all stages' loads, in pieces that fit into a message."""
    for index, worker in enumerate(workers):
        events = await call(worker.trace.remote(), f"stage {index}")
        text = json.dumps(events, separators=(",", ":")).encode()
        for start in range(0, len(text), FRAME_BYTES):
            piece = text[start : start + FRAME_BYTES]
            yield registry_pb2.LoadTrace(stage=index, json=piece, last=start + FRAME_BYTES >= len(text))


async def tokenizer_or_none(source: SourceSpec, token: HubToken, trust_remote_code: bool) -> Tokenizer | None:
    """Read while the token is at hand. A checkpoint may well have none: a text request will say so."""
    try:
        return await asyncio.to_thread(Tokenizer, source, token, trust_remote_code)
    except ShardliftError as error:
        logger.info("no tokenizer: %s", one_line(error))
        return None
