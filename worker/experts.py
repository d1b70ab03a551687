"""The experts of a mixture, each with linear layers of its own, so that bitsandbytes can quantize them one by one.

transformers keeps all experts of a layer in two 3-D parameters, which bitsandbytes leaves in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

# A parameter of all experts -> the weights of one expert that lie in it, rows below rows.
PROJECTIONS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# What transformers' `use_experts_implementation` notes of a class, where `Experts4bit` computes the same.
_FORM = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


def is_separable(module: nn.Module) -> bool:
    """Whether `Experts4bit` can stand for `module`."""
    if not hasattr(module, "has_gate") or not hasattr(module, "_apply_gate"):
        return False
    # What an older transformers doesn't note, none of its experts have.
    if any(getattr(module, name, value) is not value for name, value in _FORM.items()):
        return False
    parameters = dict(module.named_parameters())
    if set(parameters) != set(PROJECTIONS) or next(module.buffers(), None) is not None:
        return False
    gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def by_expert(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and shape of each weight that an `Experts4bit` has in place of the parameter `name` [experts, rows,
    columns]."""
    path, _, parameter = name.rpartition(".")
    experts, rows, columns = shape
    projections = PROJECTIONS[parameter]
    for expert in range(experts):
        for projection in projections:
            yield f"{path}.{expert}.{projection}.weight", (rows // len(projections), columns)


class Expert(nn.Module):
    """The weights of one expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)


class Experts4bit(nn.ModuleList):
    """Computes what `experts`, a separable module of transformers', computes, with one `Expert` for each of its own.

    Made on the meta device, of plain linear layers: whoever makes it has bitsandbytes' put in their place.
    """

    def __init__(self, experts: nn.Module) -> None:
        count, hidden, intermediate = experts.get_parameter("down_proj").shape
        super().__init__(Expert(hidden, intermediate) for _ in range(count))
        self._gate: Any = experts._apply_gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden], and for each token its experts and their weights [tokens, k] → [tokens, hidden].

        transformers' eager loop: over the experts that a token was routed to, in order, each for all of its tokens.
        """
        output, experts = torch.zeros_like(hidden_states), top_k_index.T
        # The number of experts stands for "none of them".
        for index in (index for index in top_k_index.unique().tolist() if index < len(self)):
            choice, token = torch.where(experts == index)
            expert, inputs = self[index], hidden_states[token]
            assert isinstance(expert, Expert)
            gated = self._gate(torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], dim=-1))
            outputs = expert.down_proj(gated) * top_k_weights[token, choice, None]
            output.index_add_(0, token, outputs.to(output.dtype))
        return output
