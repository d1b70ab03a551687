"""Loads on a cluster: workers killed on the way, second loads from the nodes' caches, what a person sees of them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardlift
from shardlift.client.handle import RemoteModel
from shardlift.client.values import LoadEvent, LoadWarning, StageProgress
from shardlift.proto.v1 import errors
from tests.support.checkpoints import tiny
from tests.support.cluster import RunningCluster, eventually
from tests.support.hub import HubServer, RequestInfo, Stall
from tests.support.quantization import nf4

IDS = torch.arange(5, 17)[None]
STAGES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Large enough for a part to be more than its statistics.
    return tiny(
        "llama",
        tmp_path_factory.mktemp("llama"),
        dtype="bfloat16",
        tied=False,
        hidden_size=256,
        intermediate_size=1024,
        max_shard_size="1MB",
    )


@pytest.fixture(autouse=True)
def tiny_hub(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """org/untroubled has the folder."""
    hub.add_repo("org/untroubled", folder)
    hub.clear()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    yield hub
    hub.fault = None


@pytest.fixture(autouse=True)
def nothing_left(cluster: RunningCluster) -> Iterator[None]:
    with shardlift.connect(cluster.gateway) as client:
        client.clear_cached_parts()
    yield
    with shardlift.connect(cluster.gateway) as client:
        for info in client.infos():
            client.unload(info.name)
        client.clear_cached_parts()
    cluster.assert_nothing_left()


def load(
    cluster: RunningCluster, path: str = "org/untroubled", events: list[LoadEvent] | None = None, **options: Any
) -> RemoteModel:
    """A handle whose client stays open until the process ends."""
    client = shardlift.connect(cluster.gateway)
    told = events if events is not None else []
    return client.load(
        path, name="loaded", num_stages=STAGES, quantization_config=nf4(), on_event=told.append, **options
    )


def kept_parts(cluster: RunningCluster) -> dict[str, str]:
    """Hash of what each cached part holds: the exact bytes that its stage has resident."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cluster.parts.glob("*.safetensors")}


def run_cli(cluster: RunningCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardlift.client.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"SHARDLIFT_ADDRESS": cluster.gateway},
    )


# ---- workers that die ------------------------------------------------------------------------------------------------


class Holdup:
    """Answers to tensor reads wait from the `after`-th on, each for a while; none that come after `release`."""

    def __init__(self, hub: HubServer, after: int) -> None:
        self.waiting = threading.Event()
        self._after, self._released, self._seen = after, False, 0
        self._lock = threading.Lock()
        hub.fault = self._fault

    def release(self) -> None:
        self._released = True

    def _fault(self, request: RequestInfo) -> Stall | None:
        # The driver reads headers, from byte 0 on.
        if request.origin != "cdn" or request.range is None or not request.range[0] or self._released:
            return None
        with self._lock:
            self._seen += 1
            if self._seen <= self._after:
                return None
        self.waiting.set()
        return Stall(after_bytes=10, seconds=8)  # shorter than a worker's patience


def test_a_worker_killed_mid_load_is_replaced_and_loads_its_own_part_again(
    cluster: RunningCluster, hub: HubServer, folder: Path
) -> None:
    model = load(cluster)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    parts, needed = kept_parts(cluster), model.plan.total_fetch_bytes
    own = [stage.fetch_bytes for stage in model.plan.stages]
    model.unload()
    with shardlift.connect(cluster.gateway) as client:
        client.clear_cached_parts()
    hub.clear()

    holdup, events, outcome = Holdup(hub, after=1), [], []
    thread = threading.Thread(target=lambda: outcome.append(load(cluster, events=events)))
    thread.start()
    assert holdup.waiting.wait(60)
    [victim] = [name for name in cluster.stage_workers() if name.endswith(":1")]
    os.kill(cluster.pid(victim), signal.SIGKILL)
    eventually(lambda: any(":1~" in name for name in cluster.stage_workers()), "no other worker came")
    holdup.release()
    thread.join(90)
    assert outcome, "the load did not end"
    [model] = outcome

    warnings = [event.message for event in events if isinstance(event, LoadWarning)]
    assert len(warnings) == 1
    assert "the worker of stage 1 died" in warnings[0]
    assert "another one loads its part anew" in warnings[0]
    assert kept_parts(cluster) == parts
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    # The others read on where they were: only what the dead one had came twice (stalls are retried from their byte).
    headers = (64 << 10) * len(list(folder.glob("*.safetensors")))
    assert hub.bytes_sent() <= needed + own[1] + headers + (1 << 20)


@pytest.mark.soak
def test_a_stage_whose_workers_all_die_ends_the_load(cluster: RunningCluster, hub: HubServer) -> None:
    Holdup(hub, after=0)
    failures: list[BaseException] = []

    def try_to_load() -> None:
        try:
            load(cluster)
        except errors.ShardliftError as error:
            failures.append(error)

    thread = threading.Thread(target=try_to_load)
    thread.start()
    killed: set[str] = set()

    def others() -> list[str]:
        workers = [name for name in cluster.stage_workers() if name.rsplit(":", 1)[1].partition("~")[0] == "2"]
        return [name for name in workers if name not in killed]

    for _ in range(3):
        eventually(lambda: bool(others()), "no other worker came", timeout_s=40)
        victim = others()[0]
        killed.add(victim)
        os.kill(cluster.pid(victim), signal.SIGKILL)
    thread.join(60)
    assert [type(failure) for failure in failures] == [errors.ModelUnavailableError]
    assert "died while loading" in str(failures[0])
    cluster.assert_nothing_left()


