"""Quantizations that several tests load with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BitsAndBytesConfig


def nf4(skip: Sequence[str] = ()) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in bf16. `skip`: modules that stay as they are, beside the head."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *skip] if skip else None,
    )
