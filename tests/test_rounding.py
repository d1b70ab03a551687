"""compressed-tensors checkpoints that have activations rounded, too: as transformers computes with them by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from shardlift.cluster.planning import ModelOptions
from shardlift.proto.v1.errors import TensorMismatchError, UnsupportedModelError
from shardlift.worker import compressed_config
from shardlift.worker.rounding import rounds
from shardlift.worker.saving import StageSaver
from tests.support import adapters, ring
from tests.support.checkpoints import tiny
from tests.support.compressing import CACHE, FP8, INT8, SCHEMES, compress
from tests.support.quantization import nf4
from tests.test_families import prompt
from tests.test_layout import bytes_of, loaded, planned
from tests.test_own_form import check_computed

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

Checkpoints = Callable[[str], Path]
EACH_TOKEN = SCHEMES["fp8, each token"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = tiny(family, folder / "plain", layers=3, dtype="bfloat16")
        return made[family]

    return get


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def say(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_activations_are_rounded_as_transformers_does(plain: Checkpoints, tmp_path: Path, scheme: str) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", SCHEMES[scheme])
    await check_computed(folder, AutoModelForCausalLM.from_pretrained(folder), ((), (1, 2)))


async def test_cached_keys_and_values_are_rounded_too(plain: Checkpoints, tmp_path: Path) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", EACH_TOKEN, cache=CACHE)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    without = compress(plain("llama"), tmp_path / "without", EACH_TOKEN)
    ids, mask = prompt(padded=False)
    with torch.no_grad():
        others = AutoModelForCausalLM.from_pretrained(without)(ids, attention_mask=mask).logits
        assert not torch.equal(whole(ids, attention_mask=mask).logits, others)
    await check_computed(folder, whole, ((), (1, 2)))


@pytest.mark.parametrize("family", ["qwen2_moe", "gemma2", "phi3"])
async def test_other_families(plain: Checkpoints, tmp_path: Path, family: str) -> None:
    folder = compress(plain(family), tmp_path / "packed", EACH_TOKEN)
    await check_computed(folder, AutoModelForCausalLM.from_pretrained(folder), ((1, 2),))


@pytest.mark.filterwarnings("ignore:.*loading attributes.*will be overwritten:UserWarning")
@pytest.mark.parametrize(
    ("scheme", "dequantize"),
    [
        ("fp8, each token", False),
        ("fp8, fixed", False),
        ("int4 beside fp8", False),
        ("fp8, each token", True),
        # Of several schemes transformers takes one for all weights there.
        ("fp8, fixed", True),
    ],
)
def test_scales_that_the_models_dtype_does_not_hold(
    plain: Checkpoints, tmp_path: Path, scheme: str, dequantize: bool
) -> None:
    """transformers unpacks with them as they are when it dequantizes on the way in, and else in the model's dtype."""
    folder = compress(plain("llama"), tmp_path / "packed", SCHEMES[scheme], fine_scales=True)
    asked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    whole = AutoModelForCausalLM.from_pretrained(folder, **asked)
    ids, _ = prompt(padded=False)
    with torch.no_grad():
        whole(ids)
    [result] = loaded(planned(folder, stages=1, dequantize=dequantize))
    wanted = dict(whole.named_parameters())
    for name, parameter in result.stage.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert rounds(result.stage.model) is not dequantize


def test_it_is_planned_and_told(plain: Checkpoints, tmp_path: Path) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", SCHEMES["int8, fixed, asymmetric"], cache=CACHE)
    plan = planned(folder, stages=3)
    assert "the rounding of activations is done as the checkpoint says" in plan.plan.outline.notes[1]
    for stage, result in zip(plan.plan.stages, loaded(plan), strict=True):
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes
    for options in ({"dequantize": True}, {"quantization": nf4().to_dict(), "requantize": True}):
        plan = planned(folder, stages=1, **options)
        notes = plan.plan.outline.notes
        assert any("the rounding of activations is left out" in note for note in notes)
        assert not any("no place for these tensors" in note for note in notes)
        assert not rounds(loaded(plan)[0].stage.model)


async def test_a_token_that_others_change_is_not_batched(plain: Checkpoints, tmp_path: Path) -> None:
    by_itself = compress(plain("llama"), tmp_path / "by itself", EACH_TOKEN)
    by_all = compress(plain("llama"), tmp_path / "by all", SCHEMES["fp8, the whole input"])
    # Where it is a mixture, its shared expert sees all tokens in one row, and has one scale for them.
    flat = compress(plain("qwen2_moe"), tmp_path / "flat", EACH_TOKEN)
    for folder, expected in ((by_itself, [True, True]), (by_all, [False, False]), (flat, [True, False])):
        async with ring.serve(ring.load(folder, (1,))) as pipeline:
            assert [server.pipeline.stage.can_batch for server in pipeline.servers] == expected


