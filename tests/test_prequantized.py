"""Checkpoints that bitsandbytes has quantized: loaded as they are, as transformers does in one process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.proto.v1.errors import InvalidRequestError, OutOfMemoryError, TensorMismatchError, UnsupportedModelError
from shardlift.worker import quantize_cpu
from shardlift.worker.experts import Experts4bit
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.part_cache import PartCache
from tests.support import ring
from tests.support.checkpoints import tiny
from tests.support.quantization import nf4
from tests.test_experts import NAMES, config_of, reference
from tests.test_families import check_decoding, check_forward, prompt
from tests.test_layout import bytes_of, loaded, planned

LAYERS = 3
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4+double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4 in bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "skipping": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
    "int8": {"load_in_8bit": True},
    "int8, few outliers": {
        "load_in_8bit": True,
        "llm_int8_threshold": 2.0,
        "llm_int8_skip_modules": ["lm_head", "o_proj"],
    },
}
CASES = [
    *(("llama", kind) for kind in KINDS),
    ("llama, tied", "nf4+double"),
    ("gpt2", "nf4+double"),
    ("gpt2", "int8"),
    ("mixtral", "nf4"),
    ("qwen3_moe", "int8"),
]

Checkpoints = Callable[[str, str], Path]


def save_quantized(folder: Path, out: Path, **quantization: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**quantization), dtype=torch.bfloat16
    )
    model.save_pretrained(out, max_shard_size="200KB")
    return out


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A family's checkpoint as transformers saves it once it has quantized it."""
    root = tmp_path_factory.mktemp("prequantized")
    plain: dict[str, Path] = {}
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, kind: str) -> Path:
        if family not in plain:
            name, _, tied = family.partition(", ")
            plain[family] = tiny(name, root / family, layers=LAYERS, dtype="bfloat16", tied=True if tied else None)
        if (family, kind) not in made:
            made[family, kind] = save_quantized(plain[family], root / f"{family}-{len(made)}", **KINDS[kind])
        return made[family, kind]

    return get


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As bytes: packed weights in a float's storage are no numbers."""
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


@contextlib.contextmanager
def no_quantizing() -> Iterator[None]:
    """Fails whoever quantizes a weight."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a weight is quantized that is quantized already")

    quantize_cpu.install()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bnb.functional, "quantize_4bit", fail)
        patch.setattr(bnb.functional, "int8_vectorwise_quant", fail)
        yield


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_tensor_is_the_checkpoints(quantized: Checkpoints, family: str, kind: str) -> None:
    """In two stages; and the plan has told their bytes, statistics included."""
    folder = quantized(family, kind)
    wanted = tensors_of(AutoModelForCausalLM.from_pretrained(folder))
    plan, found = planned(folder, stages=2), {}
    with no_quantizing():
        results = loaded(plan)
    for stage, result in zip(plan.plan.stages, results, strict=True):
        assert result.fetched_bytes == stage.fetch_bytes
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes
        assert result.keep is None, "no node keeps a checkpoint's own bytes"
        found |= tensors_of(result.stage.model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    label = "int8" if "int8" in kind else "fp4" if kind in ("fp4 in bf16", "skipping") else kind
    assert plan.plan.outline.quantization == label


@pytest.mark.parametrize(
    ("family", "kind", "cuts"),
    [
        ("llama", "nf4+double", ((), (1,), (1, 2))),
        ("llama, tied", "nf4+double", ((1, 2),)),
        ("llama", "fp4 in bf16", ((1, 2),)),
        ("llama", "int8", ((1, 2),)),
        ("gpt2", "nf4+double", ((1, 2),)),
        ("mixtral", "nf4", ((1, 2),)),
    ],
)
async def test_logits_equal_one_process(
    quantized: Checkpoints, family: str, kind: str, cuts: tuple[tuple[int, ...], ...]
) -> None:
    folder = quantized(family, kind)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for ends in cuts:
        stages = ring.load(folder, ends)
        async with ring.serve(stages) as pipeline:
            for padded in (False, True):
                ids, mask = prompt(padded=padded)
                await check_forward(pipeline, whole, ids, mask)
                await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 4)
            await pipeline.idle()


def test_what_is_not_quantized_is_cast_as_asked(quantized: Checkpoints) -> None:
    """transformers leaves weights in the checkpoint's dtype there, and casts biases alone."""
    [result] = loaded(plan := planned(quantized("gpt2", "nf4+double"), stages=1, dtype="float32"))
    floats = {
        name: value.dtype
        for name, value in result.stage.model.named_parameters()
        if not isinstance(value, bnb.nn.Params4bit)
    }
    assert set(floats.values()) == {torch.float32}
    assert sum(module.size_bytes for module in result.modules) == plan.plan.stages[0].resident_bytes


