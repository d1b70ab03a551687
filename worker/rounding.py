"""Activations, and cached keys and values, rounded as a compressed-tensors checkpoint says: by that package's own code.

transformers' model rounds them so once its first pass has unpacked the weights. Its code rounds what goes into a linear
layer and what comes out of it to what 8 (or 4) bits hold, by scales that the checkpoint has or that the values give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..proto.v1.errors import UnsupportedModelError, one_line
from .compressed import parse

_WITHOUT = "load it with dequantize=True (--dequantize), with which activations are not rounded"


def round_activations(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    """Has `model`, whole and with plain weights, round as compressed-tensors' `config` says.

    Scales that the checkpoint has become parameters, by its names for them. Raises UnsupportedModelError for what can't
    be rounded here.
    """
    from compressed_tensors.modeling.attention import HOOKED_ATTENTION_NAME
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config

    try:
        apply_quantization_config(model, parse(config), run_compressed=False, show_progress=False)
    except Exception as error:
        # What a config makes of it is of any kind.
        raise UnsupportedModelError(
            f"compressed-tensors can't round activations as config.json says ({one_line(error)}): {_WITHOUT}"
        ) from error
    if model.config._attn_implementation == HOOKED_ATTENTION_NAME:
        raise UnsupportedModelError(
            f"the checkpoint rounds queries in the middle of attention, which can't be done here: {_WITHOUT}"
        )
    for module in _rounding(model):
        for name in [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]:
            delattr(module, name)  # the weight comes unpacked
        module.quantization_status = QuantizationStatus.DECOMPRESSED


def rounds(model: nn.Module) -> bool:
    return bool(_rounding(model))


@contextmanager
def mixing(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules that round a token otherwise beside others than alone, while `model` computes.

    One scale for all that comes in, or one for each token where a mixture's router has made all tokens one row.
    """
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        dynamic = [
            each.strategy
            for each in (getattr(scheme, "input_activations", None), getattr(scheme, "output_activations", None))
            if each is not None and each.dynamic
        ]
        if "tensor" in dynamic:
            found.append(name)
        elif "token" in dynamic:

            def note(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if inputs and inputs[0].ndim < 3:
                    found.append(name)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _rounding(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
