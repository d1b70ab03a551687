"""The `shardlift` command against scripted answers: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.json_format import MessageToDict, MessageToJson

from shardlift.client.cli.main import cli
from shardlift.proto.v1 import errors, inference_pb2, registry_pb2
from tests.support import interrupts
from tests.support.scripted_gateway import ScriptedGateway

PLAN = registry_pb2.Plan(
    model="org/tiny",
    quantization="nf4",
    total_resident_bytes=3 << 30,
    total_fetch_bytes=12 << 30,
    dtype="bfloat16",
    commit="abc123",
    stages=[
        registry_pb2.StagePlan(
            index=0,
            node="10.0.0.7",
            device="cuda:0",
            first_layer=0,
            last_layer=3,
            resident_bytes=3 << 30,
            fetch_bytes=12 << 30,
            kv_bytes_per_token=64,
            modules=["model"],
            capacity_bytes=4 << 30,
            kv_bytes=1 << 30,
            predicted_load_seconds=200.0,
            kv_budget_bytes=2 << 30,
        )
    ],
    predicted_load_seconds=200.0,
    load_bottleneck="link",
    kv_tokens=65_536,
    link_bytes_per_second=64e6,
    notes=("expect snow",),
)
PLAN_JSON = {
    "model": "org/tiny",
    "quantization": "nf4",
    "total_resident_bytes": 3 << 30,
    "total_fetch_bytes": 12 << 30,
    "stages": [
        {
            "index": 0,
            "node": "10.0.0.7",
            "device": "cuda:0",
            "layers": [0, 3],
            "resident_bytes": 3 << 30,
            "fetch_bytes": 12 << 30,
            "kv_bytes_per_token": 64,
            "capacity_bytes": 4 << 30,
            "workspace_bytes": 0,
            "kv_bytes": 1 << 30,
            "kv_budget_bytes": 2 << 30,
            "predicted_load_seconds": 200.0,
        }
    ],
    "kv_tokens": 65_536,
    "predicted_load_seconds": 200.0,
    "load_bottleneck": "link",
    "link_bytes_per_second": 64e6,
    "notes": ["expect snow"],
}
INFO = registry_pb2.ModelInfo(
    name="tiny",
    state=registry_pb2.MODEL_STATE_READY,
    plan=PLAN,
    residency=[
        registry_pb2.StageResidency(
            stage=0,
            measured_bytes=(3 << 30) + 512,
            fetched_bytes=12 << 30,
            modules=[registry_pb2.ModuleResidency(module="model", dtype="nf4", bytes=7, device="cuda:0")],
        )
    ],
    config_json="{}",
    generation_config_json="{}",
    path="org/tiny",
    load_seconds=2.0,
)
LOAD = [
    registry_pb2.LoadModelResponse(started=registry_pb2.LoadStarted(name="tiny", commit="abc123")),
    registry_pb2.LoadModelResponse(planned=PLAN),
    registry_pb2.LoadModelResponse(warning="own quantization won"),
    registry_pb2.LoadModelResponse(
        progress=registry_pb2.StageProgress(stage=0, fetched_bytes=1 << 30, fetch_bytes=12 << 30, tensors=9)
    ),
    registry_pb2.LoadModelResponse(
        progress=registry_pb2.StageProgress(stage=0, fetched_bytes=2 << 30, fetch_bytes=12 << 30, tensors=9)
    ),
    registry_pb2.LoadModelResponse(
        progress=registry_pb2.StageProgress(
            stage=0, fetched_bytes=12 << 30, fetch_bytes=12 << 30, tensors=9, resident_bytes=3 << 30, done=True
        )
    ),
    registry_pb2.LoadModelResponse(ready=INFO),
]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDLIFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    for name in ("SHARDLIFT_ADDRESS", "SHARDLIFT_TOKEN", "RAY_ADDRESS", "RAY_JOB_ID", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as gateway:
        monkeypatch.setenv("SHARDLIFT_ADDRESS", gateway.address)
        yield gateway


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=stdin)


def row(table: str, first: str) -> str:
    """The row of a printed table that begins with `first`, with single spaces."""
    (found,) = (" ".join(line.split()) for line in table.splitlines() if line.split()[:1] == [first])
    return found


def known_model(gateway: ScriptedGateway) -> None:
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=INFO))


def text_answer(*pieces: str, **finished: Any) -> list[inference_pb2.GenerateResponse]:
    reply = inference_pb2.GenerateResponse
    return [
        reply(accepted=inference_pb2.PromptAccepted(batch=1, prompt_tokens=2, prompt_ids=[1, 2])),
        *(reply(step=inference_pb2.GeneratedStep(token_ids=[7], text=piece)) for piece in pieces),
        reply(finished=inference_pb2.GenerationFinished(new_tokens=len(pieces), reason="stop")),
    ]


def test_plan(gateway: ScriptedGateway) -> None:
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    done = run("plan", "org/tiny", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == PLAN_JSON
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    done = run("plan", "org/tiny")
    assert row(done.stdout, "0") == "0 10.0.0.7 cuda:0 0–3 3.00 GiB ████████▒▒ 100 % 12.00 GiB 64 B"
    assert row(done.stdout, "total") == "total 3.00 GiB 12.00 GiB 64 B"
    assert "room for 65,536 tokens of all sessions together (2.00 GiB for keys and values)" in done.stdout
    assert "about 3 min 20 s to load; bottleneck: stage 0, the link to node 10.0.0.7, at 64.0 MB/s" in done.stdout
    assert "note: expect snow" in done.stdout


def test_plan_draws_the_cluster(gateway: ScriptedGateway, tmp_path: Path) -> None:
    plan = registry_pb2.Plan()
    plan.CopyFrom(PLAN)
    plan.model = "a<b & c"
    for device in ("cuda:0", "cuda:1"):
        plan.devices.add(node="10.0.0.7", device=device, capacity_bytes=4 << 30)
    plan.devices.add(node="<other>", device="cuda:0", capacity_bytes=1 << 30)
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=plan))
    done = run("plan", "org/tiny", "--svg", str(tmp_path / "plan.svg"), "--json")
    assert done.exit_code == 0, done.output
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    texts = [text.text or "" for text in root.iterfind(".//svg:text", space)]
    assert "a<b & c (nf4)" in texts
    assert {"10.0.0.7", "<other>", "stage 0: 0–3", "3.00 GiB"} <= set(texts)
    devices = root.findall(".//svg:rect[@class='device']", space) + root.findall(
        ".//svg:rect[@class='device unused']", space
    )
    assert len(devices) == 3
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=plan))
    failed = run("plan", "org/tiny", "--svg", str(tmp_path / "no" / "plan.svg"))
    assert failed.exit_code == 2
    assert "the picture can't be written" in failed.stderr


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00", "can't be read")]
)
@pytest.mark.parametrize("option", ["--token-file", "--hf-token-file"])
def test_a_file_that_holds_no_token_is_refused(
    option: str, content: bytes, said: str, gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not passed over: the environment's token, which would go in its place, is another's."""
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    (tmp_path / "token").write_bytes(content)
    failed = run("plan", "org/tiny", option, str(tmp_path / "token"))
    assert (failed.exit_code, gateway.calls) == (2, [])
    assert f"{tmp_path / 'token'} {said}" in " ".join(failed.stderr.split())


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "86401"])
@pytest.mark.parametrize(
    "command",
    [("up", "--grace"), ("drain", "a-node", "--timeout"), ("doctor", "--timeout"), ("load", "x", "--idle-timeout")],
)
def test_seconds_are_a_number(command: tuple[str, ...], seconds: str, gateway: ScriptedGateway) -> None:
    """A gateway with a grace of nan could not be stopped again."""
    failed = run(*command, seconds)
    assert (failed.exit_code, gateway.calls) == (2, [])
    assert command[-1] in failed.stderr


