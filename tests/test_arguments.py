"""What becomes of each argument that transformers' own from_pretrained has: none means nothing here, unsaid."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

import shardlift
from shardlift.client import arguments, options
from shardlift.client.config_files import generation_config_of
from shardlift.client.describe import describe
from shardlift.cluster.checkpoint import CheckpointRequest, resolve_source
from shardlift.cluster.devices import Device, parse_devices
from shardlift.cluster.planning import plan_model
from shardlift.cluster.requests import checkpoint_request, model_options, plan_options
from shardlift.proto.v1 import registry_pb2
from shardlift.proto.v1.errors import (
    CheckpointNotFoundError,
    InvalidDeviceMapError,
    InvalidRequestError,
    ShardliftError,
)
from shardlift.worker.loader import LoadProgress, load_stage
from tests.support import adapters, checkpoints, ring
from tests.support.hub import HubServer
from tests.support.scripted_gateway import ScriptedGateway

IDS = torch.arange(5, 17)[None]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "loading.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny("llama", tmp_path_factory.mktemp("arguments") / "llama", dtype="bfloat16")


def theirs() -> set[str]:
    """By transformers' signatures, what they take out of their kwargs, and what their docstring describes."""
    names: set[str] = set()
    for function in (
        PreTrainedModel.from_pretrained,
        transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained,
    ):
        parameters = inspect.signature(function).parameters.values()
        names |= {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
        source = inspect.getsource(function)
        names |= set(re.findall(r"""kwargs\.(?:pop|get)\(["'](\w+)["']""", source))
        for listed in re.findall(r"(?:for name in|hub_kwargs_names =) \[(.*?)\]", source, re.DOTALL):
            names |= set(re.findall(r'"(\w+)"', listed))
        names |= set(re.findall(r"^ +(\w+) ?\(`", inspect.getdoc(function) or "", re.MULTILINE))
    return names - {"model_args", "kwargs", "_adapter_model_path"}


def rows() -> dict[str, str]:
    """Of the documents' table."""
    found = {}
    for left, right in re.findall(r"^\| (`.*?) \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE):
        for name in re.findall(r"`(\w+)`", left):
            found[name] = right
    return found


def test_the_documents_tell_what_becomes_of_each_of_transformers_arguments() -> None:
    names = theirs()
    assert {"config", "proxies", "key_mapping", "low_cpu_mem_usage", "subfolder", "tp_plan"} <= names
    assert names - rows().keys() == set()


def test_what_the_documents_say_is_so() -> None:
    told = rows()
    assert {name for name, what in told.items() if what.startswith("refused")} <= arguments.REFUSED.keys()
    assert {name for name, what in told.items() if what.startswith("ignored with a warning")} == arguments.WARNED.keys()
    ignored = {name for name, what in told.items() if what.startswith("ignored") and "with a warning" not in what}
    assert ignored == arguments.IGNORED - {"resume_download"}  # which transformers no longer has
    taken = {name for name, what in told.items() if what.startswith("taken")}
    ours = {*inspect.signature(shardlift.AutoModelForCausalLM.from_pretrained).parameters}
    assert taken - ours == {
        *("torch_dtype", "generation_config", "output_loading_info", "use_safetensors"),
    }


@pytest.mark.parametrize("name", sorted(arguments.REFUSED))
def test_what_can_not_be_is_refused_by_name_with_what_to_do(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} is not supported.*{re.escape(arguments.REFUSED[name])}"):
        options.load_options(**{name: {"x": "y"}})
    for value in (None, False):
        assert options.load_options(**{name: value}) == options.load_options()


@pytest.mark.parametrize("name", sorted(arguments.WARNED))
def test_what_does_not_happen_is_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} is ignored: ") as caught:
        assert options.load_options(**{name: True}) == options.load_options()
    assert caught[0].filename == __file__
    assert options.load_options(**{name: None}) == options.load_options()


def test_what_is_so_in_any_case_is_taken_without_a_word() -> None:
    fine = dict.fromkeys(arguments.IGNORED, True) | {
        **{"use_safetensors": True, "weights_only": True, "return_dict": True, "adapter_name": "default"}
    }
    assert options.load_options(**fine) == options.load_options()
    for name in ("use_safetensors", "weights_only", "return_dict"):
        with pytest.raises(InvalidRequestError, match=f"{name}=False is not supported"):
            options.load_options(**{name: False})
    with pytest.raises(InvalidRequestError, match="adapter_name='x' is not supported"):
        options.load_options(adapter_name="x")


# -- the same arguments, and transformers' logits --------------------------------------------------------------------


def described(path: Path, **given: Any) -> registry_pb2.LoadModelRequest:
    request = registry_pb2.LoadModelRequest()
    describe(request, path, False, "127.0.0.1:1", given)
    return request


def logits(path: Path, **given: Any) -> torch.Tensor:
    """Of the request that `from_pretrained` makes, planned and loaded as two stages."""
    request = described(path, **given)
    source = checkpoint_request(request.source)
    stages = ring.load(Path(source.path), (2,), model=model_options(request.options), request=source)
    return adapters.through(stages, IDS, ())


def local(path: Path, **given: Any) -> Any:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(path, **given)(IDS).logits


@pytest.fixture(scope="module")
def places(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The checkpoint in each form, with the arguments that find it."""
    home = tmp_path_factory.mktemp("places")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(home / "single")
    model.save_pretrained(home / "outer" / "inner")
    model.save_pretrained(home / "variant", variant="fp16")
    model.save_pretrained(home / "shards", variant="fp16", max_shard_size="100KB")
    return {
        "sharded": (folder, {}),
        "single file": (home / "single", {}),
        "subfolder": (home / "outer", {"subfolder": "inner"}),
        "variant": (home / "variant", {"variant": "fp16"}),
        "variant in shards": (home / "shards", {"variant": "fp16"}),
    }


@pytest.mark.parametrize("name", ["sharded", "single file", "subfolder", "variant", "variant in shards"])
def test_a_checkpoint_is_found_as_by_transformers(name: str, places: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    path, given = places[name]
    assert torch.equal(logits(path, **given), local(path, **given))
    if given:
        with pytest.raises(CheckpointNotFoundError):
            logits(path)


SAME: dict[str, dict[str, Any]] = {
    "dtype auto": {"dtype": "auto"},
    "dtype": {"dtype": torch.float32},
    "dtype's name": {"dtype": "float16"},
    "eager": {"attn_implementation": "eager"},
    "sdpa": {"attn_implementation": "sdpa"},
    "BitsAndBytesConfig()": {"quantization_config": BitsAndBytesConfig()},
    "what changes nothing": {
        **{"revision": "main", "token": False, "cache_dir": "/nonexistent", "trust_remote_code": False},
        **{"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": True, "weights_only": True},
    },
}


@pytest.mark.parametrize("name", SAME)
def test_arguments_give_transformers_logits(name: str, folder: Path) -> None:
    given = dict(SAME[name])
    ours = logits(folder, **{key: value for key, value in given.items() if key != "token"})
    expected = local(folder, **given)
    assert ours.dtype is expected.dtype
    assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:`torch_dtype`:FutureWarning")
def test_torch_dtype_and_dtype(folder: Path) -> None:
    for given in ({"torch_dtype": torch.float32}, {"torch_dtype": torch.float32, "dtype": torch.float16}):
        ours = logits(folder, **given)
        expected = local(folder, **given)
        assert ours.dtype is expected.dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_a_config_was_made_with_counts(family: str, tmp_path: Path) -> None:
    """How attention and experts are computed, which no config's values tell; an argument comes before it."""
    folder = checkpoints.tiny(family, tmp_path, layers=3, dtype="bfloat16")
    asked = {"llama": "attn_implementation", "mixtral": "experts_implementation"}[family]
    eager = {asked: "eager"}
    found = logits(folder, config=AutoConfig.from_pretrained(folder, **eager))
    assert torch.equal(found, local(folder, config=AutoConfig.from_pretrained(folder, **eager)))
    assert torch.equal(found, logits(folder, **eager))
    usual = logits(folder)
    assert not torch.equal(found, usual)
    other = {asked: {"llama": "sdpa", "mixtral": "grouped_mm"}[family]}
    assert torch.equal(logits(folder, config=AutoConfig.from_pretrained(folder, **eager), **other), usual)
    # That of a model which was built has what transformers chose, and asks for nothing.
    built = AutoModelForCausalLM.from_pretrained(folder).config
    assert torch.equal(logits(folder, config=built), usual)
    described(folder, config=built, load_in_4bit=True)


@pytest.mark.parametrize(
    "dtype", [{"": torch.float16}, {"": "float64", "lm_head": "float16"}, {"text_config": "float16"}]
)
def test_a_dtype_for_each_part_is_that_of_the_whole(dtype: dict[str, Any], folder: Path) -> None:
    found = logits(folder, dtype=dtype)
    expected = local(folder, dtype=dtype)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_attention_is_taken_for_each_part_of_a_model(folder: Path) -> None:
    eager = {"": "eager"}
    assert torch.equal(logits(folder, attn_implementation=eager), local(folder, attn_implementation=eager))
    request = described(folder, attn_implementation={"vision_config": "sdpa", "text_config": "eager"})
    assert request.options.attn_implementation == "eager"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attn_implementation": 3}, "attn_implementation is 3: a text"),
        ({"attn_implementation": {"": 3}}, "attn_implementation is 3: a text"),
        ({"revision": 5}, "revision is 5: a text"),
        ({"variant": True}, "variant is True: a text"),
        ({"subfolder": 1}, "subfolder is 1: a text"),
        ({"adapter_kwargs": 3}, "adapter_kwargs is 3: a dict"),
        ({"adapter_kwargs": {"revision": 3}}, "revision is 3: a text"),
        ({"requantize": "no"}, "requantize is 'no': True or False"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_told(given: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        described(folder, **given)
    assert described(folder, subfolder=Path("in", "ner")).source.subfolder == "in/ner"


def test_a_config_is_taken_as_an_object_a_dict_or_a_path(folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder, rms_norm_eps=0.1)
    config.save_pretrained(tmp_path)
    expected = local(folder, config=config)
    assert not torch.equal(expected, local(folder))
    for given in (config, config.to_dict(), str(tmp_path), tmp_path, tmp_path / "config.json"):
        assert torch.equal(logits(folder, config=given), expected)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InvalidRequestError, match="holds no config"):
        logits(folder, config=tmp_path)


def test_a_revision_of_a_gated_repository_is_read_with_its_token(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoints.tiny("llama", tmp_path / "other", dtype="bfloat16", seed=1)
    with HubServer() as hub:
        hub.add_repo("org/tiny", folder, gated_token="hf_secret")
        hub.add_repo("org/tiny", other, revision="v2", gated_token="hf_secret")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

        def logits_at(**given: Any) -> torch.Tensor:
            request = registry_pb2.LoadModelRequest()
            describe(request, "org/tiny", "hf_secret", "127.0.0.1:1", {"cache_dir": tmp_path / "cache", **given})
            source = checkpoint_request(request.source)
            assert (source.hub_endpoint, source.cache_dir) == (hub.endpoint, str(tmp_path / "cache"))
            token = request.source.token
            specs = ring.specs(folder, (2,), model=model_options(request.options), request=source, token=token)
            stages = [load_stage(spec, token, LoadProgress()).stage for spec in specs]
            return adapters.through(stages, IDS, ())

        assert torch.equal(logits_at(), local(folder))
        assert torch.equal(logits_at(revision="v2"), local(other))
        with pytest.raises(CheckpointNotFoundError, match="no revision 'v3'"):
            logits_at(revision="v3")
    huggingface_hub.close_session()  # its pool would keep connections to a server that is gone


def test_pickled_weights_are_refused_with_the_way_to_convert(folder: Path, tmp_path: Path) -> None:
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ShardliftError, match="shardlift convert"):
        logits(tmp_path)


def test_only_local_files() -> None:
    assert described(Path("org/name"), local_files_only=True).source.local_files_only
    assert described(Path("org/name"), local_files_only=False) == described(Path("org/name"))
    with pytest.raises(InvalidRequestError, match="local_files_only=True, but s3://bucket/model is read over"):
        resolve_source(CheckpointRequest(path="s3://bucket/model", local_files_only=True), None)


@pytest.mark.parametrize(
    "device", ["cuda:0", 0, torch.device("cuda", 0), {"": "cuda:0"}, {"": 0}, {"": torch.device("cuda:0")}]
)
def test_one_device_for_all(device: Any, folder: Path) -> None:
    asked = described(folder, device_map=device, max_memory={0: "1GiB", "cpu": 1 << 30}).options
    source = CheckpointRequest(path=str(folder))
    planned = plan_model(source, None, model_options(asked), plan_options(asked), parse_devices("2x1GiB"))
    assert [stage.device.kind for stage in planned.plan.stages] == ["cuda"]
    without = [Device(node="here", name="cpu", kind="cpu", capacity_bytes=1 << 30)]
    if "cuda" in str(device):
        with pytest.raises(InvalidDeviceMapError):
            plan_model(source, None, model_options(asked), plan_options(asked), without)
    else:  # a number counts all devices where there is no GPU
        planned = plan_model(source, None, model_options(asked), plan_options(asked), without)
        assert [stage.device.kind for stage in planned.plan.stages] == ["cpu"]


# -- what from_pretrained gives back -----------------------------------------------------------------------------------


def test_a_generation_config_may_be_an_object_a_dict_or_a_path(tmp_path: Path) -> None:
    config = GenerationConfig(max_new_tokens=3, eos_token_id=7)
    config.save_pretrained(tmp_path)
    for given in (config, {"max_new_tokens": 3, "eos_token_id": 7}, str(tmp_path), tmp_path):
        found = generation_config_of(given)
        assert (found.max_new_tokens, found.eos_token_id) == (3, 7)
        assert found is not given
    for wrong in (3, str(tmp_path / "nowhere")):
        with pytest.raises(InvalidRequestError, match="generation_config"):
            generation_config_of(wrong)


def test_loading_info_and_generation_config(folder: Path) -> None:
    from tests.test_client import load_script

    _, expected = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with ScriptedGateway() as gateway:
        gateway.answer("LoadModel", *load_script())
        found: Any = shardlift.AutoModelForCausalLM.from_pretrained(
            "org/tiny",
            address=gateway.address,
            output_loading_info=True,
            generation_config=GenerationConfig(max_new_tokens=3),
            progress=True,
        )
        model, info = found
        assert info == expected
        assert model.generation_config.max_new_tokens == 3
        model._gateway.close()
