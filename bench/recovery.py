"""A stage's worker killed in the middle of a stream: how long until the next token, beside what a reload takes.

The lost stage comes back from the node's cache of quantized parts. What that alone takes is measured before: a load of
the whole model by one worker, from the cache, from the moment its plan is made until it is ready. It starts a process,
imports, reads, and answers a canary, as a stage that is brought back does.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from typing import Any

import psutil

from shardlift.client.connection import Client
from shardlift.client.handle import RemoteModel
from shardlift.client.values import LoadEvent, ModelInfo, Plan
from tests.support.quantization import nf4

from .streams import exactly, prompt

STAGES = 2
_BEFORE, _AFTER, _MOST = 24, 8, 4096  # tokens: until the kill, between two looks, in all


def measure(client: Client, instance_pid: int, checkpoint: str, repeat: int) -> dict[str, Any]:
    reloads = []
    for index in range(repeat + 1):
        model, reload = _load(client, checkpoint, 1)
        model.unload()
        if index:  # the first one fills the cache
            reloads.append(reload)
    reload_s = statistics.median(reload["reload_s"] for reload in reloads)
    model, _ = _load(client, checkpoint, STAGES)
    model.unload()
    model, of_all = _load(client, checkpoint, STAGES)
    losses = [_lose(model, instance_pid, reload_s) for _ in range(repeat * STAGES)]
    model.unload()
    return {
        "stages": STAGES,
        "reload_s": reload_s,
        "reloads": reloads,
        "reload_of_all_stages": of_all,
        "losses": losses,
    }


def _load(client: Client, checkpoint: str, stages: int) -> tuple[RemoteModel, dict[str, Any]]:
    """reload_s: from the plan, when nothing is placed yet, to the end."""
    moments: dict[type, float] = {}

    def note(event: LoadEvent) -> None:
        moments.setdefault(type(event), time.perf_counter())

    started = time.perf_counter()
    model = client.load(checkpoint, name="bench", num_stages=stages, quantization_config=nf4(), on_event=note)
    info = model.info()
    return model, {
        "load_s": moments[ModelInfo] - started,
        "reload_s": moments[ModelInfo] - moments[Plan],
        "reading_s": [stage.load.seconds for stage in info.residency],
        "is_cached": all(stage.load.cached_bytes > 0 for stage in info.residency),
    }


def _lose(model: RemoteModel, instance_pid: int, reload_s: float) -> dict[str, Any]:
    """Kills the oldest worker: each stage's in turn. gap_s: from then to the first token that came after the stall."""
    before = model.info()
    victim = _workers(instance_pid)[0]
    times: list[float] = []
    with model.stream(prompt(0), **exactly(_MOST)) as running:
        for _ in range(_BEFORE):
            next(running)
        victim.kill()
        times.append(time.perf_counter())
        # What was made before may still come.
        while (info := model.info()).recoveries == before.recoveries or info.state != "ready":
            for _, _step in zip(range(_AFTER), running, strict=False):
                times.append(time.perf_counter())
    gaps = [after - earlier for earlier, after in itertools.pairwise(times)]
    gap_s = times[gaps.index(max(gaps)) + 1] - times[0]
    (stage,) = (old.stage for old, new in zip(before.residency, info.residency, strict=True) if old.load != new.load)
    read = info.residency[stage].load
    return {
        "stage": stage,
        "gap_s": gap_s,
        "beyond_reload_s": gap_s - reload_s,
        "recovery_s": info.recovery_seconds,
        "reading_s": read.seconds,
        "is_cached": read.cached_bytes > 0,
    }


def _workers(instance_pid: int) -> list[psutil.Process]:
    """The processes of stages, the oldest first."""
    found = []
    for process in psutil.Process(instance_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.startswith("ray::") and "StageWorker" in part for part in process.cmdline()):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)