def test_an_up_that_is_ended_starts_nothing(tmp_path: Path) -> None:
    """What starts the gateway has a session of its own, and would go on."""
    starts, pid = tmp_path / "python", tmp_path / "pid"
    starts.write_text(f"#!/bin/sh\necho $$ > {pid}.new\nmv {pid}.new {pid}\nexec sleep 60\n")
    starts.chmod(0o755)
    code = f"import sys; sys.executable = {str(starts)!r}; sys.argv = ['shardlift', 'up']; "
    code += "from shardlift.client.cli.main import main; main()"
    environment = os.environ | {"SHARDLIFT_HOME": str(tmp_path / "home")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as command:
        while not pid.exists():
            assert command.poll() is None
            time.sleep(0.02)
        command.terminate()
        _, said = command.communicate(timeout=30)
    assert (command.returncode, said) == (143, "SIGTERM: no gateway is started\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_home_that_cannot_be_written_is_told(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARDLIFT_HOME", str(tmp_path / "file" / "home"))
    failed = run(command)
    assert failed.exit_code == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: the folder of the local instance, {tmp_path}/file/home, can't be written: ")
    assert "SHARDLIFT_HOME" in line


def test_a_token_file_of_another_system_is_read(gateway: ScriptedGateway, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfhf_mine\r\n")
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    assert run("plan", "org/tiny", "--hf-token-file", str(tmp_path / "token")).exit_code == 0
    assert gateway.calls[0].request.source.token == "hf_mine"


def test_every_flag_arrives(gateway: ScriptedGateway, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("hf_mine\n")
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    done = run(
        *("plan", "org/tiny", "--revision", "v1", "--subfolder", "sub", "--variant", "fp16", "--dtype", "bfloat16"),
        *("--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--bnb-4bit-use-double-quant"),
        *("--bnb-4bit-compute-dtype", "bfloat16", "--bnb-4bit-quant-storage", "uint8", "--num-stages", "2"),
        *("--quantize-experts", "--requantize", "--dequantize"),
        *("--device-map", '{"model.layers.0": 0, "": "cpu"}', "--max-memory", "0=20GiB", "--max-memory", '{"cpu": 7}'),
        *("--attn-implementation", "eager", "--trust-remote-code", "--cache-dir", str(tmp_path)),
        *("--hf-token-file", str(tmp_path / "hub"), "--json"),
    )
    assert done.exit_code == 0, done.output
    asked = gateway.calls[0].request
    assert asked.source == registry_pb2.ModelSource(
        path="org/tiny",
        revision="v1",
        subfolder="sub",
        variant="fp16",
        token="hf_mine",
        cache_dir=str(tmp_path),
        trust_remote_code=True,
    )
    sent = asked.options
    assert (sent.dtype, sent.num_stages, sent.attn_implementation) == ("bfloat16", 2, "eager")
    assert sent.quantize_experts
    assert sent.requantize
    assert sent.dequantize
    assert dict(sent.device_map_by_module) == {"model.layers.0": "0", "": "cpu"}
    assert dict(sent.max_memory) == {"0": "20GiB", "cpu": "7"}
    assert json.loads(sent.quantization_config_json) == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def test_the_quantization_flags_make_transformers_config(gateway: ScriptedGateway) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    run("plan", "org/tiny", "--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--bnb-4bit-compute-dtype", "bfloat16")
    config = BitsAndBytesConfig.from_dict(json.loads(gateway.calls[0].request.options.quantization_config_json))
    expected = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert config.to_dict() == expected.to_dict()
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    run("plan", "org/tiny", "--load-in-8bit", "--device-map", "balanced", "--no-quantize-experts")
    assert not gateway.calls[0].request.options.without_quantized_experts
    sent = gateway.calls[1].request.options
    assert not sent.quantize_experts
    assert sent.without_quantized_experts
    config = BitsAndBytesConfig.from_dict(json.loads(sent.quantization_config_json))
    assert config.to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()
    assert sent.device_map == "balanced"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--load-in-4bit", "--load-in-8bit"],
        ["--bnb-4bit-quant-type", "nf4"],
        ["--quantize-experts"],
        ["--quantize-experts", "--load-in-8bit"],
        ["--requantize"],
        ["--bnb-4bit-quant-type", "nf5"],
        ["--max-memory", "20GiB"],
        ["--device-map", "{"],
        ["--num-stages", "0"],
        ["--nonsense"],
    ],
)
def test_wrong_command_lines(arguments: list[str]) -> None:
    done = run("plan", "org/tiny", "--address", "127.0.0.1:1", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Error" in done.stderr


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/stdin\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path


def test_plan_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_python(tmp_path, monkeypatch, f"echo '{MessageToJson(PLAN, indent=None)}'")
    done = run("plan", "org/tiny", "--devices", "8x80GiB", "--num-stages", "2", "--load-in-8bit", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == PLAN_JSON
    assert (fake / "arguments").read_text() == "-m shardlift.cluster.offline --json\n"
    request = json.loads((fake / "stdin").read_text())
    assert json.loads(request["options"].pop("quantization_config_json")) == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
    }
    assert request == {
        "source": {"path": "org/tiny", "revision": "main"},
        "options": {"dtype": "auto", "device_map": "auto", "num_stages": 2},
        "devices": "8x80GiB",
    }
    (tmp_path / "topology.json").write_text('[{"node": "a", "device": "cuda:0", "memory": 7}]')
    run("plan", "org/tiny", "--devices", str(tmp_path / "topology.json"))
    assert json.loads((fake / "stdin").read_text())["devices"] == [{"node": "a", "device": "cuda:0", "memory": 7}]


def test_a_topology_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "topology.json").write_text("{")
    done = run("plan", "org/tiny", "--devices", str(tmp_path / "topology.json"))
    assert done.exit_code == 2
    assert f"the topology file {tmp_path / 'topology.json'} is no valid JSON" in done.stderr


def test_plan_without_a_cluster_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"error": "OutOfMemoryError", "message": "1 GiB is missing"})
    fake_python(tmp_path, monkeypatch, f"echo '{said}'; exit 1")
    done = run("plan", "org/tiny", "--devices", "1x1GiB")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "error: 1 GiB is missing\n")
    fake_python(tmp_path, monkeypatch, "echo oops >&2; exit 3")
    done = run("plan", "org/tiny", "--devices", "1x1GiB")
    assert (done.exit_code, done.stderr) == (1, "error: the planner ended with 3: oops\n")


