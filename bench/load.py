"""A load's time, work and memory against transformers' own, on the same machine, in the same run.

    python -m bench.load [--family llama] [--size 1GB] [--stages 2] [--device cpu] [--folder DIR] [--no-peer]

Writes a synthetic checkpoint (or takes --checkpoint), brings its files into the page cache (--cold: drops them before
each), and loads it in 4 bits: by transformers in one process, and by one process per stage, as workers do it, from the
checkpoint and then from the cache of quantized parts. Every process has imported all it needs before its clock
starts. Prints one JSON object: seconds, GB/s of checkpoint, CPU seconds, peak host memory above what stays resident,
bytes read and needed; the limits of the same bytes (raw reads; pinned copies to the device; quantizing alone); ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM

from shardlift.client.jsonable import jsonable
from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.worker.byte_sizes import parse_size
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.part_cache import PartCache
from shardlift.worker.spec import StageSpec
from shardlift.worker.timeline import bottleneck
from tests.support.quantization import nf4

from .common import surroundings
from .synthetic import FAMILIES, write_checkpoint

_READ_BYTES = 32 << 20


# ---- one process's share of a measurement ----------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status, e.g. VmHWM, the peak of resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


class _Meter:
    """What happens between `start` and `stop` in this process."""

    def __init__(self, device: str) -> None:
        self._device = device

    def start(self) -> None:
        gc.collect()
        if self._device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._before = _status("VmRSS")
        self._anonymous = self._before_anonymous = _status("RssAnon")
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._cpu_s = usage.ru_utime + usage.ru_stime
        self._started = time.time()

    def _sample(self) -> None:
        # Without files that are mapped: their pages are the kernel's to take back.
        while not self._done.wait(0.01):
            self._anonymous = max(self._anonymous, _status("RssAnon"))

    def stop(self, resident_bytes: int) -> dict[str, Any]:
        if self._device != "cpu":
            torch.cuda.synchronize()
        ended = time.time()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._done.set()
        self._sampler.join()
        on_host = resident_bytes if self._device == "cpu" else 0
        result = {
            "started": self._started,
            "ended": ended,
            "cpu_s": usage.ru_utime + usage.ru_stime - self._cpu_s,
            "peak_host_bytes_above_resident": max(0, _status("VmHWM") - self._before - on_host),
            "peak_anonymous_bytes_above_resident": max(0, self._anonymous - self._before_anonymous - on_host),
            "resident_bytes": resident_bytes,
        }
        if self._device != "cpu":
            peak = torch.cuda.max_memory_allocated()
            result["peak_device_bytes_above_resident"] = peak - resident_bytes
        return result


def _transformers(folder: str, device: str) -> Callable[[], tuple[int, dict[str, Any]]]:
    def load() -> tuple[int, dict[str, Any]]:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=nf4(), dtype=torch.bfloat16, device_map={"": device}
        )
        return model.get_memory_footprint(), {}

    return load


def _stage(spec: StageSpec, cache: str | None) -> Callable[[], tuple[int, dict[str, Any]]]:
    def load() -> tuple[int, dict[str, Any]]:
        progress = LoadProgress()
        parts = PartCache(Path(cache), 1 << 50) if cache else None
        loaded = load_stage(spec, None, progress, parts)
        if loaded.keep is not None:
            loaded.keep()
        phases = progress.timeline.phases()
        return sum(module.size_bytes for module in loaded.modules), {
            "fetched_bytes": loaded.fetched_bytes,
            "cached_bytes": loaded.cached_bytes,
            "bottleneck": bottleneck(phases),
            "phases_s": {phase.name: round(phase.seconds, 3) for phase in phases},
        }

    return load


def _process(make: Any, arguments: tuple[Any, ...], device: str, gate: Any, answers: Any) -> None:
    if device != "cpu":
        torch.empty(1, device=device)
    bnb.functional.quantize_4bit(torch.zeros(4096, device=device), quant_type="nf4", compress_statistics=True)
    load, meter = make(*arguments), _Meter(device)
    gate.wait()
    meter.start()
    resident_bytes, more = load()
    answers.put({**meter.stop(resident_bytes), **more})


def in_processes(jobs: list[tuple[Any, ...]], device: str) -> list[dict[str, Any]]:
    """Each job, (make, arguments), in a process of its own, all started at the same moment."""
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(len(jobs)), context.Queue()
    processes = [
        context.Process(target=_process, args=(make, arguments, device, gate, answers)) for make, *arguments in jobs
    ]
    for process in processes:
        process.start()
    try:
        return [answers.get(timeout=3600) for _ in processes]
    finally:
        for process in processes:
            process.join(30)


def together(results: list[dict[str, Any]], checkpoint_bytes: int) -> dict[str, Any]:
    """What several processes did at once, as one."""
    seconds = max(result["ended"] for result in results) - min(result["started"] for result in results)
    summed = {"cpu_s", "resident_bytes", "fetched_bytes", "cached_bytes"}
    largest = [name for name in results[0] if name.startswith("peak_")]
    return {
        "seconds": seconds,
        "gb_per_s": checkpoint_bytes / seconds / 1e9,
        **{name: sum(result[name] for result in results) for name in results[0] if name in summed},
        **{f"{name}_of_a_process": max(result[name] for result in results) for name in largest},
        **{name: [result[name] for result in results] for name in ("bottleneck", "phases_s") if name in results[0]},
    }


# ---- limits ----------------------------------------------------------------------------------------------------------


def raw_read_s(files: list[Path], connections: int) -> float:
    """Seconds to read all bytes of `files` by preadv, `connections` at a time, into memory that is there already."""
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, _READ_BYTES)]
    buffers = threading.local()

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(buffers, "one"):
            buffers.one = bytearray(_READ_BYTES)
        descriptor = os.open(piece[0], os.O_RDONLY)
        try:
            done = 0
            while done < _READ_BYTES:
                count = os.preadv(descriptor, [memoryview(buffers.one)[done:]], piece[1] + done)
                if not count:
                    break
                done += count
        finally:
            os.close(descriptor)

    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(read, pieces))
    return time.perf_counter() - started


def pinned_copy_bytes_per_s(device: str) -> float:
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    there.copy_(host)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(8):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * len(host) / (time.perf_counter() - started)


def quantize_bytes_per_s(device: str) -> float:
    """bitsandbytes by itself, as transformers calls it; before this process has any faster kernel of shardlift's."""
    weight = torch.randn(8192, 2048, dtype=torch.bfloat16).to(device)
    repeat = 2 if device == "cpu" else 50
    bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeat):
        bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    if device != "cpu":
        torch.cuda.synchronize()
    return repeat * weight.numel() * 2 / (time.perf_counter() - started)


