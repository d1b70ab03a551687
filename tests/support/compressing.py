"""compressed-tensors checkpoints that round more than weights, as that package itself writes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
FP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
    "zp_dtype": torch.float8_e4m3fn,
}
_BY_CHANNEL, _BY_TENSOR = {"strategy": "channel"}, {"strategy": "tensor"}
_DYNAMIC_TOKEN = {"strategy": "token", "dynamic": True}
# name -> target -> what is rounded, and how
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    "int8, each token": {"Linear": {"weights": INT8 | _BY_CHANNEL, "input_activations": INT8 | _DYNAMIC_TOKEN}},
    "int8, each token, asymmetric": {
        "Linear": {
            "weights": INT8 | _BY_CHANNEL,
            "input_activations": INT8 | _DYNAMIC_TOKEN | {"symmetric": False},
        }
    },
    "int8, fixed, asymmetric": {
        "Linear": {"weights": INT8 | _BY_CHANNEL, "input_activations": INT8 | _BY_TENSOR | {"symmetric": False}}
    },
    "fp8, each token": {"Linear": {"weights": FP8 | _BY_CHANNEL, "input_activations": FP8 | _DYNAMIC_TOKEN}},
    "fp8, fixed": {"Linear": {"weights": FP8 | _BY_TENSOR, "input_activations": FP8 | _BY_TENSOR}},
    "fp8, the whole input": {
        "Linear": {"weights": FP8 | _BY_CHANNEL, "input_activations": FP8 | _BY_TENSOR | {"dynamic": True}}
    },
    "fp8, blocks": {
        "Linear": {
            "weights": FP8 | {"strategy": "block", "block_structure": [16, 16]},
            "input_activations": FP8 | {"strategy": "group", "group_size": 16, "dynamic": True},
        }
    },
    "nvfp4": {"Linear": {"weights": FP4, "input_activations": FP4 | {"dynamic": "local"}}},
    "outputs": {"Linear": {"weights": INT8 | _BY_CHANNEL, "output_activations": INT8 | _BY_TENSOR}},
    "int4 beside fp8": {
        "re:.*mlp.*": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}},
        "Linear": {"weights": FP8 | _BY_CHANNEL, "input_activations": FP8 | _DYNAMIC_TOKEN},
    },
}
CACHE = FP8 | _BY_TENSOR  # of keys and values, by a fixed scale


def compress(
    plain: Path,
    out: Path,
    schemes: Mapping[str, Mapping[str, Any]],
    *,
    cache: Mapping[str, Any] | None = None,
    fine_scales: bool = False,
) -> Path:
    """The checkpoint in `plain` compressed, in `out`. schemes: by target, as in SCHEMES. cache: how keys and values are
    rounded. fine_scales: in float32, and none that the model's dtype holds."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(plain)
    groups = {
        f"group_{index}": QuantizationScheme(
            targets=[target], **{what: QuantizationArgs(**fields) for what, fields in scheme.items()}
        )
        for index, (target, scheme) in enumerate(schemes.items())
    }
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], kv_cache_scheme=QuantizationArgs(**cache) if cache else None
    )
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            if scheme.weights is not None:
                _observe(module, scheme.weights)
            _fix(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    if fine_scales:
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = tensor.float() * 1.0013
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        shutil.copy(plain / file, out / file)
    compressor.update_config(str(out))
    return out


def _observe(module: Any, arguments: Any) -> None:
    """Scales of the weight, by its least and greatest values."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, strategy, overall = module.weight.data, arguments.strategy, None
    if strategy == "tensor_group":
        overall = (torch.finfo(torch.float8_e4m3fn).max * 6.0 / weight.abs().max().float()).reshape(1)
        module.weight_global_scale.data = overall
    if strategy == "block":
        high, wide = arguments.block_structure
        blocks = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        low, top = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif strategy == "tensor":
        low, top = weight.amin().reshape(1), weight.amax().reshape(1)
    else:
        groups = weight.unflatten(-1, (-1, arguments.group_size or weight.shape[-1]))
        low, top = groups.amin(-1), groups.amax(-1)
    scale, zero_point = calculate_qparams(low, top, arguments, global_scale=overall)
    module.weight_scale.data = scale if strategy == "tensor_group" else scale.to(module.weight_scale.dtype)
    module.weight_zero_point.data = zero_point.to(module.weight_zero_point.dtype)


def _fix(module: Any) -> None:
    """Scales of activations, which others observe while a model computes."""
    for what in ("input", "output", "k", "v"):
        for name, value in (("scale", 0.013), ("zero_point", 3), ("global_scale", 300.0)):
            parameter = getattr(module, f"{what}_{name}", None)
            scheme = module.quantization_scheme
            arguments = scheme.output_activations if what == "output" else scheme.input_activations
            if parameter is not None and not (name == "zero_point" and arguments.symmetric):
                parameter.data.fill_(value)