def test_load(gateway: ScriptedGateway) -> None:
    gateway.answer("LoadModel", *LOAD)
    known_model(gateway)
    done = run("load", "org/tiny", "--name", "tiny")
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        "loading tiny at abc123",
        "plan: 1 stage, 12.00 GiB to fetch, 3.00 GiB resident (nf4)",
        "warning: own quantization won",
        "stage 0 on 10.0.0.7/cuda:0: 1.00 GiB of 12.00 GiB fetched, 0 of 9 tensors",
        "stage 0 on 10.0.0.7/cuda:0: 12.00 GiB of 12.00 GiB fetched, resident in 3.00 GiB",
        "tiny is ready after 2.0 s",
    ]
    assert row(done.stdout, "0") == "0 10.0.0.7 cuda:0 0–3 3.00 GiB 3.00 GiB +512 B"
    assert done.stdout.splitlines()[-1] == f"tiny at {gateway.address}"
    assert gateway.calls[0].request.name == "tiny"


def test_load_says_how_sessions_run(gateway: ScriptedGateway) -> None:
    gateway.answer("LoadModel", *LOAD)
    known_model(gateway)
    flags = ["--max-sessions", "3", "--max-waiting", "4", "--idle-timeout", "1.5", "--no-batching"]
    assert run("load", "org/tiny", *flags).exit_code == 0
    asked = gateway.calls[0].request.options
    assert (asked.max_sessions, asked.max_waiting, asked.idle_timeout_s) == (3, 4, 1.5)
    assert asked.without_batching
    assert run("load", "org/tiny", "--idle-timeout", "0").exit_code == 2


