"""Adapters on a real cluster, the whole way: through the handles and the commands, over losses and restarts."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import shardlift
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1 import errors
from tests.support import adapters, checkpoints
from tests.support.cluster import RunningCluster, eventually
from tests.support.hub import HubServer

IDS = torch.arange(5, 17)[None]
STAGES = 2


@dataclass(frozen=True)
class Files:
    """A base, two adapters of it, and all of them in one process."""

    base: Path
    paths: dict[str, Path]
    whole: Any

    def logits(self, *names: str) -> torch.Tensor:
        return adapters.logits(self.whole, IDS, names)

    def tokens(self, *names: str, **arguments: Any) -> torch.Tensor:
        self.whole.base_model.set_adapter(list(names))
        with torch.inference_mode():
            tokens: torch.Tensor = self.whole.generate(input_ids=IDS, do_sample=False, **arguments)
        return tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("adapters")
    base = checkpoints.tiny("llama", folder / "base", max_position_embeddings=100_000)
    paths = {
        "a": adapters.make(base, folder / "a", LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
        "b": adapters.make(base, folder / "b", LoraConfig(r=2, target_modules="all-linear"), seed=1),
    }
    return Files(base, paths, adapters.whole(base, paths))


@pytest.fixture(scope="module")
def model(cluster: RunningCluster, files: Files) -> Iterator[RemoteModel]:
    with shardlift.connect(cluster.gateway) as client:
        loaded = client.load(str(files.base), name="adapted", num_stages=STAGES, part_cache=False)
        yield loaded
        client.unload("adapted")
    cluster.assert_nothing_left()


@pytest.fixture
def two(model: RemoteModel, files: Files) -> Iterator[RemoteModel]:
    """The model with adapters a and b, and without any afterwards."""
    handle = copy.copy(model)
    for name, path in files.paths.items():
        handle.load_adapter(str(path), name)
    yield handle
    for adapter in model.adapters():
        handle.delete_adapter(adapter.name)


def test_each_request_chooses_and_nobody_disturbs_another(two: RemoteModel, model: RemoteModel, files: Files) -> None:
    assert [adapter.name for adapter in two.adapters()] == ["a", "b"]
    assert two.active_adapters() == ["b"]  # what was loaded last, as with transformers
    assert torch.equal(two(IDS).logits, files.logits("b"))
    other = copy.copy(model)
    assert other.active_adapters() == []
    assert torch.equal(other(IDS).logits, files.logits())
    other.set_adapter("a")
    assert torch.equal(other(IDS).logits, files.logits("a"))
    assert torch.equal(pickle.loads(pickle.dumps(other))(IDS).logits, files.logits("a"))
    assert torch.equal(other(IDS, adapter=["a", "b"]).logits, files.logits("a", "b"))
    assert torch.equal(other(IDS, adapter=None).logits, files.logits())
    other.disable_adapters()
    assert torch.equal(other(IDS).logits, files.logits())
    other.enable_adapters()
    assert torch.equal(other.generate(IDS, max_new_tokens=12, do_sample=False), files.tokens("a", max_new_tokens=12))
    # Driven from here, pass by pass.
    beams = {"max_new_tokens": 8, "num_beams": 3}
    assert torch.equal(other.generate(IDS, adapter="b", **beams), files.tokens("b", **beams))
    assert sorted(other.peft_config) == ["a", "b"]
    assert other.peft_config["a"].r == 4
    with pytest.raises(errors.InvalidRequestError, match="no adapter 'c'; loaded: a, b"):
        other.set_adapter("c")
    with pytest.raises(errors.InvalidRequestError, match="no adapter 'c'; loaded: a, b"):
        other.generate(IDS, max_new_tokens=2, adapter="c")


def test_the_adapter_in_use_is_saved_and_else_the_base(
    two: RemoteModel, model: RemoteModel, files: Files, tmp_path: Path
) -> None:
    """As transformers has it: with an adapter, `save_pretrained` saves that alone."""
    two.save_pretrained(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = adapters.whole(files.base, {"again": tmp_path / "b"})
    assert torch.equal(adapters.logits(again, IDS, ["again"]), files.logits("b"))
    two.set_adapter(["a", "b"])
    with pytest.raises(errors.InvalidRequestError, match=r"\['a', 'b'\] are active, .*set_adapter.*disable_adapters"):
        two.save_pretrained(tmp_path / "both")
    two.set_adapter("a")
    with pytest.raises(errors.InvalidRequestError, match="is what adapted was loaded from"):
        two.save_pretrained(files.paths["b"])
    two.disable_adapters()
    base, wanted = tmp_path / "base", {}
    for handle, folder in ((two, base / "off"), (copy.copy(model), base / "none chosen")):
        handle.save_pretrained(folder)
        saved = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        wanted = wanted or {
            name: tensor for file in files.base.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in wanted.items())
    run = [sys.executable, "-m", "shardlift.client.cli.main", "save", "adapted"]
    environment = os.environ | {"SHARDLIFT_ADDRESS": two.address}
    for options, file in ((["--adapter", "a"], "adapter_config.json"), ([], "config.json")):
        subprocess.run([*run, str(tmp_path / file), *options], env=environment, check=True, timeout=120)
        assert (tmp_path / file / file).is_file()
    assert json.loads((tmp_path / "adapter_config.json" / "adapter_config.json").read_text())["r"] == 4


def test_what_adapters_hold_is_counted_and_given_back(model: RemoteModel, files: Files) -> None:
    model.info()
    before, modules = model.get_memory_footprint(), [sorted(stage.modules) for stage in model.residency()]
    model.load_adapter(str(files.paths["b"]), "b")
    (adapter,) = model.adapters()
    assert (adapter.kind, adapter.path, len(adapter.stage_bytes)) == ("LORA", str(files.paths["b"]), STAGES)
    assert 0 < adapter.bytes == model.get_memory_footprint() - before
    held = [name for stage in model.residency() for name in stage.modules]
    assert "model.layers.3.self_attn.q_proj.lora_A.b" in held
    # transformers' test of adapter training: what could be trained is there, under peft's names, and of its sizes.
    trainable = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): (
            str(parameter.dtype).removeprefix("torch."),
            parameter.numel() * parameter.element_size(),
        )
        for name, parameter in files.whole.named_parameters()
        if ".lora_" in name and name.endswith(".b.weight")
    }
    found = {
        name: (module.dtype, module.bytes)
        for stage in model.residency()
        for name, module in stage.modules.items()
        if ".lora_" in name
    }
    assert found == trainable
    assert len(found) == 2 * 7 * 4
    assert model.num_parameters(only_trainable=True) == 0
    model.delete_adapter("b")
    assert model.adapters() == []
    assert model.active_adapters() == []
    assert model.get_memory_footprint() == before
    assert [sorted(stage.modules) for stage in model.residency()] == modules
    assert torch.equal(model(IDS).logits, files.logits())


def test_a_session_keeps_its_adapter_which_is_not_deleted_meanwhile(two: RemoteModel, files: Files) -> None:
    with two.session(adapter="a") as session:
        assert torch.equal(
            session.generate(IDS, max_new_tokens=6, do_sample=False), files.tokens("a", max_new_tokens=6)
        )
        with pytest.raises(errors.ModelBusyError, match="adapter a of model adapted is in use by 1"):
            two.delete_adapter("a")
        with pytest.raises(errors.InvalidRequestError, match="keeps the adapters"):
            session.generate(max_new_tokens=2, adapter="b")
    eventually(lambda: deleted(two, "a"), "an adapter that nobody uses can't be deleted")
    assert [adapter.name for adapter in two.adapters()] == ["b"]


def deleted(model: RemoteModel, name: str) -> bool:
    try:
        model.delete_adapter(name)
    except errors.ModelBusyError:
        return False
    return True


def test_refusals_leave_the_model_as_it_was(two: RemoteModel, files: Files, tmp_path: Path) -> None:
    before = two.info()
    with pytest.raises(errors.InvalidRequestError, match="has an adapter 'a' already"):
        two.load_adapter(str(files.paths["a"]), "a")
    with pytest.raises(errors.CheckpointNotFoundError, match="is no adapter"):
        two.load_adapter(str(files.base), "c")
    prompts = shutil.copytree(files.paths["a"], tmp_path / "prompts")
    adapters.edit(prompts, peft_type="PROMPT_TUNING")
    with pytest.raises(errors.UnsupportedModelError, match="PROMPT_TUNING"):
        two.load_adapter(str(prompts), "c")
    # A stage fails when the others have their part: no stage has any of it.
    quantized = adapters.make(
        files.base, tmp_path / "head", LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), seed=3
    )
    weights = quantized / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    (key,) = (key for key in tensors if "base_layer" in key)
    save_file(tensors | {key: tensors[key] + 1}, weights)
    with pytest.raises(errors.TensorMismatchError, match="lm_head"):
        two.load_adapter(str(quantized), "c")
    after = two.info()
    assert (after.adapters, after.residency) == (before.adapters, before.residency)
    workers = [ray.get_actor(name, namespace="shardlift") for name in names_of_workers("adapted")]
    assert ray.get([worker.adapters.remote() for worker in workers]) == [["a", "b"]] * STAGES


def names_of_workers(model: str) -> list[str]:
    return sorted(
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"stage:{model}:")
    )


# The first stage is lost in the test of the controller, too.
@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_stage_that_comes_back_has_its_adapters_and_streams_go_on(
    lost: int, two: RemoteModel, files: Files, cluster: RunningCluster
) -> None:
    count = 60
    expected = {names: files.tokens(*names, max_new_tokens=count)[0, IDS.shape[1] :].tolist() for names in CHOICES}
    recoveries = two.info().recoveries
    (victim,) = [name for name in names_of_workers("adapted") if name.split(":")[3].split("~")[0] == str(lost)]
    pid = cluster.pid(victim)

    def stream(names: tuple[str, ...]) -> list[int]:
        tokens = []
        with two.stream(IDS, max_new_tokens=count, do_sample=False, adapter=names) as running:
            for step in running:
                tokens += step.token_ids
                if len(tokens) == 5 and names == CHOICES[0]:
                    os.kill(pid, signal.SIGKILL)
        return tokens

    with concurrent.futures.ThreadPoolExecutor(len(CHOICES)) as pool:
        got = dict(zip(CHOICES, pool.map(stream, CHOICES), strict=True))
    assert got == expected
    assert two.info().recoveries == recoveries + 1
    assert [adapter.name for adapter in two.adapters()] == ["a", "b"]
    assert torch.equal(two(IDS, adapter=["b", "a"]).logits, files.logits("b", "a"))


CHOICES: list[tuple[str, ...]] = [("a",), ("b",), ("a", "b")]


def test_a_new_controller_knows_the_adapters_and_brings_stages_back_with_them(
    two: RemoteModel, files: Files, cluster: RunningCluster
) -> None:
    before, residency = two.adapters(), two.residency()
    victim, *_ = names_of_workers("adapted")
    killed = [cluster.pid("controller"), cluster.pid(victim)]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)

    def is_well() -> bool:
        try:
            return two.info().state == "ready" and two(IDS, adapter="a") is not None
        except (errors.GatewayUnavailableError, errors.ModelUnavailableError):
            return False

    eventually(is_well, "the model is not brought back", timeout_s=90)
    for names in (["a"], ["a", "b"], []):
        assert torch.equal(two(IDS, adapter=names).logits, files.logits(*names))
    assert two.adapters() == before
    assert [stage.modules for stage in two.residency()] == [stage.modules for stage in residency]


def test_commands(two: RemoteModel, files: Files, cluster: RunningCluster) -> None:
    def run(*arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "shardlift.client.cli.main", "adapter", *arguments, "--json"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"SHARDLIFT_ADDRESS": cluster.gateway},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert run("load", "adapted", str(files.paths["a"]), "--name", "c")["kind"] == "LORA"
    assert [adapter["name"] for adapter in run("list", "adapted")] == ["a", "b", "c"]
    assert run("delete", "adapted", "c") == {"name": "c", "deleted": True}
    assert [adapter["name"] for adapter in two.info().to_dict()["adapters"]] == ["a", "b"]


async def test_the_handle_for_asyncio(two: RemoteModel, files: Files, cluster: RunningCluster) -> None:
    async with await shardlift.connect_async(cluster.gateway) as client:
        handle = await client.model("adapted")
        await handle.load_adapter(str(files.paths["a"]), "c")
        assert handle.active_adapters() == ["c"]
        assert torch.equal((await handle(IDS)).logits, files.logits("a"))
        handle.set_adapter("b")
        tokens = await handle.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, files.tokens("b", max_new_tokens=6))
        await handle.delete_adapter("c")
        assert [adapter.name for adapter in await handle.adapters()] == ["a", "b"]


def test_a_path_of_an_adapter_loads_its_base_and_attaches_it(
    cluster: RunningCluster, files: Files, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(files.paths["a"], folder / "lora")
    adapters.edit(folder / "lora", base_model_name_or_path="org/base")
    hub.add_repo("org/base", files.base)
    hub.add_repo("org/adapters", folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.clear()
    model = shardlift.AutoModelForCausalLM.from_pretrained(
        "org/adapters",
        adapter_kwargs={"subfolder": "lora"},
        num_stages=STAGES,
        name="by-adapter",
        address=cluster.gateway,
        part_cache=False,
    )
    try:
        assert model.active_adapters() == ["default"]
        (adapter,) = model.adapters()
        assert adapter.commit
        assert adapter.path == "org/adapters"
        assert torch.equal(model(IDS).logits, files.logits("a"))
        assert torch.equal(model(IDS, adapter=None).logits, files.logits())
        # A handle that somebody else opens.
        with shardlift.connect(cluster.gateway) as client:
            again = client.model("by-adapter")
            assert torch.equal(again(IDS).logits, files.logits("a"))
            assert again.active_adapters() == ["default"]
    finally:
        model.unload()


def test_an_adapter_without_room_is_refused_before_it_is_fetched(
    cluster: RunningCluster, files: Files, tmp_path: Path
) -> None:
    large = adapters.make(files.base, tmp_path / "large", LoraConfig(r=64, target_modules="all-linear"))
    with shardlift.connect(cluster.gateway) as client:
        # All that the plan leaves is promised to tokens.
        weights = client.plan(str(files.base), num_stages=1).total_resident_bytes
        model = client.load(
            str(files.base),
            name="full",
            num_stages=1,
            max_memory={"cpu": weights + (300 << 10)},
            reserve_tokens=200,
            part_cache=False,
        )
        try:
            with pytest.raises(errors.OutOfMemoryError, match="adapter default needs"):
                model.load_adapter(str(large))
            assert model.adapters() == []
            tokens = model.plan.kv_tokens
            model.load_adapter(str(files.paths["a"]), "a")
            assert model.plan.kv_tokens <= tokens
        finally:
            model.unload()