# ---- all of it -------------------------------------------------------------------------------------------------------


def specs(folder: Path, stages: int, device: str, options: argparse.Namespace) -> list[StageSpec]:
    planned = plan_model(
        CheckpointRequest(path=str(folder)),
        None,
        ModelOptions(quantization=jsonable(nf4().to_dict(), "quantization_config"), quantize_experts=False),
        PlanOptions(num_stages=stages),
        parse_devices(f"{stages}x10TiB"),
    )
    return [
        replace(spec, device=device, budget_bytes=options.budget, connections=options.connections)
        for spec in planned.specs("bench", "bench", "secret")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder to load, in place of a synthetic one")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--size", type=parse_size, default=parse_size("1GB"))
    parser.add_argument("--folder", type=Path, help="where to write it; e.g. a tmpfs")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=parse_size, default=parse_size("512MiB"))
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--no-peer", action="store_true", help="without transformers' load")
    options = parser.parse_args()
    device: str = options.device

    with tempfile.TemporaryDirectory(prefix="shardlift-bench-", dir=options.folder) as scratch:
        folder = options.checkpoint or Path(scratch) / "checkpoint"
        if options.checkpoint is None:
            write_checkpoint(folder, options.family, options.size)
        files = sorted(folder.glob("*.safetensors"))
        checkpoint_bytes = sum(file.stat().st_size for file in files)
        stages = specs(folder, options.stages, device, options)

        def prepare() -> None:
            for file in files:
                if options.cold:
                    descriptor = os.open(file, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(descriptor)
            if not options.cold:
                raw_read_s(files, options.connections)

        prepare()
        read_s = raw_read_s(files, options.connections)
        limits = {"raw_read_gb_per_s": checkpoint_bytes / read_s / 1e9}
        if device != "cpu":
            limits["pinned_copy_gb_per_s"] = pinned_copy_bytes_per_s(device) / 1e9
        limits["quantize_gb_per_s"] = quantize_bytes_per_s(device) / 1e9
        runs: dict[str, dict[str, Any]] = {}
        if not options.no_peer:
            prepare()
            runs["transformers"] = together(
                in_processes([(_transformers, str(folder), device)], device), checkpoint_bytes
            )
        for name, cache in (("shardlift", None), ("first", f"{scratch}/parts"), ("warm", f"{scratch}/parts")):
            prepare()
            runs[name] = together(in_processes([(_stage, spec, cache) for spec in stages], device), checkpoint_bytes)

    needed = sum(spec.fetch_bytes for spec in stages)
    ours = runs["shardlift"]
    ratios = {
        "fetched_to_needed": ours["fetched_bytes"] / needed,
        "warm_to_cold_seconds": runs["warm"]["seconds"] / ours["seconds"],
        "warm_bytes_to_cold": runs["warm"]["cached_bytes"] / ours["fetched_bytes"],
        "gb_per_s_to_raw_read": ours["gb_per_s"] / limits["raw_read_gb_per_s"],
    }
    if "pinned_copy_gb_per_s" in limits:
        slowest = min(limits["raw_read_gb_per_s"], limits["pinned_copy_gb_per_s"])
        ratios["gb_per_s_to_slower_of_read_and_copy"] = ours["gb_per_s"] / slowest
    if "transformers" in runs:
        ratios["seconds_to_transformers"] = ours["seconds"] / runs["transformers"]["seconds"]
        ratios["cpu_s_to_transformers"] = ours["cpu_s"] / runs["transformers"]["cpu_s"]
    print(
        json.dumps(
            {
                **surroundings("torch", "transformers", "bitsandbytes", device=device),
                "checkpoint": {
                    "family": str(options.checkpoint or options.family),
                    "bytes": checkpoint_bytes,
                    "needed_bytes": needed,
                    "page_cache": "cold" if options.cold else "warm",
                },
                "stages": options.stages,
                "budget_bytes": options.budget,
                "connections": options.connections,
                "limits": limits,
                **runs,
                "ratios": ratios,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
