"""Experts in 4 bits: stages compute what one process computes whose experts bitsandbytes quantized one by one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from shardlift.cluster.checkpoint import CheckpointRequest, read_checkpoint
from shardlift.cluster.layout import lay_out
from shardlift.proto.v1.errors import InvalidRequestError, ShardliftError, TensorMismatchError
from shardlift.worker.experts import Expert, Experts4bit
from shardlift.worker.loader import LoadedStage, LoadProgress, load_stage
from shardlift.worker.part_cache import PartCache, key_of
from shardlift.worker.records import TensorRecord
from shardlift.worker.residency import measure
from shardlift.worker.skeleton import build_skeleton, parse_config
from tests.support import checkpoints, packing, ring
from tests.support.checkpoints import tiny
from tests.support.fingerprint import fingerprint
from tests.test_families import check_decoding, check_forward, prompt
from tests.test_layout import bytes_of, planned

LAYERS = 3
FAMILIES = ("mixtral", "qwen3_moe")
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4+double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 in bf16": {"bnb_4bit_quant_storage": "bfloat16"},
}
# What a checkpoint calls an expert's projections.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_AS_RESIDENT = ("model.layers.{layer}.mlp.experts.{expert}.{name}.weight", PROJECTIONS)
_AS_IN_MIXTRAL = ("model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight", ("w1", "w3", "w2"))
NAMES = {
    "deepseek_v2": _AS_RESIDENT,
    "deepseek_v3": _AS_RESIDENT,
    "dots1": _AS_RESIDENT,
    "ernie4_5_moe": _AS_RESIDENT,
    "exaone_moe": _AS_RESIDENT,
    "flex_olmo": _AS_RESIDENT,
    "glm4_moe": _AS_RESIDENT,
    "glm4_moe_lite": _AS_RESIDENT,
    "hunyuan_v1_moe": _AS_RESIDENT,
    "hy_v3": _AS_RESIDENT,
    "lfm2_moe": ("model.layers.{layer}.feed_forward.experts.{expert}.{name}.weight", ("w1", "w3", "w2")),
    "minimax": _AS_IN_MIXTRAL,
    "minimax_m2": _AS_IN_MIXTRAL,
    "mixtral": _AS_IN_MIXTRAL,
    "olmoe": _AS_RESIDENT,
    "phimoe": _AS_IN_MIXTRAL,
    "qwen2_moe": _AS_RESIDENT,
    "qwen3_5_moe_text": _AS_RESIDENT,
    "qwen3_moe": _AS_RESIDENT,
    "qwen3_next": _AS_RESIDENT,
    "solar_open": _AS_RESIDENT,
}
# Their checkpoints hold a layer's experts in one, or with biases, or the experts have no gate.
NOT_BY_EXPERTS = {"gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "llama4_text", "nemotron_h"}

Checkpoints = Callable[..., Path]


def config_of(quantization: str, **more: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **QUANTIZATIONS[quantization], **more
    )


def in_4_bits(quantization: str = "nf4+double", **more: Any) -> dict[str, Any]:
    return {"quantization": config_of(quantization, **more).to_dict(), "quantize_experts": True}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root, made = tmp_path_factory.mktemp("experts"), {}

    def get(family: str, **options: Any) -> Path:
        key = f"{family}-{options}"
        if key not in made:
            made[key] = tiny(family, root / str(len(made)), layers=LAYERS, **{"dtype": "bfloat16", **options})
        return made[key]

    return get


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def load(folder: Path, stages: int = 1, **options: Any) -> list[LoadedStage]:
    plan = planned(folder, stages=stages, **options)
    return [load_stage(replace(spec, device="cpu"), None, LoadProgress()) for spec in plan.specs("m", "l", "s")]


# ---- one process, to compare with ------------------------------------------------------------------------------------


class Loop(nn.Module):
    """Experts, each of three `Linear4bit`, in the plainest loop."""

    def __init__(self, experts: list[tuple[nn.Module, nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(expert) for expert in experts)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for index, (gate, up, down) in enumerate(self.experts):
            token, rank = torch.where(chosen == index)
            if len(token):
                inner = nn.functional.silu(gate(hidden[token])) * up(hidden[token])
                outputs = down(inner) * weights[token, rank, None]
                total.index_add_(0, token, outputs.to(total.dtype))
        return total


def reference(folder: Path, family: str, config: BitsAndBytesConfig, skipped: tuple[int, ...] = ()) -> PreTrainedModel:
    """transformers' model, with experts that bitsandbytes quantized from the files' tensors; not in layers `skipped`,
    where they are as transformers has them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    files = tensors_of(folder)
    pattern, names = NAMES[family]

    def linear(layer: int, expert: int, name: str) -> nn.Module:
        weight = files[pattern.format(layer=layer, expert=expert, name=name)].to(torch.bfloat16)
        made = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        made.load_state_dict({"weight": weight})
        return made.to("cpu")  # quantizes

    for layer, block in enumerate(model.model.layers):
        mixture = block.feed_forward if family == "lfm2_moe" else block.mlp
        if layer not in skipped and hasattr(mixture, "experts"):
            experts = range(mixture.experts.num_experts)
            mixture.experts = Loop([tuple(linear(layer, expert, name) for name in names) for expert in experts])
    return model.eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "nf4+double"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_logits_equal_one_process(checkpoint_of: Checkpoints, family: str, quantization: str, dtype: str) -> None:
    """Prefill, in chunks too, and cached decoding; also from a checkpoint that is cast before it is quantized."""
    folder = checkpoint_of(family, dtype=dtype)
    config = config_of(quantization)
    whole = reference(folder, family, config)
    for ends in ((), (1,), (1, 2)):
        stages = ring.load(folder, ends, quantization=config.to_dict(), dtype="bfloat16", quantize_experts=True)
        async with ring.serve(stages) as pipeline:
            for padded in (False, True):
                ids, mask = prompt(padded=padded)
                await check_forward(pipeline, whole, ids, mask)
                await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 8)
            await pipeline.idle()


