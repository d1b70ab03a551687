"""`.bin` checkpoints: refused with the way to convert them, and converted without running anything that they hold."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shardlift.client.cli.main import cli
from shardlift.cluster.checkpoint import CheckpointRequest, read_checkpoint
from shardlift.cluster.convert import convert
from shardlift.proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidRequestError,
    UnsupportedModelError,
)
from tests.support.checkpoints import tiny
from tests.support.hub import HubServer
from tests.test_layout import loaded, planned

WEIGHTS = "pytorch_model.bin"


def pickled(folder: Path, out: Path, shards: int = 1, variant: str = "", **options: Any) -> Path:
    """The checkpoint in `folder`, as it was saved before there were safetensors."""
    out.mkdir(parents=True)
    tensors = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        torch.save(tensors, out / f"pytorch_model{dotted}.bin", **options)
    else:
        names = sorted(tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}{dotted}.bin"
            torch.save({name: tensors[name] for name in names[shard::shards]}, out / file, **options)
            weight_map |= dict.fromkeys(names[shard::shards], file)
        (out / f"pytorch_model.bin.index{dotted}.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in ("config.json", "generation_config.json"):
        (out / file).write_bytes((folder / file).read_bytes())
    (out / "tokenizer_config.json").write_text("{}")
    (out / "modeling_evil.py").write_text("raise SystemExit\n")
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), layers=2, dtype="bfloat16")


def request_for(folder: Path | str, **fields: Any) -> CheckpointRequest:
    return CheckpointRequest(path=str(folder), **fields)


@pytest.mark.parametrize(
    ("shards", "options"),
    [(1, {}), (3, {}), (1, {"_use_new_zipfile_serialization": False})],
    ids=["one", "several", "before torch 1.6"],
)
def test_what_was_converted_is_the_same_model(
    llama: Path, tmp_path: Path, shards: int, options: dict[str, Any]
) -> None:
    folder = pickled(llama, tmp_path / "bin", shards, **options)
    told = convert(request_for(folder), None, out := tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(llama)
    names = set(whole.state_dict())
    assert (told["files"], told["tensors"]) == (shards, len(names))
    assert told["bytes"] == sum(tensor.nbytes for tensor in whole.state_dict().values())
    theirs = AutoModelForCausalLM.from_pretrained(out)
    [ours] = loaded(planned(out, stages=1))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)
        assert torch.equal(ours.stage.model.state_dict()[name], tensor)
    assert (out / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    files = {file.name for file in out.iterdir()}
    assert {"generation_config.json", "tokenizer_config.json"} <= files
    assert not any(name.endswith((".bin", ".py")) for name in files)
    assert ("model.safetensors" in files) == (shards == 1)
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "out"}, "nothing is left beside it"


def test_a_variant_keeps_its_name(llama: Path, tmp_path: Path) -> None:
    for shards in (1, 2):
        folder = pickled(llama, tmp_path / f"bin{shards}", shards, variant="fp16")
        convert(request_for(folder, variant="fp16"), None, tmp_path / f"out{shards}")
        assert read_checkpoint(request_for(tmp_path / f"out{shards}", variant="fp16"), None).records


def test_from_the_hub(llama: Path, tmp_path: Path, hub: HubServer) -> None:
    """Fetched file by file, each gone once it is converted."""
    folder = pickled(llama, tmp_path / "bin", 2)
    hub.add_repo("org/pickled", folder)
    request = request_for("org/pickled", hub_endpoint=hub.endpoint)
    told = convert(request, False, tmp_path / "out")
    assert told["files"] == 2
    local = convert(request_for(folder), None, tmp_path / "local")
    assert told | {"folder": ""} == local | {"folder": ""}
    for file in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_the_refusal_names_the_command(llama: Path, tmp_path: Path) -> None:
    folder = pickled(llama, tmp_path / "bin", 2, variant="fp16")
    with pytest.raises(UnsupportedModelError) as caught:
        read_checkpoint(request_for(folder, variant="fp16"), None)
    assert f"`shardlift convert {folder} FOLDER --variant fp16`" in str(caught.value)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_in_a_file_never_runs(llama: Path, tmp_path: Path, way: str) -> None:
    folder = pickled(llama, tmp_path / "bin")
    evil = {"model.norm.weight": Evil(tmp_path / "pwned")}
    if way == "torch":
        torch.save(evil, folder / WEIGHTS)
    else:
        (folder / WEIGHTS).write_bytes(pickle.dumps(evil))
    with pytest.raises(CorruptCheckpointError, match=r"pytorch_model\.bin is not weights alone"):
        convert(request_for(folder), None, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


@pytest.mark.parametrize(
    ("state", "mentioned"),
    [
        ([1, 2], "holds a list"),
        ({"a": 3}, "holds a int as 'a'"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2).to_sparse()}, "not a tensor"),
        ({}, "not tensors by name"),
    ],
    ids=str,
)
def test_files_that_hold_something_else(llama: Path, tmp_path: Path, state: Any, mentioned: str) -> None:
    folder = pickled(llama, tmp_path / "bin")
    torch.save(state, folder / WEIGHTS)
    with pytest.raises(CorruptCheckpointError) as caught:
        convert(request_for(folder), None, tmp_path / "out")
    assert mentioned in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


def test_a_file_cut_short(llama: Path, tmp_path: Path) -> None:
    folder = pickled(llama, tmp_path / "bin")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptCheckpointError, match="pytorch_model"):
        convert(request_for(folder), None, tmp_path / "out")


def test_there_must_be_something_to_convert_and_a_place_for_it(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to convert"):
        convert(request_for(llama), None, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="nothing to convert"):
        convert(request_for(tmp_path / "empty"), None, tmp_path / "out")
    folder = pickled(llama, tmp_path / "bin")
    with pytest.raises(InvalidRequestError, match="is there already"):
        convert(request_for(folder), None, folder)
    convert(request_for(folder), None, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_the_command(llama: Path, tmp_path: Path) -> None:
    folder = pickled(llama, tmp_path / "bin", 2)
    done = run("convert", str(folder), str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == 2
    again = run("convert", str(folder), str(tmp_path / "out"))
    assert again.exit_code == 1
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "is there already" in again.stderr