def test_the_checkpoints_quantization_wins(quantized: Checkpoints) -> None:
    """Over the caller's, compute dtype included, with the words of transformers' warning."""
    folder = quantized("llama", "nf4+double")
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    plan = planned(folder, stages=1, quantization=asked.to_dict())
    [note] = plan.plan.outline.notes
    assert note in [str(warning.message) for warning in caught]
    [result] = loaded(plan)
    name = "model.layers.1.mlp.up_proj"
    ours, other = result.stage.model.get_submodule(name), theirs.get_submodule(name)
    assert (ours.weight.quant_type, ours.compute_dtype) == (other.weight.quant_type, other.compute_dtype)
    assert (ours.weight.quant_type, ours.compute_dtype) == ("nf4", torch.bfloat16)
    assert not planned(folder, stages=1).plan.outline.notes


# ---- mixtures whose experts are quantized one by one -----------------------------------------------------------------


def by_experts(folder: Path, out: Path, family: str, config: BitsAndBytesConfig, skipped: tuple[int, ...] = ()) -> Path:
    """As transformers 4 saved it, where each expert's projections were linear layers like any other."""
    out.mkdir()
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    whole.save_pretrained(out, max_shard_size="10GB")
    tensors = load_file(out / "model.safetensors")
    pattern, names = NAMES[family]
    for layer in range(LAYERS):
        for expert in range(1000):
            for name in names:
                key = pattern.format(layer=layer, expert=expert, name=name)
                if key not in tensors or layer in skipped:
                    continue
                weight = tensors[key]
                made = bnb.nn.Linear4bit if config.load_in_4bit else bnb.nn.Linear8bitLt
                options: dict[str, Any] = {"has_fp16_weights": False}
                if config.load_in_4bit:
                    options = {
                        "compress_statistics": config.bnb_4bit_use_double_quant,
                        "quant_type": config.bnb_4bit_quant_type,
                        "quant_storage": config.bnb_4bit_quant_storage,
                    }
                linear = made(weight.shape[1], weight.shape[0], bias=False, **options)
                linear.load_state_dict({"weight": weight})
                state = linear.to("cpu").state_dict()  # quantizes
                del tensors[key]
                stem = key.removesuffix("weight")
                tensors |= {
                    stem + part: value.clone() for part, value in state.items() if isinstance(value, torch.Tensor)
                }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("kind", ["nf4", "nf4+double"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
async def test_experts_that_were_quantized_one_by_one(tmp_path: Path, family: str, kind: str) -> None:
    """… are held so: transformers 5 has no place for them."""
    config = config_of(kind)
    plain = tiny(family, tmp_path / "plain", layers=LAYERS, dtype="bfloat16")
    folder = by_experts(plain, tmp_path / "experts", family, config)
    plan = planned(folder, stages=2)
    with no_quantizing():
        results = loaded(plan)
    for stage, result in zip(plan.plan.stages, results, strict=True):
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes
        assert any(isinstance(module, Experts4bit) for module in result.stage.model.modules())
    whole = reference(plain, family, config)
    stages = ring.load(folder, (1,))
    async with ring.serve(stages) as pipeline:
        ids, mask = prompt(padded=True)
        await check_forward(pipeline, whole, ids, mask)
        await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 4)
        await pipeline.idle()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_8_bits(tmp_path: Path, family: str) -> None:
    plain = tiny(family, tmp_path / "plain", layers=LAYERS, dtype="bfloat16")
    folder = by_experts(plain, tmp_path / "experts", family, BitsAndBytesConfig(load_in_8bit=True))
    [result] = loaded(plan := planned(folder, stages=1))
    assert sum(module.size_bytes for module in result.modules) == plan.plan.stages[0].resident_bytes
    files = load_file(folder / "model.safetensors")
    pattern, names = NAMES[family]
    for layer, expert in ((0, 0), (2, 3)):
        for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
            found = result.stage.model.get_submodule(f"model.layers.{layer}.mlp.experts.{expert}.{ours}").weight
            stem = pattern.format(layer=layer, expert=expert, name=theirs).removesuffix("weight")
            assert torch.equal(found.data, files[f"{stem}weight"])
            assert torch.equal(found.SCB, files[f"{stem}SCB"])
    with torch.inference_mode():
        assert torch.isfinite(result.stage.model(torch.tensor([[5, 9, 77]])).logits).all()


# ---- what isn't right ------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


def changed(folder: Path, out: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    out.mkdir()
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({f"{UP}.weight.absmax": None}, "no weight.absmax for model.layers.1.mlp.up_proj.weight"),
        ({f"{UP}.weight.nested_absmax": None}, "no weight.nested_absmax"),
        ({f"{UP}.weight.quant_state.bitsandbytes__nf4": None}, "has 0 quant_state"),
        ({f"{UP}.weight": torch.zeros(100, 1, dtype=torch.uint8)}, "has 100 bytes"),
        ({f"{UP}.weight.absmax": torch.zeros(7, dtype=torch.uint8)}, "statistics of quantized weight"),
        ({"model.norm.weight": torch.zeros(7)}, "model.norm.weight has shape [7]"),
        ({f"{UP}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, UP),
    ],
    ids=str,
)
def test_statistics_that_are_not_the_weights(
    quantized: Checkpoints, tmp_path: Path, changes: dict[str, torch.Tensor | None], mentioned: str
) -> None:
    folder = changed(quantized("llama", "nf4+double"), tmp_path / "changed", changes)
    with pytest.raises(TensorMismatchError) as caught:
        loaded(planned(folder, stages=1))
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_the_config_calls_quantized_but_is_not(quantized: Checkpoints, tmp_path: Path) -> None:
    weight = torch.zeros(128, 64, dtype=torch.bfloat16)
    statistics = {
        f"{UP}.weight.{name}": None
        for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    }
    folder = changed(quantized("llama", "nf4+double"), tmp_path / "changed", {**statistics, f"{UP}.weight": weight})
    with pytest.raises(TensorMismatchError, match="llm_int8_skip_modules"):
        planned(folder, stages=1)


def test_requests_that_contradict_it_are_refused(quantized: Checkpoints) -> None:
    folder = quantized("llama", "nf4")
    with pytest.raises(InvalidRequestError, match="requantize=True, but the checkpoint is quantized with bitsandbytes"):
        planned(folder, quantization=nf4().to_dict(), requantize=True)
    with pytest.raises(InvalidRequestError, match="quantized with bitsandbytes, but quantization_config says gptq"):
        planned(folder, quantization={"quant_method": "gptq", "bits": 4})


def test_weights_that_only_computing_quantizes_are_no_quantized_checkpoint(quantized: Checkpoints) -> None:
    """transformers can save such a model, and not load it."""
    folder = quantized("llama", "int8")
    overrides = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}
    }
    with pytest.raises(UnsupportedModelError, match="llm_int8_has_fp16_weight"):
        planned(folder, config_overrides=overrides)


def test_a_refusal_for_want_of_memory_names_no_quantization(quantized: Checkpoints) -> None:
    """It can't be made lighter."""
    request = CheckpointRequest(path=str(quantized("llama", "nf4")))
    with pytest.raises(OutOfMemoryError) as caught:
        plan_model(request, None, ModelOptions(), PlanOptions(), parse_devices("100KiB"))
    assert "double_quant" not in str(caught.value)
    assert "4 bits" not in str(caught.value)


def test_it_is_never_kept_in_the_cache(quantized: Checkpoints, tmp_path: Path) -> None:
    [spec] = planned(quantized("llama", "nf4"), stages=1).specs("m", "l", "s")
    cache = PartCache(tmp_path / "cache", 1 << 30)
    assert load_stage(replace(spec, device="cpu"), None, LoadProgress(), cache).keep is None
