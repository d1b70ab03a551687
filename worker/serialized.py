"""A model's weights in bitsandbytes' own serialized form, and back: nothing is quantized twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

import bitsandbytes as bnb
import torch
from torch import nn

from ..proto.v1.errors import CorruptCheckpointError, TensorMismatchError

_SCALES = "SCB"  # of an 8-bit weight's rows
_FORMAT = "weight_format"  # of an 8-bit weight: by rows, always


def serialize(model: nn.Module, skip: Collection[str]) -> dict[str, torch.Tensor]:
    """Every persistent tensor by name, a quantized weight's statistics beside it (`<name>.absmax`, …); no copies.

    `skip`: names of parameters that share another's memory. To be called before the first forward pass, which may
    change a weight's layout (see `residency.measure`).
    """
    state = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and name not in skip}


def restore(
    model: nn.Module, names: Collection[str], take: Callable[[str], torch.Tensor], device: str, skip: Collection[str]
) -> None:
    """Fills `model`, which is on the meta device, with what `serialize` named. Each tensor is asked for once.

    Raises CorruptCheckpointError unless every parameter and persistent buffer gets its own, and all are used.
    """
    left = set(names)
    statistics: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        weight, dot, _ = name.rpartition(".weight.")
        if dot:
            statistics[f"{weight}.weight"].append(name)

    def claim(name: str) -> torch.Tensor:
        if name not in left:
            raise CorruptCheckpointError(f"the part has no tensor {name}")
        left.remove(name)
        return take(name)

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, old in list(own_tensors(module)):
            key = prefix + name
            if key in skip:
                continue
            data = claim(key)
            if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                # A name relative to its weight is what from_prequantized wants.
                found = {each.removeprefix(f"{key}."): claim(each) for each in statistics[key]}
                value = bnb.nn.Params4bit.from_prequantized(data, found, device=torch.device(device), module=module)
            elif isinstance(module, bnb.nn.Linear8bitLt) and name == "weight":
                scales = claim(prefix + _SCALES) if data.dtype == torch.int8 else None
                value = bnb.nn.Int8Params(
                    data, requires_grad=False, has_fp16_weights=module.state.has_fp16_weights, SCB=scales
                ).to(device)
            elif isinstance(old, nn.Parameter):
                value = nn.Parameter(data, requires_grad=data.is_floating_point())
            else:
                value = data
            if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                module._is_hf_initialized = True
            value._is_hf_initialized = True  # or transformers would initialise it anew
            setattr(module, name, value)
    unused = sorted(name for name in left if not name.endswith(f".{_FORMAT}"))
    if unused:
        raise CorruptCheckpointError(f"the part has a tensor too many: {unused[0]}")


def check_statistics(name: str, module: bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) -> None:
    """Whether the statistics of a module that was quantized elsewhere are of its weight: bitsandbytes' kernels read
    them without a look at their number.

    Raises TensorMismatchError.
    """
    weight, numel = module.weight, module.out_features * module.in_features
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = getattr(weight, "SCB", None)
        sound = weight.dtype == torch.int8 and scales is not None and scales.numel() == module.out_features
    else:
        state = getattr(weight, "quant_state", None)
        sound = state is not None and weight.numel() * weight.element_size() >= -(-numel // 2)
        blocks = numel
        while sound and state is not None:
            size, code = state.blocksize, state.code
            blocks = -(-blocks // size) if isinstance(size, int) and size > 0 else 0
            sound = 0 < blocks == state.absmax.numel() and code is not None and code.numel() in (16, 256)
            state = state.state2
    if not sound:
        raise TensorMismatchError(
            f"the statistics of quantized weight {name}.weight aren't those of {numel} values: save the model anew"
        )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the module itself."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
