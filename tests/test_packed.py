"""Checkpoints whose weights are packed (GPTQ, AWQ, FP8, MXFP4): unpacked to the very weights that they mean.

The reference is `tests/support/packing.py`, which packs known integers by the published layouts, in numpy.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.cluster.quantized import settle
from shardlift.proto.v1.errors import (
    CorruptCheckpointError,
    InvalidRequestError,
    OutOfMemoryError,
    ShardliftError,
    TensorMismatchError,
    UnsupportedModelError,
)
from shardlift.worker import loader
from shardlift.worker.experts import Experts4bit
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.packed import Packing, packing_of
from shardlift.worker.part_cache import PartCache, key_of
from shardlift.worker.spec import StageSpec
from shardlift.worker.unpack import unpack
from tests.support import packing, ring
from tests.support.checkpoints import tiny
from tests.support.fingerprint import fingerprint
from tests.support.quantization import nf4
from tests.test_families import check_decoding, check_forward, prompt
from tests.test_layout import bytes_of, loaded, planned

LAYERS = 3
# Of the layouts, what differs: bits, size of groups, their order, zero points and how they are stored.
GPTQ: dict[str, dict[str, Any]] = {
    "int4": {},
    "int8": {"bits": 8},
    "int3": {"bits": 3},
    "int2": {"bits": 2, "group": 16},
    "act-order": {"order": True},
    "act-order-v2": {"order": True, "v2": True, "sym": True},
    "symmetric": {"sym": True, "group": 64},
    "one group": {"group": -1},
}
# The last one leaves partial blocks at both ends, as DeepSeek-V3's kv_a_proj_with_mqa has them.
BLOCKS = [(32, 32), (128, 128), (64, 32), (40, 24)]

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A checkpoint of a family, as yet unpacked."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = tiny(family, folder, layers=LAYERS, dtype="bfloat16")
        return made[family]

    return get


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def check_loaded(folder: Path, whole: PreTrainedModel, **options: Any) -> None:
    """Every tensor of two stages is the whole's, and the plan has told their bytes."""
    plan, found = planned(folder, stages=2, **options), {}
    for stage, result in zip(plan.plan.stages, loaded(plan), strict=True):
        assert result.fetched_bytes == stage.fetch_bytes
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes
        found |= tensors_of(result.stage.model)
    wanted = tensors_of(whole)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


