"""Packed checkpoints that stay packed: transformers' own quantizer for them holds the weights and computes.

The reference is one-process transformers. GPTQ and AWQ need optimum and gptqmodel, which CI doesn't install:
`pip install optimum gptqmodel`. FP8 of compressed-tensors runs on a processor, too, once transformers is told so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, PreTrainedModel

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.own_forms import ask_here, verdict
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import CanKeep, ModelOptions, PlannedModel, plan_model
from shardlift.cluster.quantized import own_form
from shardlift.proto.v1.errors import InvalidRequestError, UnsupportedModelError
from shardlift.worker import own_form as worker_side
from shardlift.worker.own_form import Answer, Question
from shardlift.worker.saving import StageSaver
from shardlift.worker.spec import StageSpec
from tests.support import packing, ring
from tests.support.checkpoints import tiny
from tests.support.quantization import nf4
from tests.test_families import check_decoding, check_forward, prompt
from tests.test_layout import bytes_of, loaded

LAYERS = 3
KINDS: dict[str, tuple[packing.Packer, dict[str, Any]]] = {
    "gptq": (packing.gptq(), packing.gptq_config()),
    "gptq, act-order": (packing.gptq(order=True), packing.gptq_config(order=True)),
    "gptq, symmetric": (packing.gptq(sym=True, group=64), packing.gptq_config(sym=True, group=64)),
    "gptq, int8": (packing.gptq(bits=8), packing.gptq_config(bits=8)),
    "gptq, int3": (packing.gptq(bits=3), packing.gptq_config(bits=3)),
    "gptq, int2 in one group": (packing.gptq(bits=2, group=-1), packing.gptq_config(bits=2, group=-1)),
    "gptq, v2": (packing.gptq(v2=True), packing.gptq_config(v2=True)),
    "awq": (packing.awq, packing.AWQ_CONFIG),
}
# Of bits, what gptqmodel adds to each matrix once it is loaded: shifts, which no header tells of.
ADDED_BYTES = {2: 64, 3: 144, 4: 32, 8: 16}
Checkpoints = Callable[[str, str], Path]
# optimum looks at each attribute of a module, deprecated ones too.
with_gptqmodel = pytest.mark.filterwarnings("ignore")


def here(question: Question) -> str:
    """As nodes are asked, of this machine's processors."""
    return worker_side.answer(replace(question, device="cpu")).why_not


def yes(question: Question) -> str:
    return ""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("packed")
    made: dict[str, Path] = {}

    def get(family: str, kind: str) -> Path:
        if family not in made:
            made[family] = tiny(family, root / family, layers=LAYERS, dtype="bfloat16")
        key = f"{family}, {kind}"
        if key not in made:
            made[key] = packing.rewrite(made[family], root / key, *KINDS[kind])
        return made[key]

    return get


def planned(folder: Path, can_keep: CanKeep | None, *, stages: int = 2, **options: Any) -> PlannedModel:
    return plan_model(
        CheckpointRequest(path=str(folder)),
        None,
        ModelOptions(**options),
        PlanOptions(num_stages=stages),
        parse_devices(f"{stages}x1TiB"),
        can_keep,
    )


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def check_held(plan: PlannedModel, whole: PreTrainedModel, added_bytes: int = 0) -> None:
    """Every tensor is the whole's, in its dtype; the plan has told the bytes, but for `added_bytes` a packed matrix."""
    found: dict[str, torch.Tensor] = {}
    for stage, result in zip(plan.plan.stages, loaded(plan), strict=True):
        model = result.stage.model
        matrices = sum(name.endswith(".qweight") for name in model.state_dict())
        assert result.fetched_bytes == stage.fetch_bytes
        assert bytes_of(model) == sum(module.size_bytes for module in result.modules)
        assert bytes_of(model) == stage.resident_bytes + added_bytes * matrices
        assert result.keep is None, "no node keeps a checkpoint's own bytes"
        found |= state_of(model)
    wanted = state_of(whole)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name


async def check_computed(
    folder: Path, whole: PreTrainedModel, cuts: tuple[tuple[int, ...], ...], **options: Any
) -> None:
    for ends in cuts:
        async with ring.serve(ring.load(folder, ends, **options)) as pipeline:
            for padded in (False, True):
                ids, mask = prompt(padded=padded)
                await check_forward(pipeline, whole, ids, mask)
                await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 4)
            await pipeline.idle()


# ---- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