def test_load_json(gateway: ScriptedGateway) -> None:
    gateway.answer("LoadModel", *LOAD)
    known_model(gateway)
    values = json.loads(run("load", "org/tiny", "--json").stdout)
    assert values["name"] == "tiny"
    assert values["address"] == gateway.address
    assert values["stages"][0]["measured_bytes"] == (3 << 30) + 512


def test_what_a_load_took_is_told_once(gateway: ScriptedGateway) -> None:
    """Whoever collects both streams in one file, as a job's log does, reads it once."""
    for words in ((), ("--json",)):
        ready = registry_pb2.ModelInfo()
        ready.CopyFrom(LOAD[-1].ready)
        ready.residency[0].load.seconds = 1.5
        gateway.answer("LoadModel", *LOAD[:-1], registry_pb2.LoadModelResponse(ready=ready))
        gateway.answer("GetModel", registry_pb2.GetModelResponse(model=ready))
        done = run("load", "org/tiny", *words)
        assert done.exit_code == 0, done.output
        assert (done.stdout + done.stderr).count("bottleneck: ") == 1
        assert ("bottleneck: " in done.stderr) is bool(words)


def test_load_that_fails(gateway: ScriptedGateway) -> None:
    gateway.answer("LoadModel", LOAD[0], error=errors.CheckpointNotFoundError("no repository org/tiny"))
    done = run("load", "org/tiny")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: no repository org/tiny"


