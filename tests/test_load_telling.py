"""What people are told of a load: pace, time left, bottleneck, modules, the trace's form. All pure."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardlift.client.modules import grouped
from shardlift.client.summary import duration, load_summary, rate
from shardlift.client.trace_file import TraceFile
from shardlift.client.values import ModelInfo, ModuleResidency
from shardlift.cluster.pace import Pace
from shardlift.proto.v1 import registry_pb2
from shardlift.worker import timeline
from shardlift.worker.spec import LoadSnapshot
from shardlift.worker.timeline import Phase, Timeline, bottleneck, trace_events


def snapshot(fetched: int, loaded: int, total: int = 1000, *, cached: bool = False) -> LoadSnapshot:
    return LoadSnapshot(
        fetched_bytes=fetched, total_bytes=total, loaded_bytes=loaded, tensors_loaded=1, tensors=4, is_cached=cached
    )


# ---- pace ------------------------------------------------------------------------------------------------------------


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    first = pace.progress(2, snapshot(0, 0), 10.0)
    assert (first.stage, first.bytes_per_second, first.seconds_left) == (2, 0, 0)
    second = pace.progress(2, snapshot(400, 100), 11.0)
    assert (second.bytes_per_second, second.seconds_left) == (400, 9)
    for second_s in range(12, 30):
        last = pace.progress(2, snapshot(500, 100 + second_s), float(second_s))
    assert last.bytes_per_second == 0
    assert last.seconds_left == pytest.approx(1000 - 129)


def test_a_worker_that_begins_anew_has_no_negative_pace() -> None:
    pace = Pace()
    pace.progress(0, snapshot(900, 800), 1.0)
    again = pace.progress(0, snapshot(10, 0), 2.0)
    assert (again.bytes_per_second, again.seconds_left) == (0, 0)
    assert pace.progress(0, snapshot(110, 50), 3.0).bytes_per_second == 100


def test_a_part_from_the_cache_is_told_as_one() -> None:
    assert Pace().progress(0, snapshot(1, 1, cached=True), 0.0).cached


# ---- bottleneck ------------------------------------------------------------------------------------------------------


def phases(**seconds: float) -> tuple[Phase, ...]:
    return tuple(Phase(name=name, seconds=spent, bytes_=1000, count=1) for name, spent in seconds.items())


@pytest.mark.parametrize(
    ("spent", "expected"),
    [
        ({"build": 1, "quantize": 5, "wait": 2, "fetch": 40}, "quantize"),
        ({"build": 1, "quantize": 2, "wait": 5, "fetch": 40}, "fetch"),
        ({"build": 1, "quantize": 2, "wait": 5, "fetch": 4, "copy": 9}, "copy"),
        ({"build": 3, "quantize": 2, "fetch": 40}, "build"),
        ({"store": 3, "quantize": 2}, "store"),
        ({}, "build"),
    ],
)
def test_the_bottleneck_is_what_the_load_waited_for(spent: dict[str, float], expected: str) -> None:
    assert bottleneck(phases(**spent)) == expected


def info(load_seconds: float, *stages: dict[str, Any]) -> ModelInfo:
    return ModelInfo.from_proto(
        registry_pb2.ModelInfo(
            name="m",
            load_seconds=load_seconds,
            residency=[
                registry_pb2.StageResidency(
                    stage=index,
                    fetched_bytes=stage.get("fetched", 0),
                    load=registry_pb2.StageLoad(
                        seconds=stage["seconds"],
                        cached_bytes=stage.get("cached", 0),
                        bottleneck=stage["bottleneck"],
                        link=stage.get("link", ""),
                        connections=4,
                        phases=[
                            registry_pb2.PhaseTime(name=name, seconds=seconds, bytes=size)
                            for name, (seconds, size) in stage["phases"].items()
                        ],
                    ),
                )
                for index, stage in enumerate(stages)
            ],
        )
    )


def test_the_summary_names_the_link_and_its_rate() -> None:
    quick = {"seconds": 2.0, "bottleneck": "build", "phases": {"build": (1.0, 0)}, "fetched": 5 << 20}
    slow = {
        "seconds": 8.0,
        "bottleneck": "fetch",
        "link": "the Hub (hub.example)",
        "phases": {"fetch": (20.0, 1_000_000_000), "wait": (6.0, 0), "quantize": (1.0, 5)},
        "fetched": 5 << 20,
    }
    lines = load_summary(info(10.5, quick, slow))
    assert lines == [
        "10.00 MiB fetched in 8.0 s (1.3 MB/s), after 2.5 s of planning, placing and starting workers",
        "bottleneck: stage 1, reading from the Hub (hub.example): 6.0 of 8.0 s, at 200.0 MB/s",
    ]


def test_the_summary_tells_of_caches_and_of_nothing() -> None:
    warm = {"seconds": 1.0, "bottleneck": "convert", "phases": {"convert": (0.5, 0)}, "cached": 3 << 20}
    assert load_summary(info(1.0, warm)) == [
        "3.00 MiB read from the nodes' caches in 1.0 s (3.1 MB/s), after 0.0 s of planning, placing and starting "
        "workers",
        "bottleneck: stage 0, converting tensors: 0.5 of 1.0 s",
    ]
    assert load_summary(info(1.0)) == []


def test_rates_and_durations_are_read_at_a_glance() -> None:
    assert [rate(value) for value in (0, 999, 1500, 95_200_000, 3.2e9, 5e12)] == [
        "0 B/s",
        "999 B/s",
        "1.5 kB/s",
        "95.2 MB/s",
        "3.2 GB/s",
        "5000.0 GB/s",
    ]
    assert [duration(value) for value in (0.4, 59.4, 60, 200, 3600, 3900)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "3 min 20 s",
        "1 h 0 min",
        "1 h 5 min",
    ]


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_alike_modules_are_one_line_and_no_byte_is_lost() -> None:
    def held(dtype: str, size: int) -> ModuleResidency:
        return ModuleResidency(dtype=dtype, bytes=size, device="cpu")

    modules = {
        "model.embed_tokens": held("bfloat16", 100),
        **{f"model.layers.{index}.mlp.up_proj": held("nf4", 10) for index in (0, 1, 2, 5)},
        "model.layers.3.mlp.up_proj": held("bfloat16", 40),
        **{f"model.layers.{index}.mlp.experts.{expert}.up": held("nf4", 1) for index in (0, 1) for expert in (0, 1)},
        "lm_head": held("bfloat16", 7),
    }
    groups = list(grouped(modules.items()))
    assert [(group.name, group.layers, group.count, group.dtype, group.bytes) for group in groups] == [
        ("model.embed_tokens", "", 1, "bfloat16", 100),
        ("model.layers.*.mlp.up_proj", "0–2, 5", 4, "nf4", 40),
        ("model.layers.*.mlp.up_proj", "3", 1, "bfloat16", 40),
        ("model.layers.*.mlp.experts.*.up", "0–1", 4, "nf4", 4),
        ("lm_head", "", 1, "bfloat16", 7),
    ]
    assert sum(group.bytes for group in groups) == sum(module.bytes for module in modules.values())


# ---- timeline --------------------------------------------------------------------------------------------------------


def test_spans_become_trace_events_of_their_threads() -> None:
    kept = Timeline(keep_spans=True)
    before_us = time.time() * 1e6

    def work() -> None:
        with kept.span("fetch", "model.safetensors", 7):
            time.sleep(0.01)

    thread = threading.Thread(target=work, name="fetcher")
    thread.start()
    thread.join()
    with kept.span("build"):
        pass
    spans, dropped = kept.spans()
    events = trace_events(spans, process=3, name="stage 3", dropped=dropped)
    json.dumps(events)
    fetch, build = [event for event in events if event["ph"] == "X"]
    assert (fetch["name"], fetch["pid"], fetch["args"]) == ("fetch", 3, {"tensor": "model.safetensors", "bytes": 7})
    assert fetch["dur"] >= 10_000
    assert before_us - 1e6 <= fetch["ts"] <= time.time() * 1e6
    assert fetch["tid"] != build["tid"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {"fetcher", "MainThread"}


def test_totals_are_kept_without_spans_and_also_of_what_fails() -> None:
    totals = Timeline()
    with pytest.raises(ZeroDivisionError), totals.span("quantize", "a", 5):
        raise ZeroDivisionError
    totals.count("convert", 1.5)
    assert totals.spans() == ([], 0)
    found = {phase.name: phase for phase in totals.phases()}
    assert (found["quantize"].bytes_, found["quantize"].count) == (5, 1)
    assert found["convert"].seconds == pytest.approx(1.5)
    assert totals.seconds("convert", "nothing") == pytest.approx(1.5)


def test_spans_are_bounded_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_SPANS", 3)
    kept = Timeline(keep_spans=True)
    for _ in range(5):
        with kept.span("fetch", "", 2):
            pass
    spans, dropped = kept.spans()
    assert (len(spans), dropped) == (3, 2)
    assert kept.phases()[0].bytes_ == 10
    events = trace_events(spans, process=0, name="stage 0", dropped=dropped)
    assert any("2 spans" in str(event["args"]) for event in events)


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_the_trace_and_nothing_else() -> None:
    with pytest.warns(UserWarning, match="the trace is incomplete"), TraceFile("/dev/full") as file:
        file.add(registry_pb2.LoadTrace(stage=0, json=b"[1]", last=True))
    with pytest.raises(ZeroDivisionError), TraceFile("/dev/full"):
        raise ZeroDivisionError
    assert Path("/dev/full").exists()


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 1000])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [0, 1], [], [1]])
def test_a_trace_file_is_one_array_however_it_came(tmp_path: Path, counts: list[int], piece_bytes: int) -> None:
    wanted = []
    with TraceFile(tmp_path / "trace.json") as file:
        for stage, count in enumerate(counts):
            events = [{"pid": stage, "n": number, "s": "],["} for number in range(count)]
            wanted += events
            text = json.dumps(events, separators=(",", ":")).encode()
            for start in range(0, len(text), piece_bytes):
                piece = text[start : start + piece_bytes]
                file.add(registry_pb2.LoadTrace(stage=stage, json=piece, last=start + piece_bytes >= len(text)))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == wanted
