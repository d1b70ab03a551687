"""The same exactness on CUDA: several stages on one GPU against the whole model on it. `make gpu` runs these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.proto.v1.errors import OutOfMemoryError
from shardlift.worker.fetch import part_bytes
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.own_form import Question, answer
from shardlift.worker.part_cache import PartCache
from shardlift.worker.saving import StageSaver
from shardlift.worker.serialized import serialize
from shardlift.worker.spec import StageSpec
from shardlift.worker.timeline import COPY, FETCH
from tests.support import checkpoints, packing, ring
from tests.support.fingerprint import fingerprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda:0"
KINDS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4+double": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "none": None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "qwen3"])
async def test_stages_on_a_gpu_equal_the_whole_model(family: str, kind: str, tmp_path: Path) -> None:
    folder = checkpoints.tiny(family, tmp_path / family, layers=4, dtype="bfloat16")
    config = KINDS[kind]
    whole = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    quantization = None if config is None else config.to_dict()
    stages = ring.load(folder, (1, 3), quantization=quantization, dtype="bfloat16", device=DEVICE)
    ids = torch.randint(3, 250, (2, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    async with ring.serve(stages) as pipeline:
        with torch.inference_mode():
            expected = whole(ids.to(DEVICE), attention_mask=mask.to(DEVICE), use_cache=False).logits
        session = pipeline.session()
        assert torch.equal(await session(ids, mask, use_cache=False), expected.cpu())
        await session.close()
        wanted = whole.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=16, do_sample=False)
        tokens, _ = await pipeline.generate(ids, mask, max_new_tokens=16, do_sample=False)
        assert torch.equal(tokens, wanted[:, ids.shape[1] :].cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_bytes_are_the_measured_ones_on_a_gpu(kind: str, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", layers=4, dtype="bfloat16")
    config = KINDS[kind]
    options = ModelOptions(quantization=None if config is None else config.to_dict())
    planned = plan_model(CheckpointRequest(path=str(folder)), None, options, PlanOptions(), parse_devices("3x1GiB"))
    for spec, stage in zip(planned.specs("model", "load", "secret"), planned.plan.stages, strict=True):
        measured = sum(module.size_bytes for module in load_stage(spec, None, LoadProgress()).modules)
        assert measured == pytest.approx(stage.resident_bytes, rel=0.01)


@pytest.mark.parametrize("kind", ["nf4+double", "int8"])
async def test_a_checkpoint_that_bitsandbytes_quantized_equals_the_whole_model(kind: str, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", layers=4, dtype="bfloat16")
    first = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=KINDS[kind], dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    first.save_pretrained(tmp_path / "quantized")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map={"": DEVICE})
    ids = torch.randint(3, 250, (2, 21), generator=torch.Generator().manual_seed(0))
    async with ring.serve(ring.load(tmp_path / "quantized", (1, 3), device=DEVICE)) as pipeline:
        with torch.inference_mode():
            expected = whole(ids.to(DEVICE), use_cache=False).logits
        assert torch.equal(await pipeline.session()(ids, use_cache=False), expected.cpu())


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_packed_weights_are_unpacked_to_the_same_bits_on_a_gpu(method: str, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", layers=4, dtype="bfloat16")
    packer, config = {
        "gptq": (packing.gptq(order=True), packing.gptq_config(order=True)),
        "awq": (packing.awq, packing.AWQ_CONFIG),
        "fp8": (packing.fp8((40, 24)), packing.fp8_config((40, 24))),
    }[method]
    packed = packing.rewrite(folder, tmp_path / "packed", packer, config)
    [stage] = ring.load(packed, (), device=DEVICE)
    whole = AutoModelForCausalLM.from_pretrained(packed / "plain").state_dict()
    for name, tensor in stage.model.state_dict().items():
        assert torch.equal(tensor.cpu(), whole[name]), name


# ---- the way onto the device -----------------------------------------------------------------------------------------

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 400 MB in bf16: several times what the budgets below hold."""
    return checkpoints.tiny(
        "llama",
        tmp_path_factory.mktemp("large"),
        layers=8,
        dtype="bfloat16",
        tied=False,
        max_shard_size="150MB",
        **LARGE,
    )


