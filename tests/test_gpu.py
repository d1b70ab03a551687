"""The same exactness on CUDA: several stages on one GPU against the whole model on it. `make gpu` runs these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.worker.loader import LoadProgress, load_stage
from tests.support import checkpoints, ring

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
