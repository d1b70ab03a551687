"""What a quantization is called. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe_quantization(quantization: Mapping[str, Any] | None) -> str:
    """ "nf4", "nf4+double", "int8" or "none"; of what bitsandbytes hasn't quantized the method: "gptq", "fp8"."""
    if not quantization:
        return "none"
    method = quantization.get("quant_method") or "bitsandbytes"
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        return method
    if quantization.get("load_in_8bit"):
        return "int8"
    kind = str(quantization.get("bnb_4bit_quant_type", "fp4"))
    return f"{kind}+double" if quantization.get("bnb_4bit_use_double_quant") else kind
