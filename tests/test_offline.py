"""`shardlift plan --devices`: a plan without a cluster, by the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf.json_format import ParseDict

from shardlift.client.cli.main import cli
from shardlift.cluster.offline import plan_json
from shardlift.proto.v1 import registry_pb2
from shardlift.proto.v1.errors import InvalidDeviceMapError
from tests.support.checkpoints import tiny

QUANTIZED = ["--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--bnb-4bit-use-double-quant"]
TOPOLOGY = {
    "devices": [
        {"node": "a", "device": "cuda:0", "memory": "1GiB"},
        {"node": "b", "device": "cuda:0", "memory": "1GiB"},
        {"node": "b", "device": "cpu", "memory": "1TiB"},
    ]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), layers=12, dtype="bfloat16")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The commands at once: each spends its time on imports."""
    command = [sys.executable, "-m", "shardlift.client.cli.main", "plan", str(folder), "--json"]
    started = {
        name: subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for name, arguments in {
            "devices": ["--devices", "8x80GiB", *QUANTIZED],
            "refusal": ["--devices", "2x10KiB"],
        }.items()
    }
    try:
        outputs = {name: process.communicate(timeout=240) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    return {
        name: subprocess.CompletedProcess(process.args, process.returncode, *outputs[name])
        for name, process in started.items()
    }


def checked(plan: dict[str, Any]) -> dict[str, Any]:
    """The form that the public contract gives."""
    contract = ["model", "quantization", "total_resident_bytes", "total_fetch_bytes", "stages"]
    assert list(plan)[: len(contract)] == contract
    for index, stage in enumerate(plan["stages"]):
        assert list(stage)[:7] == [
            *("index", "node", "device", "layers"),
            *("resident_bytes", "fetch_bytes", "kv_bytes_per_token"),
        ]
        assert stage["index"] == index
    assert plan["total_resident_bytes"] == sum(stage["resident_bytes"] for stage in plan["stages"])
    assert plan["total_fetch_bytes"] == sum(stage["fetch_bytes"] for stage in plan["stages"])
    layers = [index for stage in plan["stages"] for index in range(stage["layers"][0], stage["layers"][1] + 1)]
    assert layers == list(range(12))
    return plan


def test_named_devices(runs: dict[str, subprocess.CompletedProcess[str]], folder: Path) -> None:
    assert runs["devices"].returncode == 0, runs["devices"].stderr
    plan = checked(json.loads(runs["devices"].stdout))
    assert plan["model"] == str(folder)
    assert plan["quantization"] == "nf4+double"
    assert [(stage["node"], stage["device"]) for stage in plan["stages"]] == [
        ("node-0", f"cuda:{index}") for index in range(8)
    ]
    # Untied: the checkpoint once. Its weights are what the files hold beside their headers.
    tensors = 0
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        tensors += len(data) - 8 - int.from_bytes(data[:8], "little")
    assert plan["total_fetch_bytes"] == tensors


def test_a_topology_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, with the planner in this process."""
    topology = tmp_path / "nodes.json"
    topology.write_text(json.dumps(TOPOLOGY))

    def run_here(command: list[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "shardlift.cluster.offline"]
        return subprocess.CompletedProcess(command, 0, json.dumps(plan_json(json.loads(input))), "")

    monkeypatch.setattr(subprocess, "run", run_here)
    result = CliRunner().invoke(cli, ["plan", str(folder), "--devices", str(topology), "--json"])
    assert result.exit_code == 0, result.output
    plan = checked(json.loads(result.output))
    assert plan["quantization"] == "none"
    assert [(stage["node"], stage["device"], stage["layers"]) for stage in plan["stages"]] == [
        ("a", "cuda:0", [0, 5]),
        ("b", "cuda:0", [6, 11]),
    ]
    assert {stage["kv_bytes_per_token"] for stage in plan["stages"]} == {6 * 2 * 2 * 16 * 2}


def test_a_refusal(runs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    run = runs["refusal"]
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1, run.stderr
    assert "2 device(s) give 20.00 KiB" in run.stderr
    assert "set load_in_4bit=True (" in run.stderr


def test_a_device_map_without_a_cluster(folder: Path) -> None:
    request: dict[str, Any] = {
        "source": {"path": str(folder)},
        "options": {"device_map_by_module": {"": "b/cuda:0", "model.embed_tokens": "b/cpu", "model.layers.0": "b/cpu"}},
        "devices": TOPOLOGY,
    }
    plan = ParseDict(plan_json(request), registry_pb2.Plan())
    assert [(stage.device, stage.first_layer, stage.last_layer) for stage in plan.stages] == [
        ("cpu", 0, 0),
        ("cuda:0", 1, 11),
    ]
    request["options"]["device_map_by_module"]["model.layers.3"] = "a/cuda:0"
    with pytest.raises(InvalidDeviceMapError, match="returns to b/cuda:0"):
        plan_json(request)
