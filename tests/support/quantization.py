"""Quantizations that several tests load with."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def nf4() -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in bf16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