@pytest.mark.parametrize("family", sorted(set(NAMES) - set(FAMILIES)))
async def test_logits_of_every_family_with_experts_equal_one_process(checkpoint_of: Checkpoints, family: str) -> None:
    folder = checkpoint_of(family)
    skip = checkpoints.FAMILIES[family].unquantized
    config = config_of("nf4+double", llm_int8_skip_modules=["lm_head", *skip] if skip else None)
    whole = reference(folder, family, config)
    stages = ring.load(folder, (1,), quantization=config.to_dict(), dtype="bfloat16", quantize_experts=True)
    assert any(isinstance(module, Experts4bit) for stage in stages for module in stage.model.modules())
    async with ring.serve(stages) as pipeline:
        for padded in (False, True):
            ids, mask = prompt(padded=padded)
            await check_forward(pipeline, whole, ids, mask)
            await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 8)
        await pipeline.idle()


@pytest.mark.parametrize("family", sorted(checkpoints.FAMILIES))
def test_whose_experts_can_be_quantized(checkpoint_of: Checkpoints, family: str) -> None:
    checkpoint = read_checkpoint(CheckpointRequest(path=str(checkpoint_of(family))), None)
    skeleton = build_skeleton(
        parse_config(checkpoint.config),
        dtype=torch.bfloat16,
        quantization=config_of("nf4").to_dict(),
        quantize_experts=True,
    )
    assert bool(skeleton.separate) == (family in NAMES)
    merged = any(".experts." in name and parameter.ndim == 3 for name, parameter in skeleton.model.named_parameters())
    assert merged == (family in {*NAMES, *NOT_BY_EXPERTS})


@pytest.mark.parametrize("family", FAMILIES)
def test_without_double_quantization_experts_are_slices_of_the_merged_ones(
    checkpoint_of: Checkpoints, family: str
) -> None:
    folder = checkpoint_of(family)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    [loaded] = load(folder, **in_4_bits("nf4"))
    for theirs, ours in zip(merged.model.layers, loaded.stage.model.model.layers, strict=True):
        assert isinstance(ours.mlp.experts, Experts4bit)
        for index, expert in enumerate(ours.mlp.experts):
            for whole, parts in (
                (theirs.mlp.experts.gate_up_proj, [expert.gate_proj, expert.up_proj]),
                (theirs.mlp.experts.down_proj, [expert.down_proj]),
            ):
                packed, state = quantize_4bit(whole[index].detach(), quant_type="nf4")
                assert torch.equal(torch.cat([part.weight.data for part in parts]), packed)
                assert torch.equal(torch.cat([part.weight.quant_state.absmax for part in parts]), state.absmax)