def test_list_show_unload(gateway: ScriptedGateway) -> None:
    listed = registry_pb2.ListModelsResponse(models=[INFO])
    gateway.answer("ListModels", listed)
    done = run("list")
    assert row(done.stdout, "tiny") == "tiny ready org/tiny nf4 1 3.00 GiB"
    gateway.answer("ListModels", listed)
    (entry,) = json.loads(run("list", "--json").stdout)
    assert (entry["name"], entry["state"], entry["measured_bytes"]) == ("tiny", "ready", (3 << 30) + 512)
    for flags in ([], ["--json"]):
        known_model(gateway)
        known_model(gateway)
        done = run("show", "tiny", *flags)
        assert done.exit_code == 0
    values = json.loads(done.stdout)
    assert values["state"] == "ready"
    (stage,) = values["stages"]
    assert {name: stage[name] for name in PLAN_JSON["stages"][0]} == PLAN_JSON["stages"][0]  # type: ignore[index]
    assert stage["measured_bytes"] == (3 << 30) + 512
    assert stage["modules"] == {"model": {"dtype": "nf4", "bytes": 7, "device": "cuda:0"}}
    assert values["kv_tokens"] == 65_536
    assert (values["recoveries"], values["recovery_seconds"]) == (0, 0.0)
    gateway.answer("UnloadModel", registry_pb2.UnloadModelResponse())
    assert run("unload", "tiny").stdout == "unloaded tiny\n"
    gateway.answer("UnloadModel", error=errors.ModelNotFoundError("no model is called tiny"))
    done = run("unload", "tiny", "--json")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "error: no model is called tiny\n")


def test_show_a_model_that_recovers(gateway: ScriptedGateway) -> None:
    info = registry_pb2.ModelInfo()
    info.CopyFrom(INFO)
    info.state, info.reason = registry_pb2.MODEL_STATE_RECOVERING, "stage 0 was lost"
    info.recoveries, info.recovery_seconds = 2, 8.25
    for flags in ([], ["--json"]):
        for _ in range(2):
            gateway.answer("GetModel", registry_pb2.GetModelResponse(model=info))
        done = run("show", "tiny", *flags)
        assert done.exit_code == 0
        if not flags:
            assert "tiny: org/tiny (nf4), recovering" in done.stdout
            assert "stage 0 was lost\n" in done.stdout
            assert "recovered 2 times, the last time in 8.2 s" in done.stdout
    values = json.loads(done.stdout)
    assert (values["state"], values["recoveries"], values["recovery_seconds"]) == ("recovering", 2, 8.25)


def test_generate(gateway: ScriptedGateway) -> None:
    known_model(gateway)
    gateway.answer("Generate", *text_answer("Hel", "", "lo"))
    flags = ["--max-new-tokens", "3", "--do-sample", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5"]
    flags += ["--min-p", "0.25", "--repetition-penalty", "1.5", "--stop", "Human:", "--stop", "\n\n"]
    done = run("generate", "tiny", "--prompt", "Say it", *flags, "--seed", "4")
    assert (done.exit_code, done.stdout) == (0, "Hello\n")
    asked = gateway.calls[-1].request
    assert (asked.prompt, asked.seed) == ("Say it", 4)
    assert MessageToDict(asked.generation) == {
        "max_new_tokens": 3,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "stop_strings": ["Human:", "\n\n"],
    }
    known_model(gateway)
    gateway.answer("Generate", *text_answer("Hel", "lo"))
    assert json.loads(run("generate", "tiny", "--prompt", "Say it", "--json").stdout) == {
        "text": "Hello",
        "token_ids": [7, 7],
        "prompt_tokens": 2,
        "new_tokens": 2,
        "finish_reason": "stop",
    }


def test_generate_that_fails_midway(gateway: ScriptedGateway) -> None:
    known_model(gateway)
    gateway.answer("Generate", *text_answer("Hel")[:2], error=errors.ModelUnavailableError("stage 0 is gone"))
    done = run("generate", "tiny", "--prompt", "Say it")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "Hel", "error: stage 0 is gone\n")


def test_chat(gateway: ScriptedGateway) -> None:
    known_model(gateway)
    for piece in ("Hi", "Two", "New"):
        gateway.answer("Generate", *text_answer(piece))
    done = run("chat", "tiny", "--system", "Be brief.", stdin="Hello\n\nMore\n/reset\nAgain\n/exit\nnever\n")
    assert (done.exit_code, done.stdout) == (0, "Hi\nTwo\nNew\n")
    said = [
        [(message.role, message.content) for message in call.request.conversation.messages]
        for call in gateway.calls[1:]
    ]
    system = ("system", "Be brief.")
    assert said == [
        [system, ("user", "Hello")],
        [system, ("user", "Hello"), ("assistant", "Hi"), ("user", "More")],
        [system, ("user", "Again")],
    ]


def test_chat_ends_with_its_input(gateway: ScriptedGateway) -> None:
    known_model(gateway)
    gateway.answer("Generate", *text_answer("Hi"))
    assert run("chat", "tiny", stdin="Hello").exit_code == 0


