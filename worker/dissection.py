"""The anatomy of a family that isn't listed, found by watching a small model of it at work.

What is found is a guess until `cluster.selfcheck` has compared slices made by it with the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..proto.v1.errors import UnsupportedModelError
from .anatomy import Anatomy

_TOKENS = 5


@dataclass
class _Call:
    """One call of a child of the base model: its first argument and what it gave, as far as they are tensors."""

    name: str
    given: torch.Tensor | None
    gave: torch.Tensor | None


@dataclass
class _Watched:
    """Calls before and after the loop, and of the loop what its first layer got and its last layer returned."""

    before: list[_Call] = field(default_factory=list)
    after: list[_Call] = field(default_factory=list)
    stream: torch.Tensor | None = None
    returned: Any = None


def dissect(model: PreTrainedModel) -> Anatomy:
    """The anatomy of `model`, which has weights, from one forward pass of it.

    Raises UnsupportedModelError where it has no single run of layers, or its embedding or head aren't beside it.
    """
    family = model.config.model_type
    base_path, layers_name = _find_layers(model)
    base = model.get_submodule(base_path)
    embedding = _path_of(base, model.get_input_embeddings())
    head = _path_of(model, model.get_output_embeddings())
    if embedding is None or "." in embedding or head is None or "." in head:
        raise UnsupportedModelError(
            f"model type {family!r} keeps its token embedding or its head away from its layers ({base_path}): it can't "
            "be cut into stages"
        )
    watched = _watch(model, base, layers_name, beside=(layers_name, embedding))
    assert watched.stream is not None
    width = watched.stream.shape[-1]
    before = [call for call in watched.before if call.gave is not None and call.gave.shape[-1] == width]
    additive = [call.name for call in before if call.given is None or call.given.ndim < watched.stream.ndim]
    return Anatomy(
        base=base_path,
        layers=layers_name,
        embedding=embedding,
        before=tuple(dict.fromkeys(call.name for call in before)),
        additive=tuple(dict.fromkeys(additive)),
        after=tuple(dict.fromkeys(call.name for call in watched.after if call.gave is not None)),
        head=head,
        layers_give_tuples=isinstance(watched.returned, tuple),
        positions="max_position_embeddings" if additive else "",
    )


def variants(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Anatomy]:
    """`anatomy`, and what else it could be: watching doesn't show by what the base model multiplies what enters it, nor
    how it counts positions."""
    base = model.get_submodule(anatomy.base)
    scales = {
        name: 1.0
        for name, value in vars(base).items()
        if isinstance(value, float) and value != 1.0 and any(word in name for word in ("mult", "scal", "normalizer"))
    }
    for neutral in ({}, scales) if scales else ({},):
        for counts_by_mask in (False, True):
            yield replace(anatomy, neutral=neutral, counts_by_mask=counts_by_mask)


def _find_layers(model: PreTrainedModel) -> tuple[str, str]:
    """Path of the base model, and the name of its list of layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) if len(module) == count
    ]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} has {len(outermost) or 'no'} lists of {count} layers "
            f"({', '.join(outermost) or 'none'}): exactly one can be cut into stages"
        )
    base, _, layers = outermost[0].rpartition(".")
    return base, layers


def _path_of(module: nn.Module, part: nn.Module | None) -> str | None:
    return next((name for name, each in module.named_modules() if each is part and name), None)


def _watch(model: PreTrainedModel, base: nn.Module, layers_name: str, beside: tuple[str, ...]) -> _Watched:
    watched = _Watched()
    layers = list(base.get_submodule(layers_name).children())
    hooks = []

    def on_first(module: nn.Module, args: Any, kwargs: Any) -> None:
        watched.stream = _tensor((*args, *kwargs.values()))

    def on_last(module: nn.Module, args: Any, output: Any) -> None:
        watched.returned = output

    def on_child(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = _Call(
                name=name,
                given=_tensor((*args, *kwargs.values())),
                gave=output if isinstance(output, torch.Tensor) else None,
            )
            (watched.before if watched.stream is None else watched.after).append(call)

        return note

    try:
        hooks.append(layers[0].register_forward_pre_hook(on_first, with_kwargs=True))
        hooks.append(layers[-1].register_forward_hook(on_last))
        for name, child in base.named_children():
            if name not in beside:
                hooks.append(child.register_forward_hook(on_child(name), with_kwargs=True))
        with torch.inference_mode():
            model(torch.arange(1, 1 + _TOKENS)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return watched


def _tensor(values: tuple[Any, ...]) -> torch.Tensor | None:
    return next((value for value in values if isinstance(value, torch.Tensor)), None)