def test_only_experts_that_a_token_was_routed_to_compute(checkpoint_of: Checkpoints) -> None:
    """… and each once, however many tokens it has."""
    [loaded] = load(checkpoint_of("mixtral", num_local_experts=16), **in_4_bits())
    model = loaded.stage.model
    routed: list[set[int]] = []
    calls: Counter[str] = Counter()
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda module, args, output: routed.append(set(output[2].view(-1).tolist()))
        )
    for name, module in model.named_modules():
        if ".experts." in name and isinstance(module, bnb.nn.Linear4bit):
            module.register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    with torch.inference_mode():
        model(torch.tensor([[5, 9, 77]]))
    assert all(0 < len(experts) <= 6 for experts in routed)
    assert calls == Counter(
        f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        for layer, experts in enumerate(routed)
        for expert in experts
        for name in PROJECTIONS
    )


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_the_measured_ones(checkpoint_of: Checkpoints, family: str, quantization: str) -> None:
    folder = checkpoint_of(family)
    options = in_4_bits(quantization)
    plan = planned(folder, stages=2, **options)
    for stage, result in zip(plan.plan.stages, load(folder, 2, **options), strict=True):
        assert result.fetched_bytes == stage.fetch_bytes
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes


def test_experts_take_a_quarter_of_their_bytes(checkpoint_of: Checkpoints) -> None:
    folder = checkpoint_of("qwen3_moe")
    options = in_4_bits()
    small, large = (
        {
            module.module: module.size_bytes
            for stage in load(folder, 2, **{**options, "quantize_experts": chosen})
            for module in stage.modules
        }
        for chosen in (True, False)
    )
    assert set(small) == set(large), "a layer's experts are one module, however many there are"
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.experts"
        # Tiny weights: the code tables are a fifth of it.
        assert small[name] < 0.45 * large[name]
    assert {name: size for name, size in small.items() if "experts" not in name} == {
        name: size for name, size in large.items() if "experts" not in name
    }