def test_an_adapter_beside_layers_that_round(plain: Checkpoints, tmp_path: Path) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", EACH_TOKEN)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    path = adapters.make(plain("llama"), tmp_path / "adapter", config)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = whole(ids).logits
    with adapters.quiet():
        adapted = PeftModel.from_pretrained(whole, str(path), adapter_name="x").eval()
    stages = ring.load(folder, (1, 2))
    found = adapters.outlined(plain("llama"), path, "x", dtype="bfloat16")
    adapters.attach(stages, found.spec)
    expected = adapters.logits(adapted, ids, ["x"])
    assert torch.equal(adapters.through(stages, ids, ["x"]), expected)
    assert torch.equal(adapters.through(stages, ids, ()), before)
    assert not torch.equal(before, expected)


def test_a_scale_that_is_missing(plain: Checkpoints, tmp_path: Path) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", EACH_TOKEN)
    said = config_of(folder)
    said["quantization_config"]["config_groups"]["group_0"]["input_activations"] = FP8 | {"strategy": "tensor"}
    say(folder, said)
    with pytest.raises(TensorMismatchError, match=r"no tensor for model.layers.0.*\.input_scale"):
        planned(folder)


def test_what_can_not_be_rounded_here(plain: Checkpoints, tmp_path: Path) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", EACH_TOKEN)
    said = config_of(folder)
    groups = said["quantization_config"]["config_groups"]
    groups["attention"] = {"targets": ["re:.*self_attn$"], "input_activations": FP8 | {"strategy": "tensor"}}
    say(folder, said)
    with pytest.raises(UnsupportedModelError, match=r"in the middle of attention.*dequantize=True"):
        planned(folder)
    assert planned(folder, dequantize=True).plan.stages
    groups["attention"]["input_activations"] = FP8 | {"strategy": "channel", "dynamic": True}
    say(folder, said)
    with pytest.raises(UnsupportedModelError, match="compressed-tensors can't"):
        planned(folder)


def test_it_is_not_saved(plain: Checkpoints, tmp_path: Path) -> None:
    folder = compress(plain("llama"), tmp_path / "packed", EACH_TOKEN)
    [result] = loaded(planned(folder, stages=1))
    with pytest.raises(UnsupportedModelError, match=r"rounds activations.*dequantize=True"):
        StageSaver(result.stage, lambda take: take()).plan(1 << 30, keep_quantized_experts=False)
    [result] = loaded(planned(folder, stages=1, dequantize=True))
    assert StageSaver(result.stage, lambda take: take()).plan(1 << 30, keep_quantized_experts=False).files


def test_weights_that_are_not_compressed(plain: Checkpoints, tmp_path: Path) -> None:
    """By what the files hold; of the status, which says "frozen" in many that are compressed, nothing hangs."""
    folder, (ids, _) = compress(plain("llama"), tmp_path / "fp8", SCHEMES["fp8, fixed"]), prompt(padded=False)
    logits = adapters.through(ring.load(folder, (1,)), ids, ())
    config = config_of(folder)
    config["quantization_config"]["quantization_status"] = "frozen"
    say(folder, config)
    assert torch.equal(adapters.through(ring.load(folder, (1,)), ids, ()), logits)
    # transformers' first pass takes that for uncompressed; but not where it unpacks on the way in
    asked = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.bfloat16)
    stages = ring.load(folder, (1,), model=ModelOptions(dequantize=True))
    with torch.inference_mode():
        assert torch.equal(adapters.through(stages, ids, ()), whole(ids).logits)

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"{name} is BF16, with scales beside it: it isn't compressed"):
        ring.specs(folder, ())


def test_which_group_a_module_is_of() -> None:
    config = {
        "config_groups": {
            "all": {"targets": ["Linear"], "weights": INT8},
            "some": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4}},
            "one": {"targets": ["model.layers.0.mlp.up_proj"], "weights": {"num_bits": 3}},
            "experts": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4}},
        }
    }
    found = {
        module: compressed_config.group_of(f"model.layers.0.{module}", config)
        for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "moe.experts.3.up_proj")
    }
    assert list(found.values()) == ["all", "one", "some", "experts"]
    assert compressed_config.bits_of("model.layers.0.mlp.down_proj", config) == 4
    with pytest.raises(UnsupportedModelError, match=r"mlp.up_proj.* in 3 bits"):
        compressed_config.bits_of("model.layers.0.mlp.up_proj", config)
    with pytest.raises(UnsupportedModelError, match="no config_groups"):
        compressed_config.group_of("a", {})
    config["config_groups"]["some"]["targets"] = ["re:("]
    with pytest.raises(UnsupportedModelError, match="no pattern"):
        compressed_config.group_of("model.layers.0.mlp.down_proj", config)
