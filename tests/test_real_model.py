"""SmolLM2-135M over one, two and three uneven stages: every logit of one-process transformers, difference 0.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tests.support import ring
from tests.support.quantization import nf4

DECODED = 32
CUTS: dict[str, tuple[int, ...]] = {"one stage": (), "two": (11,), "three": (4, 21)}


@pytest.fixture(scope="module")
def whole(smollm2_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_folder, quantization_config=nf4())


@pytest.fixture(scope="module")
def prompts(smollm2_folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder, padding_side="left")
    texts = ["The capital of France is", "Once upon a time, in a village between two very high mountains, there"]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("cut", CUTS)
async def test_every_logit_equals_one_process(smollm2_folder: Path, whole: Any, prompts: Any, cut: str) -> None:
    stages = ring.load(smollm2_folder, CUTS[cut], quantization=nf4().to_dict())
    async with ring.serve(stages) as pipeline:
        await check_decoding(pipeline, whole, prompts["input_ids"], prompts["attention_mask"])
        expected = whole.generate(**prompts, max_new_tokens=DECODED, do_sample=False)
        tokens, _ = await pipeline.generate(**prompts, max_new_tokens=DECODED, do_sample=False)
        assert torch.equal(tokens, expected[:, prompts["input_ids"].shape[1] :])
        await check_long_prompt(pipeline, whole)
        await pipeline.idle()


async def check_decoding(pipeline: ring.Ring, whole: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """A left-padded prefill and cached steps."""
    cache, session = DynamicCache(config=whole.config), pipeline.session()
    new, positions = ids, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for step in range(1 + DECODED):
        arguments = {"attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            expected = whole(new, past_key_values=cache, use_cache=True, **arguments).logits
        assert (await session(new, **arguments) - expected).abs().max() == 0.0, f"step {step}"
        new = expected[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(new)], dim=-1)
        positions = positions[:, -1:] + 1
    await session.close()


async def check_long_prompt(pipeline: ring.Ring, whole: Any) -> None:
    """Hidden states and logits that take several messages."""
    ids = torch.randint(5, 40_000, (1, 1100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole(ids, logits_to_keep=24).logits
    session = pipeline.session()
    assert torch.equal(await session(ids, logits_to_keep=24), expected)
    await session.close()