def qwen3_30b_a3b() -> tuple[dict[str, Any], dict[str, TensorRecord]]:
    """Config and headers of a checkpoint of 30 billion parameters, of which there is nothing else."""
    hidden, intermediate, experts, layers, vocabulary = 2048, 768, 128, 48, 151936
    config = transformers.Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    ).to_dict()
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {
            "q_proj": (4096, hidden),
            "k_proj": (512, hidden),
            "v_proj": (512, hidden),
            "o_proj": (hidden, 4096),
        }
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}self_attn.{name}.weight": (128,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{prefix}mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= {
                f"{prefix}mlp.experts.{expert}.{name}.weight": (intermediate, hidden) for name in PROJECTIONS[:2]
            }
            shapes[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = (hidden, intermediate)
    records, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        records[key] = TensorRecord(key=key, file="model.safetensors", dtype="BF16", shape=shape, start=start, end=end)
    return config, records


def test_thousands_of_experts_are_planned_without_their_modules() -> None:
    config, records = qwen3_30b_a3b()
    options: dict[str, Any] = {"dtype": "bfloat16", "attn_implementation": None}
    quantization = config_of("nf4+double").to_dict()
    started = time.monotonic()
    layout = lay_out(config, records, quantization=quantization, quantize_experts=True, **options)
    assert time.monotonic() - started < 10, "about one second"
    assert set(layout.targets) == set(records)
    resident, fetched = layout.outline.sizes.stage(0, 48)
    assert fetched == 2 * 30_532_122_624
    # Embedding and head stay in 16 bits.
    assert resident == pytest.approx(0.516 * (30_532_122_624 - 2 * 151936 * 2048) + 4 * 151936 * 2048, rel=0.01)
    assert resident < 17e9
    skeleton = build_skeleton(
        parse_config(config), dtype=torch.bfloat16, quantization=quantization, quantize_experts=True
    )
    assert len(list(skeleton.model.modules())) < 2000
    assert len(list(skeleton.parameters())) > 48 * 128 * 3


def test_a_model_of_30_billion_parameters_plans_to_18_gb_by_default() -> None:
    """NF4 with its float32 scales; `quantize_experts=False` is transformers' outcome, more than three times that."""
    config, records = qwen3_30b_a3b()
    options: dict[str, Any] = {"dtype": "bfloat16", "attn_implementation": None}
    quantization = config_of("nf4").to_dict()
    small, large = (
        lay_out(config, records, quantization=quantization, quantize_experts=chosen, **options)
        for chosen in (None, False)
    )
    assert (small.quantize_experts, large.quantize_experts) == (True, False)
    assert small.outline.sizes.stage(0, 48)[0] == pytest.approx(18.0e9, rel=0.02)
    assert large.outline.sizes.stage(0, 48)[0] == pytest.approx(59.7e9, rel=0.02)


def test_what_a_mixture_would_weigh_in_4_bits_is_what_it_weighs_then() -> None:
    """A refusal for want of memory offers it: it must not be told that 56 GB are left where 18 are."""
    config, records = qwen3_30b_a3b()
    options: dict[str, Any] = {"dtype": "bfloat16", "attn_implementation": None}
    plain = lay_out(config, records, quantization=None, quantize_experts=None, **options).outline
    for (option, sizes), kind in zip(plain.lighter, ("nf4", "nf4+double"), strict=True):
        there = lay_out(config, records, quantization=config_of(kind).to_dict(), quantize_experts=None, **options)
        assert sizes.stage(0, 48) == there.outline.sizes.stage(0, 48), option
    kept = lay_out(config, records, quantization=None, quantize_experts=False, **options).outline
    assert kept.lighter[0][1].stage(0, 48)[0] > 55e9


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "gpt2"])
def test_what_a_model_would_weigh_in_4_bits(checkpoint_of: Checkpoints, family: str) -> None:
    """Whether its experts can be quantized or not, and its layers are linear or GPT-2's."""
    plain, there = (
        planned(checkpoint_of(family), stages=1, quantization=chosen, quantize_experts=None).plan.outline
        for chosen in (None, config_of("nf4").to_dict())
    )
    assert plain.lighter[0][1].stage(0, LAYERS) == there.sizes.stage(0, LAYERS)


