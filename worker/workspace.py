"""What a pass takes of a device's memory while it is computed, beside weights, keys and values: an estimate. Pure.

Shapes: B rows, T new tokens, K past and new tokens together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# So much is never refused: what allocators round up to would decide otherwise.
LEAST_BYTES = 16 << 20
# A prompt in chunks needs no more than what a plan sets aside.
CHUNK_TOKENS = 512
_EAGER_SCORE_BYTES = 4  # attention probabilities are made in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """rows B, new T, past K - T; is_padded: whether some of K is padding. kept: positions whose logits are made."""

    rows: int
    new: int
    past: int = 0
    is_padded: bool = False
    kept: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What of a model decides it. window: the shortest one of its layers, 0 for none. expert: values that a token has
    with the experts that it goes to."""

    hidden: int
    inner: int
    heads: int
    vocabulary: int
    item_bytes: int
    window: int = 0
    expert: int = 0
    is_eager: bool = False
    is_flash: bool = False

    @classmethod
    def of(cls, config: Any, item_bytes: int) -> Dimensions:
        """config: of the text model, as transformers has it."""
        hidden = int(getattr(config, "hidden_size", 0) or 0)
        attention = str(getattr(config, "_attn_implementation", "") or "")
        experts = int(getattr(config, "num_experts_per_tok", 0) or 0)
        moe_inner = int(getattr(config, "moe_intermediate_size", 0) or getattr(config, "intermediate_size", 0) or 0)
        return cls(
            hidden=hidden,
            inner=inner_size(config),
            heads=int(getattr(config, "num_attention_heads", 0) or 0),
            vocabulary=int(config.vocab_size),
            item_bytes=item_bytes,
            window=int(getattr(config, "sliding_window", 0) or 0),
            expert=experts * (hidden + 2 * moe_inner),
            # With alibi a bias is made for each head and pair, however attention is computed.
            is_eager=attention == "eager" or bool(getattr(config, "alibi", False)),
            is_flash="flash" in attention,
        )


def inner_size(config: Any) -> int:
    """The widest of what a layer makes of a token."""
    inner = max(getattr(config, "intermediate_size", None) or 0, getattr(config, "n_inner", None) or 0)
    return max(int(inner), 4 * int(getattr(config, "hidden_size", 0) or 0))


def activation_bytes(tokens: int, hidden: int, inner: int, item_bytes: int) -> int:
    """The residual stream, queries, keys and values, and both halves of a gated inner layer."""
    return tokens * (4 * hidden + 2 * inner) * item_bytes


def pass_bytes(dimensions: Dimensions, asked: Pass) -> tuple[int, int]:
    """What one layer takes at its widest, on any stage; and the logits beside it, on the last."""
    tokens, total, item = asked.rows * asked.new, asked.past + asked.new, dimensions.item_bytes
    size = activation_bytes(tokens, dimensions.hidden, dimensions.inner, item) + tokens * dimensions.expert * item
    pairs = tokens * total
    is_masked = asked.is_padded or asked.past > 0 or 0 < dimensions.window <= total or dimensions.is_eager
    if is_masked and asked.new > 1 and not dimensions.is_flash:
        # True or false as it is made, and then what is added to the scores.
        size += pairs * (2 + item)
    if dimensions.is_eager:
        size += dimensions.heads * pairs * (2 * item + _EAGER_SCORE_BYTES)
    # As they are, and as they are sent or chosen from.
    logits = asked.rows * asked.kept * dimensions.vocabulary * (item + max(item, 4))
    return size, logits


def least_bytes(dimensions: Dimensions) -> int:
    """What a pass may take wherever a model is resident."""
    chunk = activation_bytes(CHUNK_TOKENS, dimensions.hidden, dimensions.inner, dimensions.item_bytes)
    return max(LEAST_BYTES, chunk)