@with_gptqmodel
@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in KINDS), ("qwen2", "gptq"), ("qwen2", "awq")]
)
def test_gptqmodel_holds_the_checkpoints_tensors(packed: Checkpoints, family: str, kind: str) -> None:
    pytest.importorskip("gptqmodel")
    folder = packed(family, kind)
    plan = planned(folder, here)
    method = kind.partition(",")[0]
    added_bytes = ADDED_BYTES[KINDS[kind][1]["bits"]] if method == "gptq" else 0
    assert plan.plan.outline.quantization == method, plan.plan.outline.notes
    [note] = plan.plan.outline.notes
    assert f"quantized with {method}: its weights stay so" in note
    check_held(plan, AutoModelForCausalLM.from_pretrained(folder), added_bytes)
    held = sum(stage.resident_bytes for stage in plan.plan.stages)
    assert held < sum(stage.resident_bytes for stage in planned(folder, None).plan.stages)
    [spec] = planned(folder, here, stages=1).specs("m", "l", "s")
    assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@with_gptqmodel
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "gptq", "bfloat16"),
        ("llama", "gptq", "float16"),
        ("llama", "gptq, act-order", "bfloat16"),
        ("llama", "gptq, int8", "float32"),
        ("llama", "gptq, int3", "bfloat16"),
        ("llama", "gptq, int2 in one group", "float16"),
        ("llama", "gptq, v2", "bfloat16"),
        ("llama", "awq", "bfloat16"),
        ("llama", "awq", "float16"),
        ("qwen2", "gptq, symmetric", "float32"),
        ("qwen2", "awq", "float32"),
    ],
)
async def test_gptqmodel_computes_as_in_one_process(packed: Checkpoints, family: str, kind: str, dtype: str) -> None:
    pytest.importorskip("gptqmodel")
    folder = packed(family, kind)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    cuts = ((), (1,), (1, 2)) if (kind, dtype) in (("gptq", "bfloat16"), ("awq", "bfloat16")) else ((1, 2),)
    await check_computed(folder, whole, cuts, dtype=dtype, can_keep=here)


@with_gptqmodel
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_experts_are_unpacked(packed: Checkpoints, kind: str) -> None:
    """transformers 5 merges them, and its quantizer has no modules for them."""
    pytest.importorskip("gptqmodel")
    plan = planned(packed("qwen3_moe", kind), here)
    assert plan.plan.outline.quantization == "none"
    assert "no place for them" in plan.plan.outline.notes[-1]


# ---- FP8 of compressed-tensors, with transformers' kernels -----------------------------------------------------------


@pytest.fixture
def fp8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a GPU that multiplies in FP8; torch does it on processors, too."""
    pytest.importorskip("compressed_tensors")
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    def validate(self: Any, **kwargs: Any) -> None:
        self.use_fp8_kernel = self.quantization_config.use_optimized_inference

    monkeypatch.setattr(CompressedTensorsHfQuantizer, "validate_environment", validate)


OPTIMIZED = {"quant_method": "compressed-tensors", "use_optimized_inference": True}


async def test_fp8_that_compressed_tensors_wrote(fp8_anywhere: None, tmp_path: Path) -> None:
    plain = tiny("llama", tmp_path / "plain", layers=LAYERS, dtype="bfloat16")
    form = "float-quantized"
    folder = packing.rewrite(plain, tmp_path / "packed", packing.compressed(form), packing.compressed_config(form))
    with pytest.warns(UserWarning, match="loading attributes"):
        whole = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(use_optimized_inference=True)
        )
    plan = planned(folder, here, quantization=OPTIMIZED)
    assert plan.plan.outline.quantization == "compressed-tensors"
    check_held(plan, whole)
    assert whole.model.layers[0].mlp.up_proj.weight.dtype is torch.float8_e4m3fn
    await check_computed(folder, whole, ((), (1,), (1, 2)), quantization=OPTIMIZED, can_keep=here)


async def test_what_stays_packed_is_not_saved(fp8_anywhere: None, tmp_path: Path) -> None:
    plain = tiny("llama", tmp_path / "plain", layers=LAYERS, dtype="bfloat16")
    form = "float-quantized"
    folder = packing.rewrite(plain, tmp_path / "packed", packing.compressed(form), packing.compressed_config(form))
    [result] = loaded(planned(folder, here, stages=1, quantization=OPTIMIZED))
    with pytest.raises(UnsupportedModelError, match=r"compressed-tensors.*dequantize=True"):
        StageSaver(result.stage, lambda take: take()).plan(1 << 30, keep_quantized_experts=False)


@pytest.mark.parametrize(("form", "name"), [("float-quantized", "weight"), ("pack-quantized", "weight_packed")])
def test_transformers_unpacks_compressed_tensors_too(tmp_path: Path, form: str, name: str) -> None:
    """… at its first pass, into what is held here from the start."""
    pytest.importorskip("compressed_tensors")
    plain = tiny("llama", tmp_path / "plain", layers=2, dtype="bfloat16")
    folder = packing.rewrite(plain, tmp_path / "packed", packing.compressed(form), packing.compressed_config(form))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    module = "model.layers.0.mlp.up_proj"
    assert whole.get_parameter(f"{module}.{name}").dtype is not torch.bfloat16
    with torch.no_grad():
        whole(torch.ones(1, 4, dtype=torch.long))
    assert whole.get_parameter(f"{module}.weight").dtype is torch.bfloat16
    plan = planned(folder, here, stages=1)
    assert "at the first pass" in plan.plan.outline.notes[-1]
    found = state_of(loaded(plan)[0].stage.model)
    beside = ("weight_scale", "weight_shape")
    wanted = {name: value for name, value in state_of(whole).items() if not name.endswith(beside)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


# ---- FP8 with block scales: all but the kernel, which needs a GPU (test_gpu.py) --------------------------------------


@pytest.fixture
def fp8_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' modules as they are, with a product in torch in the place of its kernel: for both sides."""
    from transformers.integrations import finegrained_fp8
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    def multiply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        block: Any,
        bias: Any = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        spread = scale.repeat_interleave(block[0], 0)[: weight.shape[0]]
        spread = spread.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
        return torch.nn.functional.linear(hidden, (weight.float() * spread).to(hidden.dtype), bias)

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **_: None)
    monkeypatch.setattr(finegrained_fp8, "finegrained_fp8_linear", multiply)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