def test_what_a_mixture_in_fp8_would_weigh_in_4_bits(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    folder = packing.rewrite(checkpoint_of("deepseek_v3"), tmp_path / "fp8", packing.fp8(), packing.fp8_config())
    plain = planned(folder, stages=1, quantize_experts=None).plan.outline
    there = planned(
        folder, stages=1, quantization=config_of("nf4").to_dict(), requantize=True, quantize_experts=None
    ).plan.outline
    assert plain.lighter[0][0] == "load_in_4bit=True, requantize=True"
    assert plain.lighter[0][1].stage(0, LAYERS) == there.sizes.stage(0, LAYERS)


# ---- by default ------------------------------------------------------------------------------------------------------


def test_by_default_experts_are_quantized_with_the_rest(checkpoint_of: Checkpoints) -> None:
    folder = checkpoint_of("mixtral")
    quantization = config_of("nf4").to_dict()
    default = planned(folder, stages=1, quantization=quantization, quantize_experts=None)
    chosen = planned(folder, stages=1, quantization=quantization, quantize_experts=True)
    kept = planned(folder, stages=1, quantization=quantization, quantize_experts=False)
    assert default.specs("m", "l", "s") == chosen.specs("m", "l", "s")
    assert default.specs("m", "l", "s") != kept.specs("m", "l", "s")
    [note] = default.plan.to_message().notes
    assert "experts of this mixture are quantized to 4 bits" in note
    assert "quantize_experts=False (--no-quantize-experts) leaves them in bfloat16" in note
    assert not chosen.plan.outline.notes
    assert not kept.plan.outline.notes


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_by_default_experts_that_cannot_be_quantized_stay_as_they_are(checkpoint_of: Checkpoints, family: str) -> None:
    folder = checkpoint_of(family)
    quantization = config_of("nf4").to_dict()
    default = planned(folder, stages=1, quantization=quantization, quantize_experts=None)
    kept = planned(folder, stages=1, quantization=quantization, quantize_experts=False)
    assert default.specs("m", "l", "s") == kept.specs("m", "l", "s")
    [note] = default.plan.outline.notes
    assert "experts of this mixture stay in bfloat16" in note


@pytest.mark.parametrize("quantization", [None, {"quant_method": "bitsandbytes", "load_in_8bit": True}])
def test_by_default_nothing_is_said_of_experts_without_4_bits(
    checkpoint_of: Checkpoints, quantization: dict[str, Any] | None
) -> None:
    plan = planned(checkpoint_of("qwen3_moe"), stages=1, quantization=quantization, quantize_experts=None)
    assert not plan.outlined.layout.quantize_experts
    assert not plan.plan.outline.notes
    dense = planned(checkpoint_of("llama"), stages=1, quantization=config_of("nf4").to_dict(), quantize_experts=None)
    assert not dense.plan.outline.notes


# ---- the node's cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_warm_load_is_the_cold_one(
    checkpoint_of: Checkpoints, tmp_path: Path, family: str, quantization: str
) -> None:
    cache = PartCache(tmp_path / "parts", 1 << 30)
    folder = checkpoint_of(family)
    for planned_spec in planned(folder, stages=2, **in_4_bits(quantization)).specs("m", "l", "s"):
        spec = replace(planned_spec, device="cpu")
        cold = load_stage(spec, None, LoadProgress(), cache)
        assert cold.keep is not None
        cold.keep()
        warm = load_stage(spec, None, LoadProgress(), cache)
        assert (warm.fetched_bytes, warm.keep) == (0, None)
        assert fingerprint(warm.stage.model) == fingerprint(cold.stage.model)
        assert warm.modules == cold.modules
        assert key_of(replace(spec, quantize_experts=False), "cpu", {}) != key_of(spec, "cpu", {})


# ---- where it changes nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, {"quant_method": "bitsandbytes", "load_in_8bit": True}])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_4_bits_it_is_refused(tmp_path: Path, family: str, quantization: Mapping[str, Any] | None) -> None:
    folder = tiny(family, tmp_path, layers=1, dtype="bfloat16")
    with pytest.raises(InvalidRequestError, match="needs load_in_4bit=True"):
        planned(folder, stages=1, quantization=quantization, quantize_experts=True)


def test_a_model_without_experts_stays_as_it_is(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path, layers=2, dtype="bfloat16")
    options = in_4_bits()
    assert (
        planned(folder, stages=2, **options).plan
        == planned(folder, stages=2, quantization=options["quantization"]).plan
    )
    for ours, usual in zip(
        load(folder, 2, **options), load(folder, 2, quantization=options["quantization"]), strict=True
    ):
        assert fingerprint(ours.stage.model) == fingerprint(usual.stage.model)