def one_stage(folder: Path, kind: str) -> StageSpec:
    config = KINDS[kind]
    options = ModelOptions(quantization=None if config is None else config.to_dict())
    planned = plan_model(CheckpointRequest(path=str(folder)), None, options, PlanOptions(), parse_devices("1x100GiB"))
    [spec] = planned.specs("model", "load", "secret")
    return spec


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_resident_is_what_transformers_makes(large: Path, kind: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(
        large, quantization_config=KINDS[kind], dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    wanted = {name: tensor.cpu() for name, tensor in serialize(whole, skip=()).items()}
    del whole
    loaded = load_stage(one_stage(large, kind), None, LoadProgress())
    found = serialize(loaded.stage.model, skip=())
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.device.type == "cuda" or name.endswith((".weight_format", "bitsandbytes__nf4")), name
        assert torch.equal(tensor.cpu(), wanted[name]), name


@pytest.mark.parametrize("budget_bytes", [3 << 20, 48 << 20, 1 << 30])
@pytest.mark.parametrize("connections", [1, 4, 16])
def test_budget_and_connections_change_nothing(large: Path, budget_bytes: int, connections: int) -> None:
    spec = one_stage(large, "nf4+double")
    expected = fingerprint(load_stage(spec, None, LoadProgress()).stage.model)
    spec = replace(spec, budget_bytes=budget_bytes, connections=connections)
    for _ in range(3):
        assert fingerprint(load_stage(spec, None, LoadProgress()).stage.model) == expected


@pytest.mark.parametrize("kind", ["nf4+double", "none"])
def test_the_device_holds_its_part_and_one_budget(large: Path, kind: str) -> None:
    spec = replace(one_stage(large, kind), budget_bytes=96 << 20)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    progress = LoadProgress()
    loaded = load_stage(spec, None, progress)
    resident = sum(module.size_bytes for module in loaded.modules)
    largest = max(record.size_bytes for record in spec.records)
    peak = torch.cuda.max_memory_allocated() - before - resident
    assert peak <= spec.budget_bytes + largest, f"{peak:,} bytes above what stays"
    assert torch.cuda.memory_allocated() - before <= resident * 1.01 + (1 << 20)
    names = {phase.name for phase in progress.timeline.phases()}
    assert {FETCH, COPY} <= names
    assert part_bytes(spec.budget_bytes * 3 // 4, spec.connections) * 2 * spec.connections <= spec.budget_bytes


@pytest.mark.parametrize("kind", ["nf4", "nf4+double", "int8"])
def test_a_warm_load_is_the_cold_one(large: Path, kind: str, tmp_path: Path) -> None:
    cache, spec = PartCache(tmp_path, 1 << 40), one_stage(large, kind)
    cold = load_stage(spec, None, LoadProgress(), cache)
    assert cold.keep is not None
    cold.keep()
    warm = load_stage(spec, None, LoadProgress(), cache)
    assert warm.fetched_bytes == 0
    assert fingerprint(warm.stage.model) == fingerprint(cold.stage.model)
    assert warm.modules == cold.modules


def test_a_trace_shows_reads_copies_and_quantization(large: Path) -> None:
    progress = LoadProgress(trace=True)
    load_stage(one_stage(large, "nf4"), None, progress)
    spans, dropped = progress.timeline.spans()
    assert dropped == 0
    assert {FETCH, COPY, "wait", "quantize"} <= {span.phase for span in spans}


def test_a_device_that_is_too_small_is_named(large: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - (150 << 20)), dtype=torch.uint8, device=DEVICE)
    try:
        with pytest.raises(OutOfMemoryError, match="cuda:0 has no room"):
            load_stage(one_stage(large, "none"), None, LoadProgress())
    finally:
        del taken
        torch.cuda.empty_cache()
    assert total > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_stages_on_a_gpu_are_saved_as_transformers_saves_the_whole_model(
    family: str, kind: str, tmp_path: Path
) -> None:
    folder = checkpoints.tiny(family, tmp_path / family, layers=4, dtype="bfloat16")
    config = KINDS[kind]
    whole = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    whole.save_pretrained(tmp_path / "whole")
    expected = {
        name: tensor for file in (tmp_path / "whole").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    quantization = None if config is None else config.to_dict()
    found: dict[str, torch.Tensor] = {}
    for stage in ring.load(folder, (1, 3), quantization=quantization, dtype="bfloat16", device=DEVICE):
        saver = StageSaver(stage, lambda look: look())
        for file in saver.plan(100_000, keep_quantized_experts=False).files:
            found |= load(b"".join([file.header, *saver.data(file)]))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


# Sizes that FP8 kernels take.
_FP8_SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4}
PACKED = {
    "fp8": (packing.fp8((128, 128)), packing.fp8_config((128, 128)), None),
    "gptq": (packing.gptq(), packing.gptq_config(), None),
    "awq": (packing.awq, packing.AWQ_CONFIG, None),
    "compressed-tensors": (
        packing.compressed("float-quantized"),
        packing.compressed_config("float-quantized"),
        {"quant_method": "compressed-tensors", "use_optimized_inference": True},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PACKED)
async def test_packed_weights_stay_packed_on_a_gpu(kind: str, tmp_path: Path) -> None:
    """… where transformers' quantizer and its kernels are there, and compute as in one process."""
    packer, config, asked = PACKED[kind]
    plain = checkpoints.tiny("llama", tmp_path / "plain", layers=4, dtype="bfloat16", **_FP8_SIZES)
    folder = packing.rewrite(plain, tmp_path / "packed", packer, config)

    def here(question: Question) -> str:
        return answer(replace(question, device=DEVICE)).why_not

    held = {**json.loads((folder / "config.json").read_text())}
    held["quantization_config"] |= asked or {}
    if why := here(Question(config=held, dtype="bfloat16", attn_implementation=None, device="")):
        pytest.skip(f"transformers would not keep it packed here: {why}")
    loading = None if asked is None else CompressedTensorsConfig(use_optimized_inference=True)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading, device_map={"": DEVICE})
    stages = ring.load(folder, (1, 3), quantization=asked, device=DEVICE, can_keep=here)
    ids = torch.randint(3, 250, (2, 21), generator=torch.Generator().manual_seed(0))
    async with ring.serve(stages) as pipeline:
        with torch.inference_mode():
            expected = whole(ids.to(DEVICE), use_cache=False).logits
        session = pipeline.session()
        assert torch.equal(await session(ids, use_cache=False), expected.cpu())
        await session.close()
        wanted = whole.generate(ids.to(DEVICE), max_new_tokens=8, do_sample=False)
        tokens, _ = await pipeline.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(tokens, wanted[:, ids.shape[1] :].cpu())
