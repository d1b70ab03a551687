"""Every kind of quantization, through stages: to the bit what transformers and bitsandbytes compute in one process.

`tests/test_families.py` has NF4 with double quantization for every family, `tests/test_layout.py` each kind's bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import ring
from tests.support.checkpoints import tiny
from tests.test_families import check_decoding, check_forward, prompt

KINDS: dict[str, dict[str, Any]] = {
    "fp4, computed in float32": {"load_in_4bit": True},
    "nf4, computed in float16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float16,
    },
    "fp4, double": {
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "nf4, stored as bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "nf4, double, stored as float32": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.float32,
    },
    "nf4, skipping": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["layers.1", "q_proj"],  # and so with a quantized head
    },
    "int8": {"load_in_8bit": True},
    "int8, many outliers": {"load_in_8bit": True, "llm_int8_threshold": 1.0},
    "int8, no outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int8, skipping": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
    "int8, weights in 16 bits": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    "none": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), layers=3, dtype="bfloat16", tied=False)


@pytest.mark.parametrize("kind", KINDS)
async def test_logits_equal_one_process(folder: Path, kind: str) -> None:
    config = BitsAndBytesConfig(**KINDS[kind]) if KINDS[kind] else None
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    quantization = None if config is None else config.to_dict()
    async with ring.serve(ring.load(folder, (1,), quantization=quantization, dtype="bfloat16")) as pipeline:
        ids, mask = prompt(padded=True)
        await check_forward(pipeline, whole, ids, mask)
        await check_decoding(pipeline, whole, ids, mask, (12, ids.shape[1] - 12), 4)
        await pipeline.idle()