@pytest.mark.parametrize("family", FAMILIES)
async def test_skipped_modules_stay_as_transformers_has_them(checkpoint_of: Checkpoints, family: str) -> None:
    folder = checkpoint_of(family)
    config = config_of("nf4+double", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"])
    whole = reference(folder, family, config, skipped=(1,))
    stages = ring.load(folder, (1,), quantization=config.to_dict(), dtype="bfloat16", quantize_experts=True)
    kinds = [type(layer.mlp.experts) for layer in (stages[0].model.model.layers[0], *stages[1].model.model.layers[1:])]
    assert kinds == [Experts4bit, type(whole.model.layers[1].mlp.experts), Experts4bit]
    async with ring.serve(stages) as pipeline:
        await check_forward(pipeline, whole, *prompt(padded=False))


def test_a_skipped_projection_stays_in_16_bits(checkpoint_of: Checkpoints) -> None:
    folder = checkpoint_of("mixtral")
    files = tensors_of(folder)
    options = in_4_bits(llm_int8_skip_modules=["lm_head", "down_proj"])
    plan = planned(folder, stages=2, **options)
    for stage, result in zip(plan.plan.stages, load(folder, 2, **options), strict=True):
        assert bytes_of(result.stage.model) == stage.resident_bytes
        for name, module in result.stage.model.named_modules():
            if isinstance(module, Expert):
                assert isinstance(module.gate_proj, bnb.nn.Linear4bit)
                key = name.replace(".mlp.", ".block_sparse_moe.") + ".w2.weight"
                assert type(module.down_proj) is nn.Linear
                assert torch.equal(module.down_proj.weight, files[key])


def test_every_expert_skipped_by_its_module_is_as_without_the_option(checkpoint_of: Checkpoints) -> None:
    folder = checkpoint_of("qwen3_moe")
    options = in_4_bits(llm_int8_skip_modules=["lm_head", "mlp.experts"])
    [ours], [usual] = load(folder, **options), load(folder, **{**options, "quantize_experts": False})
    assert measure(ours.stage.model) == measure(usual.stage.model)
    assert fingerprint(ours.stage.model) == fingerprint(usual.stage.model)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def rewritten(folder: Path, to: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, to / "model.safetensors")
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_the_models_prefix(checkpoint_of: Checkpoints, tmp_path: Path, family: str) -> None:
    folder = checkpoint_of(family)
    bare = rewritten(folder, tmp_path, {key.removeprefix("model."): value for key, value in tensors_of(folder).items()})
    for skip in (None, ["lm_head", "model.layers.1.mlp"]):
        [ours], [usual] = (load(each, **in_4_bits(llm_int8_skip_modules=skip)) for each in (bare, folder))
        assert fingerprint(ours.stage.model) == fingerprint(usual.stage.model)


def refusal(kind: type[ShardliftError], folder: Path) -> str:
    with pytest.raises(ShardliftError) as caught:
        planned(folder, stages=2, **in_4_bits())
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_misshapen_experts_are_named_by_the_plan(
    checkpoint_of: Checkpoints, tmp_path: Path, family: str
) -> None:
    folder = checkpoint_of(family)
    pattern, names = NAMES[family]
    tensors = tensors_of(folder)
    for name, projection in zip(names, PROJECTIONS, strict=True):
        key = pattern.format(layer=1, expert=2, name=name)
        rest = {other: value for other, value in tensors.items() if other != key}
        text = refusal(TensorMismatchError, rewritten(folder, tmp_path, rest))
        assert f"no tensor for model.layers.1.mlp.experts.2.{projection}.weight" in text
        changed = {**tensors, key: tensors[key][:-1]}
        assert f"tensor {key} has shape" in refusal(TensorMismatchError, rewritten(folder, tmp_path, changed))
        extra = pattern.format(layer=1, expert=4, name=name)
        text = refusal(TensorMismatchError, rewritten(folder, tmp_path, {**tensors, extra: tensors[key].clone()}))
        assert f"no place for tensor {extra}" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_never_arrives(checkpoint_of: Checkpoints, family: str) -> None:
    folder = checkpoint_of(family)
    pattern, names = NAMES[family]
    key = pattern.format(layer=1, expert=3, name=names[1])
    [spec] = planned(folder, stages=1, **in_4_bits()).specs("m", "l", "s")
    spec = replace(spec, device="cpu", records=tuple(record for record in spec.records if record.key != key))
    with pytest.raises(TensorMismatchError, match=r"no tensor for model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        load_stage(spec, None, LoadProgress())


def test_experts_that_a_file_holds_merged_are_refused(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint_of("qwen3_moe")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    text = refusal(InvalidRequestError, rewritten(folder, tmp_path, merged))
    assert "holds the experts of a layer in one" in text
    assert "leave quantize_experts out" in text
    assert read_checkpoint(CheckpointRequest(path=str(tmp_path)), None).records.keys() == merged.keys()
    planned(tmp_path, stages=2, quantization=config_of("nf4").to_dict())
    default = planned(tmp_path, stages=2, quantization=config_of("nf4").to_dict(), quantize_experts=None)
    assert not default.outlined.layout.quantize_experts
    assert "stay in bfloat16" in default.plan.outline.notes[0]
