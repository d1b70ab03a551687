"""`shardlift show NAME --watch`: in a pipe, as JSON and on a terminal; and what the client makes of a watch."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import shardlift
from shardlift.client.live import picture, plain_lines
from shardlift.client.views import ClusterView
from shardlift.proto.v1 import errors, registry_pb2
from tests.support import checkpoints, interrupts
from tests.support.cluster import RunningCluster, eventually
from tests.support.scripted_gateway import ScriptedGateway

GIB = 1 << 30


def view(state: registry_pb2.ModelState, **fields: object) -> registry_pb2.ClusterView:
    progress = registry_pb2.StageProgress(
        fetched_bytes=GIB, fetch_bytes=4 * GIB, tensors=4, tensors_loaded=1, bytes_per_second=2e8, seconds_left=70
    )
    loading = state == registry_pb2.MODEL_STATE_LOADING
    stage = registry_pb2.StageView(
        node="10.0.0.7",
        device="cuda:0",
        last_layer=9,
        resident_bytes=2 * GIB,
        kv_bytes=GIB,
        kv_budget_bytes=4 * GIB,
        sessions=1,
        answers=not loading,
        progress=progress if loading else None,
    )
    model = registry_pb2.ModelView(name="tiny", state=state, path="org/tiny", stages=[stage], **fields)  # type: ignore[arg-type]
    event = registry_pb2.ClusterEvent(unix_s=1e9, kind="load-started", model="tiny", text="loading org/tiny", count=1)
    return registry_pb2.ClusterView(unix_s=time.time(), models=[model], events=[event])


READY = view(registry_pb2.MODEL_STATE_READY, tokens_per_second=12.3, sessions_running=1, max_sessions=8)
LOADING = view(registry_pb2.MODEL_STATE_LOADING, load_seconds=3)


def answers(*views: registry_pb2.ClusterView) -> list[registry_pb2.WatchClusterResponse]:
    return [registry_pb2.WatchClusterResponse(cluster=each) for each in views]


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_a_pipe_gets_a_line_for_each_change() -> None:
    lines = [
        line.partition(" ")[2] for line in plain_lines(map(ClusterView.from_proto, [LOADING, LOADING, READY, READY]))
    ]
    assert lines == [
        "load-started: loading org/tiny",
        "tiny loading; stage 0: 1.00 GiB of 4.00 GiB at 200.0 MB/s, 1 min 10 s left",
        "tiny ready; 12.3 tokens/s, 1 sessions running of 8, 0 waiting; 1.00 GiB of 4.00 GiB keys and values",
    ]


def test_a_terminal_gets_a_picture() -> None:
    def drawn(shown: registry_pb2.ClusterView) -> str:
        console = Console(file=io.StringIO(), width=100, record=True)
        console.print(picture(ClusterView.from_proto(shown)))
        return console.export_text()

    ready, loading = drawn(READY), drawn(LOADING)
    assert "tiny: org/tiny, ready" in ready
    assert "10.0.0.7/cuda:0" in ready
    assert "███░░░░░░░░░ 1.00 GiB of 4.00 GiB" in ready
    assert "12.3 tokens/s, 1 sessions running of 8, 0 waiting" in ready
    assert "load-started: loading org/tiny" in ready
    assert "1.00 GiB of 4.00 GiB at 200.0 MB/s, 1 min 10 s left" in " ".join(loading.split())
    assert "loading for 3 s" in loading


@pytest.mark.parametrize("width", [20, 40, 60, 72])
def test_a_narrow_terminal_loses_nothing(width: int) -> None:
    """A table has no room there: its columns would be cut until a stage has neither number nor size."""
    for shown, told in ((READY, "1.00 GiB of 4.00 GiB, 1 sessions"), (LOADING, "1.00 GiB of 4.00 GiB at 200.0 MB/s")):
        console = Console(file=io.StringIO(), width=width, record=True)
        console.print(picture(ClusterView.from_proto(shown)))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        words = " ".join(text.split())
        assert "stage 0 on 10.0.0.7/cuda:0, layers 0–9" in words
        assert told in words


# -- the client -------------------------------------------------------------------------------------------------------


def test_a_watch_ends_with_its_model_and_outlives_its_gateway() -> None:
    with ScriptedGateway() as gateway, shardlift.connect(gateway.address, retry_s=20) as client:
        gateway.answer("WatchCluster", *answers(LOADING), error=errors.GatewayUnavailableError("restarting"))
        gateway.answer("WatchCluster", *answers(READY))
        assert [each.models[0].state for each in client.watch("tiny")] == ["loading", "ready"]
        gateway.answer("WatchCluster", *answers(READY), error=errors.GatewayUnavailableError("restarting"))
        gateway.answer("WatchCluster", error=errors.ModelNotFoundError("no model is called 'tiny' here"))
        assert len(list(client.watch("tiny"))) == 1, "it was unloaded meanwhile"
        gateway.answer("WatchCluster", error=errors.ModelNotFoundError("no model is called 'tiny' here"))
        with pytest.raises(errors.ModelNotFoundError):
            next(client.watch("tiny"))


def test_who_stops_watching_is_noticed() -> None:
    def for_ever(request: object, context: object) -> Iterator[registry_pb2.WatchClusterResponse]:
        while context.is_active():  # type: ignore[attr-defined]
            yield from answers(READY)
            time.sleep(0.01)

    with ScriptedGateway() as gateway, shardlift.connect(gateway.address) as client:
        gateway.expect("WatchCluster", for_ever)
        views = client.watch("tiny")
        next(views)
        views.close()  # type: ignore[attr-defined]
        assert gateway.calls[-1].over.wait(10)


# -- on a cluster -----------------------------------------------------------------------------------------------------


def command(cluster: RunningCluster, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardlift.client.cli.main", "show", "watched", "--watch", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHARDLIFT_ADDRESS": cluster.gateway, "PYTHONUNBUFFERED": "1"},
        preexec_fn=interrupts.heed,  # noqa: PLW1509 - nothing else would do
    )


def test_a_model_is_watched_to_its_end(cluster: RunningCluster, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", max_position_embeddings=50_000)
    with shardlift.connect(cluster.gateway) as client:
        model = client.load(str(folder), name="watched", num_stages=2)
        as_json, as_lines, interrupted = command(cluster, "--json"), command(cluster), command(cluster)
        with as_json, as_lines, interrupted:
            assert as_json.stdout is not None
            assert interrupted.stdout is not None
            with model.stream(torch.arange(5, 17)[None], max_new_tokens=40_000) as stream:
                next(stream)
                seen = next(
                    each["models"][0]
                    for each in map(json.loads, as_json.stdout)
                    if each["models"][0]["sessions_running"] and each["models"][0]["tokens_per_second"]
                )
                interrupted.stdout.readline()
                interrupted.send_signal(signal.SIGINT)
                assert interrupted.wait(30) == 130
            assert seen["state"] == "ready"
            assert [stage["device"] for stage in seen["stages"]] == [stage.device for stage in model.plan.stages]
            assert all(stage["kv_bytes"] and stage["answers"] for stage in seen["stages"])
            measured = [stage.measured_bytes for stage in model.residency()]
            assert [stage["resident_bytes"] for stage in seen["stages"]] == measured
            os.kill(cluster.pid(next(each for each in cluster.stage_workers() if each.endswith(":0"))), signal.SIGKILL)
            eventually(lambda: client.cluster("watched").models[0].recoveries == 1, "no recovery is told", 60)
            model.unload()
            rest = [json.loads(line) for line in as_json.stdout]
            out, told = as_lines.communicate(timeout=30)
            assert (as_json.wait(30), as_lines.returncode) == (0, 0)
        assert told == "watched was unloaded\n"
        assert {"recovering", "ready"} <= {each["models"][0]["state"] for each in rest}
        kinds = [event["kind"] for event in rest[-1]["events"]]
        for kind in ("load-started", "load-ready", "stages-lost", "recovered"):
            assert kind in kinds
            assert f" {kind}: " in out
        with pytest.raises(errors.ModelNotFoundError):
            client.cluster("watched")
    done = subprocess.run(
        [sys.executable, "-m", "shardlift.client.cli.main", "show", "nobody", "--watch", "--address", cluster.gateway],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "no model is called 'nobody'" in done.stderr
    cluster.assert_nothing_left()
