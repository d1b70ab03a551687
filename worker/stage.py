"""A resident stage: a slice of a model on one device, and the forward pass through it.

Shapes: B batch, T new tokens, K past + new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..proto.v1.errors import InvalidRequestError
from .anatomy import Anatomy, Cut
from .kv import StageCache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What enters a stage for one step of a session.

    input: int64 token ids [B, T] into the first stage, hidden states [B, T, H] into the others.
    attention_mask: int64 or bool [B, K], or None where nothing is padding.
    position_ids: int64 [B or 1, T].
    """

    input: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    use_cache: bool = True


class ResidentStage:
    """Layers `[cut.first, cut.end)` of `model`, with what comes before or after them at the ends.

    Not thread-safe: a stage computes one step at a time.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, cut: Cut, device: str) -> None:
        self.model = model
        self.cut = cut
        self.device = torch.device(device)
        self._base = model.get_submodule(anatomy.base)
        config = model.config.get_text_config(decoder=True)
        self._vocabulary: int = config.vocab_size
        self._counts_by_mask = anatomy.counts_by_mask
        # Rotary positions have no end; learned ones are rows of a table.
        self._positions: int | None = getattr(config, anatomy.positions) if anatomy.positions else None

    def check(self, step: StepInput) -> None:
        """Raises InvalidRequestError for token ids or positions outside the model's tables.

        On CUDA such an index is an assertion on the device, which ends every session on it.
        """
        ids, positions = step.input, step.position_ids
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocabulary:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise InvalidRequestError(f"token id {worst} is outside the vocabulary of {self._vocabulary}")
        least = -1 if self._counts_by_mask else 0
        if int(positions.min()) < least or (self._positions is not None and int(positions.max()) >= self._positions):
            raise InvalidRequestError(
                f"position {int(positions.max())} is outside the model's {self._positions} positions: shorten the input"
            )

    def positions(self, attention_mask: torch.Tensor | None, past: int, length: int) -> torch.Tensor:
        """int64 [B or 1, length] of tokens after `past` others, as the model counts where it is given none."""
        if attention_mask is None or not self._counts_by_mask:
            return torch.arange(past, past + length)[None]
        return (attention_mask.cumsum(-1) * attention_mask - 1)[:, past:]

    def new_cache(self) -> StageCache:
        return StageCache(self.model.config, self.cut)

    def forward(self, step: StepInput, cache: StageCache | None, logits_to_keep: int = 0) -> torch.Tensor:
        """Hidden states [B, T, H] for the next stage; from the last stage, logits [B, kept, V].

        `cache` is None without `use_cache`. `logits_to_keep` keeps the last so many positions; 0 keeps all.
        """
        assert step.use_cache == (cache is not None)
        arguments = {
            "input_ids" if self.cut.is_first else "inputs_embeds": step.input.to(self.device),
            "attention_mask": None if step.attention_mask is None else step.attention_mask.to(self.device),
            "position_ids": step.position_ids.to(self.device),
            "past_key_values": None if cache is None else cache.cache,
            "use_cache": step.use_cache,
        }
        with torch.inference_mode():
            if self.cut.is_last:
                output = self.model(**arguments, logits_to_keep=logits_to_keep).logits
            else:
                output = self._base(**arguments).last_hidden_state
        if cache is not None:
            cache.advance(step.input.shape[1])
        return output