async def test_fp8_blocks(fp8_without_a_gpu: None, tmp_path: Path, family: str) -> None:
    plain = tiny(family, tmp_path / "plain", layers=LAYERS, dtype="bfloat16")
    folder = packing.rewrite(plain, tmp_path / "packed", packing.fp8(), packing.fp8_config())
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    plan = planned(folder, yes)
    assert plan.plan.outline.quantization == "fp8"
    check_held(plan, whole)
    kinds = {str(value.dtype) for value in state_of(whole).values()}
    assert "torch.float8_e4m3fn" in kinds
    if family == "llama":
        await check_computed(folder, whole, ((), (1,), (1, 2)), can_keep=yes)


# ---- who decides -----------------------------------------------------------------------------------------------------


def test_what_is_not_kept_is_unpacked_and_says_why(packed: Checkpoints) -> None:
    folder = packed("llama", "gptq")
    plan = planned(folder, lambda _: "on node-7: no such package")
    assert plan.plan.outline.quantization == "none"
    assert plan.plan.outline.notes[-1] == "its weights don't stay packed: on node-7: no such package"
    assert plan.plan.stages == planned(folder, None).plan.stages


def test_dequantize_asks_nobody(packed: Checkpoints) -> None:
    def fail(question: Question) -> str:
        raise AssertionError("nodes are asked for what nobody wants")

    folder = packed("llama", "gptq")
    for options in ({"dequantize": True}, {"quantization": nf4().to_dict(), "requantize": True}):
        assert planned(folder, fail, **options).plan.outline.quantization in ("none", "nf4+double")
    with pytest.raises(InvalidRequestError, match="is none of them"):
        planned(folder / "plain", fail, dequantize=True)


def test_a_config_of_the_checkpoints_own_method_says_how() -> None:
    fp8 = {"model_type": "llama", "quantization_config": packing.fp8_config()}
    assert own_form(fp8, None) == fp8
    assert own_form(fp8, FineGrainedFP8Config(dequantize=True).to_dict()) is None
    assert own_form(fp8, nf4().to_dict()) is None
    assert own_form({"model_type": "llama"}, None) is None
    assert own_form({"quantization_config": nf4().to_dict()}, None) is None
    form = {"quantization_config": packing.compressed_config("float-quantized")}
    found = own_form(form, OPTIMIZED)
    assert found is not None
    assert found["quantization_config"] == form["quantization_config"] | {"use_optimized_inference": True}


def test_all_nodes_must_agree_with_the_head() -> None:
    fit, other, unfit = Answer(why_not="", tensors="a"), Answer(why_not="", tensors="b"), Answer(why_not="no kernels")
    assert verdict("a", {"one": ("cuda", fit), "two": ("cuda", fit)}) == ""
    assert verdict("a", {"one": ("cuda", fit), "two": ("cuda", unfit)}) == "on two: no kernels"
    assert "other tensors than on the head" in verdict("a", {"one": ("cpu", other)})
    # Processors beside GPUs hold nothing.
    assert verdict("a", {"one": ("cuda", fit), "head": ("cpu", unfit)}) == ""
    assert verdict("a", {}) == "no node could be asked"


def test_of_compressed_tensors_only_fp8_has_kernels() -> None:
    pytest.importorskip("compressed_tensors")
    config = packing.compressed_config("pack-quantized")
    assert "first pass" in worker_side.why_not_anywhere({"quantization_config": config})
    config["use_optimized_inference"] = True
    assert "FP8 alone" in worker_side.why_not_anywhere({"quantization_config": config})
    config["config_groups"] = packing.compressed_config("float-quantized")["config_groups"]
    assert worker_side.why_not_anywhere({"quantization_config": config}) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "compressed-tensors"])
def test_this_machine_unpacks(kind: str) -> None:
    config: dict[str, Any] = {"model_type": "llama", "quantization_config": {"quant_method": kind}}
    if kind == "compressed-tensors":
        config["quantization_config"] = packing.compressed_config("float-quantized") | {"use_optimized_inference": True}
    found = worker_side.answer(Question(config=config, dtype="bfloat16", attn_implementation=None, device="cpu"))
    assert found.why_not
    assert "\n" not in found.why_not


def test_a_process_of_its_own_answers() -> None:
    question = Question(
        config={"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}},
        dtype="bfloat16",
        attn_implementation=None,
        device="",
    )
    assert ask_here(question, True) == ("cpu", Answer(why_not="mxfp4 is always unpacked here"))