def test_a_client_that_is_killed_ends_its_load(cluster: RunningCluster, hub: HubServer) -> None:
    holdup = Holdup(hub, after=0)
    script = f"import shardlift\nshardlift.connect({cluster.gateway!r}).load('org/untroubled', name='orphan')\n"
    client = subprocess.Popen([sys.executable, "-c", script])
    assert holdup.waiting.wait(60)
    assert cluster.stage_workers()
    client.send_signal(signal.SIGKILL)
    client.wait(10)
    cluster.assert_nothing_left()


# ---- second loads ----------------------------------------------------------------------------------------------------


def test_a_second_load_reads_the_nodes_caches_alone(cluster: RunningCluster, hub: HubServer) -> None:
    cold = load(cluster)
    expected = cold.generate(IDS, max_new_tokens=8, do_sample=False)
    held = [stage.modules for stage in cold.residency()]
    cold.unload()
    hub.clear()
    events: list[LoadEvent] = []
    warm = load(cluster, events=events)
    assert all(request.range is None or request.range[0] == 0 for request in hub.requests if request.origin == "cdn")
    assert torch.equal(warm.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    assert [stage.modules for stage in warm.residency()] == held
    for stage in warm.residency():
        assert stage.fetched_bytes == 0
        assert 0 < stage.load.cached_bytes < 2 * stage.measured_bytes
        assert stage.load.link == "this node's cache"
        assert "quantize" not in stage.load.phases
    assert any(event.cached for event in events if isinstance(event, StageProgress))

    listed = json.loads(run_cli(cluster, "cache", "list", "--json").stdout)
    assert len(listed) == STAGES
    assert {part["model"] for part in listed} == {"org/untroubled"}
    assert sorted(part["layers"] for part in listed) == [
        [stage.first_layer, stage.last_layer] for stage in warm.plan.stages
    ]
    assert sum(part["bytes"] for part in listed) == sum(stage.load.cached_bytes for stage in warm.residency())
    table = run_cli(cluster, "cache", "list").stdout
    assert "nf4+double" in table
    assert f"{STAGES} parts" in table
    freed = json.loads(run_cli(cluster, "cache", "clear", "--json").stdout)["freed_bytes"]
    assert freed == sum(part["bytes"] for part in listed)
    assert list(cluster.parts.glob("*.safetensors")) == []


def test_a_load_teaches_the_next_plan_how_long_it_will_take(cluster: RunningCluster) -> None:
    load(cluster, part_cache=False)
    with shardlift.connect(cluster.gateway) as client:
        plan = client.plan("org/untroubled", quantization_config=nf4())
        assert plan.link_is_measured
        assert plan.predicted_load_seconds > 0
        assert plan.predicted_load_seconds == max(stage.predicted_load_seconds for stage in plan.stages)
        given = client.plan("org/untroubled", quantization_config=nf4(), link_speed="1kB/s")
    assert not given.link_is_measured
    assert given.load_bottleneck == "link"
    assert given.predicted_load_seconds == max(stage.fetch_bytes for stage in given.stages) / 1000


def test_a_load_without_the_cache_neither_reads_nor_keeps(cluster: RunningCluster) -> None:
    load(cluster, part_cache=False).unload()
    assert kept_parts(cluster) == {}


# ---- what a person sees ----------------------------------------------------------------------------------------------


def test_a_load_tells_its_pace_its_bottleneck_and_its_timeline(cluster: RunningCluster, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = run_cli(
        cluster, "load", "org/untroubled", "--name", "loaded", "--num-stages", str(STAGES), "--load-in-4bit",
        "--bnb-4bit-quant-type", "nf4", "--staging-budget", "2MiB", "--connections", "2", "--trace", str(trace),
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert any("B/s" in line and "resident in" in line for line in lines)
    told = done.stdout.splitlines()
    assert any(line.startswith("bottleneck: stage ") for line in told)
    assert any("fetched in" in line and "placing and" in line for line in told)

    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == set(range(STAGES))
    assert {"fetch", "build", "wait", "quantize"} <= {event["name"] for event in spans}
    assert all(event["dur"] >= 0 and event["ts"] > 1e15 for event in spans)
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == STAGES
    with shardlift.connect(cluster.gateway) as client:
        model = client.model("loaded")
        fetched = sum(event["args"]["bytes"] for event in spans if event["name"] == "fetch")
        assert fetched == sum(stage.fetched_bytes for stage in model.residency())
        threads = {(event["pid"], event["tid"]) for event in spans if event["name"] == "fetch"}
        assert len(threads) <= 2 * STAGES
        modules = {name for stage in model.residency() for name in stage.modules}
    shown = run_cli(cluster, "show", "loaded")
    assert "model.layers.*.self_attn.q_proj" in shown.stdout
    assert "nf4" in shown.stdout
    assert "bottleneck: " in shown.stdout
    values = json.loads(run_cli(cluster, "show", "loaded", "--json").stdout)
    assert {name for stage in values["stages"] for name in stage["modules"]} == modules
    for stage in values["stages"]:
        assert stage["load"]["bottleneck"]
        assert sum(module["bytes"] for module in stage["modules"].values()) == stage["measured_bytes"]


def test_a_trace_that_cannot_be_written_is_told_before_the_load(cluster: RunningCluster, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequestError, match="the trace can't be written"):
        load(cluster, trace=tmp_path / "no" / "such" / "folder")


def test_a_failed_load_leaves_no_trace_file(cluster: RunningCluster, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointNotFoundError):
        load(cluster, "org/nowhere", trace=tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"staging_budget": "1KiB"}, "staging_budget '1KiB' is 1024 bytes: at least 1048576"),
        ({"staging_budget": "much"}, "'much' is not a size"),
        ({"connections": 65}, "connections=65, but at most 64"),
    ],
)
def test_values_that_make_no_sense_are_refused(cluster: RunningCluster, options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=words):
        load(cluster, **options)
