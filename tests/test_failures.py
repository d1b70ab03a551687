"""What goes wrong says so in one clear line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import shardlift
from shardlift.client.values import LoadEvent, LoadWarning
from shardlift.proto.v1 import errors
from tests.support import checkpoints
from tests.support.cluster import RunningCluster
from tests.support.hub import HubServer, RequestInfo, Status

TOKEN = "hf_a_token_that_must_never_be_shown"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny("llama", tmp_path_factory.mktemp("sound"), dtype="bfloat16")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    with shards(folder)[-1].open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def corrupt_header(folder: Path) -> None:
    with shards(folder)[0].open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 40))


def header_that_lies(folder: Path) -> None:
    file = shards(folder)[0]
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"][0] += 1
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def drop_tensor(folder: Path) -> None:
    for file in shards(folder):
        tensors = load_file(file)
        if tensors.pop("model.layers.2.mlp.up_proj.weight", None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})


def add_tensor(folder: Path) -> None:
    tensors = load_file(shards(folder)[0])
    tensors["model.layers.0.mlp.extra.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, shards(folder)[0], metadata={"format": "pt"})


def misshape_tensor(folder: Path) -> None:
    for file in shards(folder):
        tensors = load_file(file)
        if "model.layers.2.mlp.up_proj.weight" in tensors:
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"][:64].clone()
            save_file(tensors, file, metadata={"format": "pt"})


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "warpdrive", "architectures": ["WarpdriveForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def unproven_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


SPOILT = {
    truncate: (errors.CorruptCheckpointError, "truncated"),
    corrupt_header: (errors.CorruptCheckpointError, "header"),
    header_that_lies: (errors.CorruptCheckpointError, ""),
    drop_tensor: (errors.TensorMismatchError, "model.layers.2.mlp.up_proj.weight"),
    misshape_tensor: (errors.TensorMismatchError, "model.layers.2.mlp.up_proj.weight"),
    unknown_architecture: (errors.UnsupportedModelError, "warpdrive"),
    unproven_family: (errors.UnsupportedModelError, "mamba"),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_spoilt_checkpoints_are_named_for_what_they_are(spoil, cluster: RunningCluster, folder: Path) -> None:
    expected, mentioned = SPOILT[spoil]
    spoil(folder)
    with shardlift.connect(cluster.gateway) as client, pytest.raises(expected) as caught:
        client.load(str(folder), name="spoilt", num_stages=2, quantization_config={"load_in_4bit": True})
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)
    cluster.assert_nothing_left()


def test_a_tensor_too_many_is_told_of(cluster: RunningCluster, folder: Path) -> None:
    """As by transformers, which loads the rest."""
    add_tensor(folder)
    warnings: list[str] = []

    def note(event: LoadEvent) -> None:
        if isinstance(event, LoadWarning):
            warnings.append(event.message)

    with shardlift.connect(cluster.gateway) as client:
        client.load(str(folder), name="too-many", num_stages=2, on_event=note).unload()
    assert any("model.layers.0.mlp.extra.weight" in warning for warning in warnings), warnings
    cluster.assert_nothing_left()


def fail(gateway: str, *arguments: str, **environment: str) -> str:
    """Runs a command that must fail; the one line that it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "shardlift.client.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"SHARDLIFT_ADDRESS": gateway} | environment,
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    return lines[0]


def test_command_line_says_it_in_one_line(cluster: RunningCluster, hub: HubServer, sound: Path, tmp_path: Path) -> None:
    gateway = cluster.gateway
    hub.add_repo("org/gated", sound, gated_token=TOKEN)
    endpoint = {"HF_ENDPOINT": hub.endpoint}

    line = fail(gateway, "load", str(tmp_path / "nowhere"), "--name", "a")
    assert "nowhere" in line
    assert "does not exist" in line
    line = fail(gateway, "load", "org/none", "--name", "a", **endpoint)
    assert "org/none" in line
    line = fail(gateway, "load", "org/smollm2", "--revision", "v9", "--name", "a", **endpoint)
    assert "'v9'" in line
    line = fail(gateway, "load", "org/gated", "--name", "a", **endpoint)
    assert "gated" in line
    assert "HF_TOKEN" in line
    line = fail(gateway, "load", "org/gated", "--name", "a", **endpoint, HF_TOKEN="hf_wrong")
    assert "gated" in line
    line = fail(gateway, "load", str(sound), "--name", "a", "--max-memory", "cpu=100KB")
    assert "resident" in line
    assert "add devices" in line
    line = fail(gateway, "load", str(sound), "--name", "a", "--num-stages", "9")
    assert "num_stages=9" in line
    line = fail(gateway, "load", str(sound), "--name", "a b")
    assert "'a b'" in line
    line = fail(gateway, "load", str(sound), "--name", "a", "--device-map", '{"": "cuda:7"}')
    assert "cuda:7" in line
    line = fail("127.0.0.1:1", "list")
    assert "127.0.0.1:1" in line
    assert "shardlift up" in line
    line = fail(gateway, "show", "nobody")
    assert "nobody" in line
    line = fail(gateway, "generate", "nobody", "--prompt", "x")
    assert "nobody" in line
    cluster.assert_nothing_left()


def test_gated_repository_loads_with_its_token(
    cluster: RunningCluster, hub: HubServer, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/gated", sound, gated_token=TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    model = shardlift.AutoModelForCausalLM.from_pretrained(
        "org/gated", token=TOKEN, name="gated", address=cluster.gateway
    )
    try:
        assert TOKEN not in repr(model) + repr(model.info()) + json.dumps(model.plan.to_dict())
        assert not any(request.had_authorization for request in hub.requests if request.origin == "cdn")
    finally:
        model.unload()
    logs = [path for path in cluster.session_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert logs
    assert not [path for path in logs if TOKEN.encode() in path.read_bytes()]


def test_a_name_is_taken_once(cluster: RunningCluster, sound: Path) -> None:
    with shardlift.connect(cluster.gateway) as client:
        model = client.load(str(sound), name="taken")
        line = fail(cluster.gateway, "load", str(sound), "--name", "taken")
        assert "taken" in line
        assert "unload" in line
        assert client.model("taken").info().state == "ready"
        model.unload()
    cluster.assert_nothing_left()


def test_a_worker_that_fails_takes_the_whole_load_back(
    cluster: RunningCluster, hub: HubServer, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers are sound, the driver is content, and then the file is gone."""
    hub.add_repo("org/vanishing", sound)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

    def vanish(request: RequestInfo) -> Status | None:
        is_data = request.origin == "cdn" and request.range is not None and request.range[0] > 0
        return Status(404) if is_data or (request.method == "HEAD" and vanish.read_headers) else None

    vanish.read_headers = False  # type: ignore[attr-defined]
    hub.fault = vanish
    try:
        with shardlift.connect(cluster.gateway) as client, pytest.raises(errors.ShardliftError) as caught:
            client.load("org/vanishing", name="vanishing", num_stages=2)
    finally:
        hub.fault = None
    assert "safetensors" in str(caught.value)
    cluster.assert_nothing_left()