def test_down_without_an_instance() -> None:
    done = run("down")
    assert done.exit_code == 0
    assert done.stdout.startswith("no local instance is recorded; a Ray cluster's gateway is stopped with")
    assert "shardlift down --ray-address" in done.stdout
    assert json.loads(run("down", "--json").stdout) == {"stopped": False, "address": None}


def test_down_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_python(tmp_path, monkeypatch, """echo '{"address": "10.0.0.1:50051", "ray_address": "a:1"}'""")
    assert run("down", "--ray-address", "a:1").stdout == "stopped 10.0.0.1:50051\n"
    assert (fake / "arguments").read_text() == "-m shardlift.cluster.down --json --ray-address a:1\n"
    fake_python(tmp_path, monkeypatch, """echo '{"address": null, "ray_address": "a:1"}'""")
    done = run("down", "--ray-address", "a:1")
    assert (done.exit_code, done.stdout) == (0, "no gateway runs on the cluster at a:1\n")


def test_up_prints_the_address(gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = json.dumps({"address": gateway.address, "ray_address": "a:1"})
    fake = fake_python(tmp_path, monkeypatch, f"echo '{ready}'")
    done = run("up", "--port", "50052", "--host", "127.0.0.1", "--ray-address", "a:1")
    assert (done.exit_code, done.stdout) == (0, f"{gateway.address}\n")
    expected = "-m shardlift.cluster.up --json --host 127.0.0.1 --port 50052 --ray-address a:1\n"
    assert (fake / "arguments").read_text() == expected
    assert json.loads(run("up", "--json").stdout) == {
        "address": gateway.address,
        "pid": None,
        "ray_address": "a:1",
        "token_file": None,
        "page": None,
    }


def test_up_passes_on_what_it_is_warned_of(
    gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["its token travels in plain text", "there is no page: port 50052 is taken"]
    ready = json.dumps({"address": gateway.address, "warnings": said})
    fake_python(tmp_path, monkeypatch, f"echo '{ready}'")
    done = run("up")
    assert (done.exit_code, done.stdout) == (0, f"{gateway.address}\n")
    assert done.stderr == "".join(f"warning: {each}\n" for each in said)
    assert run("up").stderr == "", "it was told"


def test_the_gateways_token_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    with ScriptedGateway(token="secret") as gateway:
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        done = run("list", "--json", "--address", gateway.address, "--token-file", str(tmp_path / "token"))
    assert (done.exit_code, json.loads(done.stdout)) == (0, [])


# The command as a process of its own


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shardlift.client.cli.main", *arguments]


def test_a_dead_gateway_is_one_line_and_exit_code_1() -> None:
    done = subprocess.run(command("list", "--address", "127.0.0.1:1"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no gateway answers at 127.0.0.1:1")


def test_a_wrong_command_line_is_exit_code_2() -> None:
    done = subprocess.run(command("list", "--nonsense"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_sigterm_stops_a_gateway_that_is_kept(gateway: ScriptedGateway, tmp_path: Path) -> None:
    ready = json.dumps({"address": gateway.address, "ray_address": "a:1"})
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/arguments\necho '{ready}'\n")
    program.chmod(0o755)
    code = f"import sys; sys.executable = {str(program)!r}; from shardlift.client.cli.main import main; main()"
    arguments = ("up", "--ray-address", "a:1", "--block")
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{gateway.address}\n"
            process.terminate()
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")
    up, down = (tmp_path / "arguments").read_text().splitlines()
    assert up == "-m shardlift.cluster.up --json --ray-address a:1"
    assert down == "-m shardlift.cluster.down --json"


@pytest.mark.parametrize(
    ("number", "code", "last"),
    [
        (signal.SIGINT, 130, None),
        (signal.SIGTERM, 143, "SIGTERM: the load is cancelled, and gives back what it took"),  # as `ray job stop` sends
    ],
)
def test_a_signal_cancels_a_load(gateway: ScriptedGateway, number: signal.Signals, code: int, last: str | None) -> None:
    def play(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield LOAD[0]
        os.kill(process.pid, number)
        gateway.calls[-1].over.wait(30)

    gateway.expect("LoadModel", play)
    process = subprocess.Popen(
        command("load", "org/tiny"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        preexec_fn=interrupts.heed,  # noqa: PLW1509 - nothing else would do
    )
    with process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert last is None or err.splitlines()[-1] == last
    assert gateway.calls[-1].over.wait(10)
    assert gateway.calls[-1].cancelled