def in_16_bits(folder: Path, **options: Any) -> PreTrainedModel:
    """What the packed checkpoint in `folder` means, as transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "plain", **options)
    return model


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GPTQ)
def test_gptq_is_unpacked_to_what_was_packed(plain: Checkpoints, tmp_path: Path, kind: str) -> None:
    folder = packing.rewrite(
        plain("llama"), tmp_path / "gptq", packing.gptq(**GPTQ[kind]), packing.gptq_config(**GPTQ[kind])
    )
    check_loaded(folder, in_16_bits(folder))
    if kind == "act-order":
        check_loaded(folder, in_16_bits(folder, dtype=torch.float16), dtype="float16")


def test_gptq_without_an_order_needs_none(plain: Checkpoints, tmp_path: Path) -> None:
    def pack(name: str, weight: torch.Tensor) -> Any:
        parts, meant = packing.gptq()(name, weight)
        return {suffix: part for suffix, part in parts.items() if suffix != ".g_idx"}, meant

    folder = packing.rewrite(plain("llama"), tmp_path / "gptq", pack, packing.gptq_config())
    check_loaded(folder, in_16_bits(folder))


def test_awq_is_unpacked_to_what_was_packed(plain: Checkpoints, tmp_path: Path) -> None:
    folder = packing.rewrite(plain("llama"), tmp_path / "awq", packing.awq, packing.AWQ_CONFIG)
    check_loaded(folder, in_16_bits(folder))


@pytest.mark.parametrize("block", BLOCKS)
def test_fp8_is_unpacked_to_what_was_packed(plain: Checkpoints, tmp_path: Path, block: tuple[int, int]) -> None:
    folder = packing.rewrite(plain("llama"), tmp_path / "fp8", packing.fp8(block), packing.fp8_config(block))
    check_loaded(folder, in_16_bits(folder))
    if block != (40, 24):  # transformers refuses partial blocks
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
        )
        check_loaded(folder, theirs)


def test_fp8_as_autofp8_writes_it(plain: Checkpoints, tmp_path: Path) -> None:
    """One scale for each matrix, by a name of its own, and one for what goes into it, which only kernels need."""

    def pack(name: str, weight: torch.Tensor) -> Any:
        parts, meant = packing.fp8(tuple(weight.shape))(name, weight)
        scale = parts.pop(".weight_scale_inv").reshape(())
        return parts | {".weight_scale": scale, ".input_scale": torch.tensor(0.02)}, meant

    said = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    folder = packing.rewrite(plain("mixtral"), tmp_path / "fp8", pack, said)
    check_loaded(folder, in_16_bits(folder))


@pytest.mark.parametrize("scale_shape", [(), (1,), (96, 1)])
def test_fp8_scales_of_a_whole_matrix_or_of_rows(scale_shape: tuple[int, ...]) -> None:
    weight = torch.randn(96, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape)
    parts = {"weight": weight, "scale": scale}
    found = unpack("w", parts, (96, 64), Packing(method="fp8", block=(128, 128)), torch.bfloat16)
    assert torch.equal(found, (weight.float() * scale).bfloat16())


def test_fp8_scales_that_are_exponents() -> None:
    weight = torch.randn(255, 32).to(torch.float8_e4m3fn)
    scale = torch.arange(255, dtype=torch.uint8)[:, None]
    found = unpack(
        "w", {"weight": weight, "scale": scale}, (255, 32), Packing(method="fp8", block=(1, 32)), torch.float32
    )
    assert torch.equal(found, weight.float() * torch.ldexp(torch.ones(255, 1), torch.arange(255)[:, None] - 127))


@pytest.mark.parametrize("rows", [1 << 13, 33])
def test_a_large_weight_is_unpacked_piece_by_piece(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("shardlift.worker.unpack._PIECE", 1 << 12)
    for bits in (3, 4):
        parts, meant = packing.gptq(bits, 32, order=True)("w", torch.empty(rows // 32 * 32, 96))
        parts = {name.removeprefix("."): part for name, part in parts.items()}
        found = unpack("w", parts, tuple(meant.shape), Packing(method="gptq", zero_offset=1), torch.float32)
        assert torch.equal(found, torch.from_numpy(meant).float())
    parts, meant = packing.fp8((40, 24))("w", torch.randn(rows, 50))
    parts = {name.removeprefix("."): part for name, part in parts.items()}
    both = {"weight": parts["weight"], "scale": parts["weight_scale_inv"]}
    found = unpack("w", both, (rows, 50), Packing(method="fp8", block=(40, 24)), torch.float32)
    assert torch.equal(found, torch.from_numpy(meant).float())


def test_mxfp4_is_unpacked_as_transformers_does(plain: Checkpoints, tmp_path: Path) -> None:
    """As gpt-oss is published."""
    folder = tmp_path / "mxfp4"
    shutil.copytree(plain("gpt_oss"), folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    check_loaded(folder, theirs)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
async def test_logits_equal_those_of_the_unpacked_checkpoint(plain: Checkpoints, tmp_path: Path, family: str) -> None:
    folder = packing.rewrite(
        plain(family), tmp_path / "gptq", packing.gptq(order=True), packing.gptq_config(order=True)
    )
    whole = in_16_bits(folder)
    for ends in ((), (1, 2)):
        stages = ring.load(folder, ends)
        async with ring.serve(stages) as pipeline:
            for padded in (False, True):
                ids, mask = prompt(padded=padded)
                await check_forward(pipeline, whole, ids, mask)
                await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 8)
            await pipeline.idle()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
async def test_quantized_anew_it_is_what_the_unpacked_checkpoint_would_be(
    plain: Checkpoints, tmp_path: Path, method: str
) -> None:
    packer, config = {
        "gptq": (packing.gptq(), packing.gptq_config()),
        "awq": (packing.awq, packing.AWQ_CONFIG),
        "fp8": (packing.fp8(), packing.fp8_config()),
    }[method]
    folder = packing.rewrite(plain("llama"), tmp_path / method, packer, config)
    options = {"quantization": nf4().to_dict(), "requantize": True}
    whole = in_16_bits(folder, quantization_config=nf4())
    check_loaded(folder, whole, **options)
    # And that is bitsandbytes' quantization of the reference.
    name = "model.layers.1.mlp.up_proj"
    reference = load_file(folder / "plain" / "model.safetensors")[f"{name}.weight"].bfloat16()
    packed, _ = quantize_4bit(reference, quant_type="nf4", compress_statistics=True)
    assert torch.equal(whole.get_submodule(name).weight.data, packed)
    if method == "fp8":
        async with ring.serve(ring.load(folder, (1,), **options)) as pipeline:
            ids, mask = prompt(padded=False)
            await check_forward(pipeline, whole, ids, mask)


def test_quantized_anew_to_8_bits_and_kept_by_the_node(plain: Checkpoints, tmp_path: Path) -> None:
    folder = packing.rewrite(plain("llama"), tmp_path / "gptq", packing.gptq(), packing.gptq_config())
    config = BitsAndBytesConfig(load_in_8bit=True)
    options = {"quantization": config.to_dict(), "requantize": True}
    check_loaded(folder, in_16_bits(folder, quantization_config=config), **options)
    cache = PartCache(tmp_path / "parts", 1 << 30)
    for each in planned(folder, stages=2, **options).specs("m", "l", "s"):
        spec = replace(each, device="cpu")
        cold = load_stage(spec, None, LoadProgress(), cache)
        assert cold.keep is not None
        cold.keep()
        warm = load_stage(spec, None, LoadProgress(), cache)
        assert (warm.fetched_bytes, warm.modules) == (0, cold.modules)
        assert fingerprint(warm.stage.model) == fingerprint(cold.stage.model)
        # What is unpacked otherwise is another part.
        assert spec.packing is not None
        other = replace(spec, packing=replace(spec.packing, zero_offset=0))
        assert key_of(other, "cpu", {}) != key_of(spec, "cpu", {})
    # Unpacked, it would take more of the disk than the checkpoint does.
    [spec] = planned(folder, stages=1).specs("m", "l", "s")
    assert load_stage(replace(spec, device="cpu"), None, LoadProgress(), cache).keep is None


@pytest.mark.parametrize("requantize", [False, True], ids=["unpacked", "nf4"])
@pytest.mark.parametrize(("family", "method"), [("llama", "gptq"), ("mixtral", "fp8")])
def test_one_weights_parts_live_at_a_time(
    plain: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: str, requantize: bool
) -> None:
    packer, config = {
        "gptq": (packing.gptq(), packing.gptq_config()),
        "fp8": (packing.fp8(), packing.fp8_config()),
    }[method]
    folder = packing.rewrite(plain(family), tmp_path / method, packer, config)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    calls = 0

    def watched(key: str, parts: Mapping[str, torch.Tensor], *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = [storage for each in alive if (storage := each()) is not None]
        assert not found, f"{len(found)} tensors of weights before {key} still live"
        # The weight itself may stay, or be quantized and go; its parts may not.
        alive.extend(weakref.ref(part.untyped_storage()) for part in parts.values())
        return unpack(key, parts, *arguments)

    monkeypatch.setattr(loader, "unpack", watched)
    options = {"quantization": nf4().to_dict(), "requantize": True, "quantize_experts": None} if requantize else {}
    results = loaded(planned(folder, stages=1, **options))
    assert len(results) == 1
    assert calls > 7 * LAYERS - 1


def test_a_refusal_for_want_of_memory_names_what_would_fit(plain: Checkpoints, tmp_path: Path) -> None:
    folder = packing.rewrite(plain("llama"), tmp_path / "gptq", packing.gptq(), packing.gptq_config())
    request = CheckpointRequest(path=str(folder))
    with pytest.raises(OutOfMemoryError, match="set load_in_4bit=True, requantize=True"):
        plan_model(request, None, ModelOptions(), PlanOptions(), parse_devices("100KiB"))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_in_fp8_become_experts_in_4_bits(plain: Checkpoints, tmp_path: Path, family: str) -> None:
    """As those of DeepSeek-V3: one by one, from FP8 to NF4."""
    folder = packing.rewrite(plain(family), tmp_path / "fp8", packing.fp8(), packing.fp8_config())
    options = {"quantization": nf4().to_dict(), "quantize_experts": None}
    ours = loaded(planned(folder, stages=1, requantize=True, **options))[0].stage.model
    theirs = loaded(planned(folder / "plain", stages=1, **options))[0].stage.model
    assert any(isinstance(module, Experts4bit) for module in ours.modules())
    found, wanted = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_plan_tells_what_becomes_of_it(plain: Checkpoints, tmp_path: Path) -> None:
    folder = packing.rewrite(plain("llama"), tmp_path / "gptq", packing.gptq(), packing.gptq_config())
    plan = planned(folder, stages=1)
    assert plan.plan.outline.quantization == "none"
    [note] = plan.plan.to_message().notes
    assert "quantized with gptq: its weights are unpacked" in note
    assert "requantize=True" in note
    assert "quantization_config" not in plan.outlined.config, "what is resident is not quantized"
    anew = planned(folder, stages=1, quantization=nf4().to_dict(), requantize=True)
    assert anew.plan.outline.quantization == "nf4+double"
    assert not anew.plan.outline.notes
    # A respawned worker's spec is read from JSON.
    for each in (plan, anew):
        [spec] = each.specs("m", "l", "s")
        assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "mentioned"),
    [
        ({"quant_method": "aqlm"}, "pip install aqlm[gpu]"),
        ({"quant_method": "hqq"}, "pip install hqq"),
        ({"quant_method": "quanto"}, "pip install optimum-quanto"),
        ({"quant_method": "eetq"}, "pip install kernels"),
        ({"quant_method": "torchao"}, "pip install torchao"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq in marlin layout"),
        ({"quant_method": "gptq", "bits": 5}, "gptq in 5 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in gemv layout"),
        ({"quant_method": "magic"}, "quantized with magic"),
        ({"bits": 4}, "quantized with an unknown method"),
    ],
    ids=str,
)
def test_what_nobody_reads_is_refused_by_name(said: Mapping[str, Any], mentioned: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        packing_of({"quantization_config": said})
    assert mentioned in str(caught.value)
    assert "load a checkpoint in 16 or 32 bits" in str(caught.value)


@pytest.mark.parametrize("block", [3, [0, 128], [128], ["a", "b"], [128, True]], ids=str)
def test_blocks_that_are_none(block: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="weight_block_size"):
        packing_of({"quantization_config": {"quant_method": "fp8", "weight_block_size": block}})


def test_only_bitsandbytes_quantizes_on_the_way_in() -> None:
    with pytest.raises(InvalidRequestError, match="quantization_config says hqq"):
        settle({"model_type": "llama"}, {"quant_method": "hqq"})


def test_packed_weights_that_the_config_does_not_tell_of(plain: Checkpoints, tmp_path: Path) -> None:
    """As AutoGPTQ wrote them once, with a file of their own."""
    folder = packing.rewrite(plain("llama"), tmp_path / "gptq", packing.gptq(), packing.gptq_config())
    change_config(folder, quantization_config=None)
    with pytest.raises(TensorMismatchError, match=r"quantize_config\.json"):
        planned(folder, stages=1)


def test_an_order_that_is_missing(plain: Checkpoints, tmp_path: Path) -> None:
    folder = packing.rewrite(
        plain("llama"), tmp_path / "gptq", packing.gptq(order=True), packing.gptq_config(order=True)
    )
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.g_idx"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TensorMismatchError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.g_idx"):
        planned(folder, stages=1)


@pytest.mark.parametrize(
    ("quantization", "requantize", "mentioned"),
    [
        (nf4().to_dict(), False, "requantize=True (--requantize)"),
        (None, True, "requantize=True needs to know to what"),
        ({"quant_method": "fp8"}, False, "quantized with gptq, but quantization_config says fp8"),
    ],
)
def test_contradictions_are_refused(quantization: Any, requantize: bool, mentioned: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        settle({"quantization_config": packing.gptq_config()}, quantization, requantize=requantize)
    assert mentioned in str(caught.value)


def test_the_checkpoints_own_method_may_be_asked_for(plain: Checkpoints) -> None:
    """As transformers users pass FineGrainedFP8Config(dequantize=True)."""
    asked = FineGrainedFP8Config(dequantize=True).to_dict()
    settled = settle({"quantization_config": packing.fp8_config(), "model_type": "llama"}, asked)
    assert settled.quantization is None
    assert settled.config == {"model_type": "llama"}
    # One that isn't quantized has nothing to be quantized anew.
    config = {"model_type": "llama", "quantization_config": None}
    assert settle(config, nf4().to_dict(), requantize=True).quantization == nf4().to_dict()


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        ({"scales": None}, "no tensor model.layers.1.mlp.up_proj.scales"),
        ({"qzeros": torch.zeros(2, 11, dtype=torch.int32)}, "parts of packed weight model.layers.1.mlp.up_proj"),
        ({"qweight": torch.zeros(8, 127, dtype=torch.int32)}, "parts of packed weight model.layers.1.mlp.up_proj"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "parts of packed weight model.layers.1.mlp.up_proj"),
        ({"scales": torch.zeros(2, 128, dtype=torch.int32)}, "model.layers.1.mlp.up_proj.scales is I32"),
        ({"weight": torch.zeros(128, 64)}, "model.layers.1.mlp.up_proj.weight both packed and unpacked"),
        ({"g_idx": torch.full((64,), 9, dtype=torch.int32)}, "g_idx of model.layers.1.mlp.up_proj.weight"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx of model.layers.1.mlp.up_proj.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit_together(
    plain: Checkpoints, tmp_path: Path, change: dict[str, torch.Tensor | None], mentioned: str
) -> None:
    folder = packing.rewrite(plain("llama"), tmp_path / "gptq", packing.gptq(), packing.gptq_config())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        key = f"model.layers.1.mlp.up_proj.{name}"
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShardliftError) as caught:
        loaded(planned(folder, stages=1))
    late = isinstance(change.get("g_idx"), torch.Tensor) and len(change["g_idx"]) == 64
    assert isinstance(caught.value, CorruptCheckpointError if late else TensorMismatchError)
    assert mentioned in str(caught.value)


def test_compressed_tensors_names_its_package(plain: Checkpoints, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shardlift.worker.unpack.find_spec", lambda name: None)
    shutil.copytree(plain("llama"), tmp_path / "c")
    change_config(
        tmp_path / "c", quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}
    )
    with pytest.raises(UnsupportedModelError, match="pip install 'compressed-tensors"):
        planned(tmp_path / "c", stages=1)
