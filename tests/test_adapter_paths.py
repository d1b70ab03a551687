"""Where an adapter and its base are found, and whether there is room: the controller's decisions, without stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from shardlift.cluster.adapter_room import added, kv_tokens_beside
from shardlift.cluster.adapters import outline_path, split
from shardlift.proto.v1 import errors, registry_pb2
from tests.support import adapters, checkpoints
from tests.support.hub import HubServer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapters.make(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))


def source(path: Path | str, **fields: Any) -> registry_pb2.ModelSource:
    return registry_pb2.ModelSource(path=str(path), **fields)


def test_an_adapter_s_folder_means_its_base(base: Path, adapter: Path) -> None:
    found = outline_path(source(adapter), registry_pb2.LoadOptions())
    assert found.base.path == str(base)
    assert found.adapter is not None
    assert found.adapter.spec.name == "default"
    assert found.adapter.spec.modules == tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(4))
    plain = outline_path(source(base), registry_pb2.LoadOptions())
    assert plain.adapter is None
    assert plain.base.path == str(base)


def test_a_relative_base_is_found_beside_the_adapter(base: Path, adapter: Path) -> None:
    (adapter / "there").symlink_to(base)
    adapters.edit(adapter, base_model_name_or_path="there")
    assert split(source(adapter), None).base.path == str(base)
    adapters.edit(adapter, base_model_name_or_path="org/base", revision="v1")
    parts = split(source(adapter), None)
    assert (parts.base.path, parts.base.revision) == ("org/base", "v1")


@pytest.mark.parametrize("named", [None, "", 3])
def test_an_adapter_without_a_base_is_refused(adapter: Path, named: object) -> None:
    adapters.edit(adapter, base_model_name_or_path=named)
    with pytest.raises(errors.InvalidRequestError, match="names no base model: load the base"):
        outline_path(source(adapter), registry_pb2.LoadOptions())


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = adapters.make(base, tmp_path / "other", LoraConfig(r=2, target_modules=["q_proj"]))
    adapters.edit(adapter, base_model_name_or_path=str(other))
    with pytest.raises(errors.UnsupportedModelError, match="is an adapter"):
        outline_path(source(adapter), registry_pb2.LoadOptions())


def test_adapter_kwargs_lead_to_a_subfolder(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    adapters.make(base, folder / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    options = registry_pb2.LoadOptions(adapter=registry_pb2.ModelSource(subfolder="lora"))
    found = outline_path(source(folder), options)
    # As transformers has it: a whole model beside an adapter is its base, whatever the adapter says.
    assert found.base.path == str(folder)
    assert found.adapter is not None
    nowhere = registry_pb2.LoadOptions(adapter=registry_pb2.ModelSource(subfolder="elsewhere"))
    with pytest.raises(errors.CheckpointNotFoundError, match="where adapter_kwargs say"):
        outline_path(source(folder), nowhere)


def test_a_repository_s_revision_becomes_a_commit(base: Path, adapter: Path, hub: HubServer) -> None:
    adapters.edit(adapter, base_model_name_or_path=str(base))
    hub.add_repo("org/lora", adapter)
    hub.clear()
    found = outline_path(source("org/lora", hub_endpoint=hub.endpoint), registry_pb2.LoadOptions())
    assert found.adapter is not None
    assert found.adapter.spec.source.commit
    assert found.adapter_source is not None
    assert found.adapter_source.revision == found.adapter.spec.source.commit
    assert json.loads(json.dumps(found.adapter.spec.to_json()))["path"] == "org/lora"


# -- room --------------------------------------------------------------------------------------------------------------


def stage(**fields: Any) -> registry_pb2.StagePlan:
    values = {
        "node": "n",
        "device": "cpu:0",
        "resident_bytes": 100,
        "workspace_bytes": 0,
        "kv_budget_bytes": 50,
        "kv_bytes_per_token": 10,
        "capacity_bytes": 170,
    }
    return registry_pb2.StagePlan(**(values | fields))


@pytest.mark.parametrize(
    ("held", "tokens"),
    [(0, 5), (20, 5), (21, 4), (60, 1), (61, None)],
    ids=str,
)
def test_adapters_take_what_is_spare_and_then_of_the_tokens(held: int, tokens: int | None) -> None:
    if tokens is None:
        with pytest.raises(errors.OutOfMemoryError, match=r"adapter x needs 61 B on n/cpu:0.*60 B are free"):
            kv_tokens_beside([stage()], [held], "x")
    else:
        assert kv_tokens_beside([stage()], [held], "x") == tokens


def test_promised_tokens_and_a_gpu_s_slack_are_not_touched() -> None:
    assert kv_tokens_beside([stage(kv_bytes=50)], [20], "x") == 5
    with pytest.raises(errors.OutOfMemoryError):
        kv_tokens_beside([stage(kv_bytes=50)], [21], "x")
    assert kv_tokens_beside([stage(device="cuda:0")], [1], "x") == 4
    assert kv_tokens_beside([stage(), stage(kv_bytes_per_token=5)], [20, 40], "x") == 5
    assert kv_tokens_beside([stage(kv_budget_bytes=0)], [10**9], "x") == 0
    assert added([[1, 2], [10, 20]], 2) == [11, 22]
