"""A resident stage: a slice of a model on one device, and the forward pass through it.

Shapes: B batch, T new tokens, K past + new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ..proto.v1.errors import InvalidRequestError
from .adapters import StageAdapters
from .anatomy import Anatomy, Cut
from .kv import StageCache
from .pristine import Pristine
from .ragged import Part, ragged_attention

# On a GPU, layers of this many tokens are waited for one by one: else the host would have all of them under way at
# once, and whatever came between would wait for the last.
_LONG_TOKENS = 1024
# Tokens made again together: each one's keys and values are a copy of the past, for the time of a layer.
_SINGLES_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What enters a stage for one step of a session.

    input: int64 token ids [B, T] into the first stage, hidden states [B, T, H] into the others.
    attention_mask: int64 or bool [B, K], or None where nothing is padding.
    position_ids: int64 [B or 1, T].
    one_by_one: compute each token as if it came alone, to the same bits.
    adapters: those that compute beside the base, in this order.
    """

    input: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    use_cache: bool = True
    one_by_one: bool = False
    adapters: tuple[str, ...] = ()


class ResidentStage:
    """Layers `[cut.first, cut.end)` of `model`, with what comes before or after them at the ends.

    Made before the model's first pass. checkpoint_keys: of the tensors that it was loaded from. Not thread-safe: a
    stage computes one step at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        cut: Cut,
        device: str,
        checkpoint_keys: Collection[str] = (),
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.cut = cut
        self.checkpoint_keys = checkpoint_keys
        self.pristine = Pristine(model)
        self.device = torch.device(device)
        self._base = model.get_submodule(anatomy.base)
        config = model.config.get_text_config(decoder=True)
        self.vocabulary: int = config.vocab_size
        # Of hidden states between layers.
        self.width: int | None = getattr(config, "hidden_size", None)
        self._counts_by_mask = anatomy.counts_by_mask
        # Rotary positions have no end; learned ones are rows of a table.
        self._positions: int | None = getattr(config, anatomy.positions) if anatomy.positions else None
        # A stage of nothing but quantized weights has no parameter to ask.
        self.dtype: torch.dtype = next(
            (each.dtype for each in model.parameters() if each.is_floating_point()), config.dtype or torch.float32
        )
        self._config = config
        self.adapters = StageAdapters(model, anatomy, cut, self.device)
        self._breathe: Callable[[], None] = lambda: None
        for layer in getattr(self._base, anatomy.layers)[cut.first : cut.end]:
            layer.register_forward_pre_hook(self._before_layer)
        # Set by `try_batches`: whether rows of several sessions can go as one batch, and whether they come out the same
        # as alone to the bit.
        self.can_batch = False
        self.is_row_blind = False

    def check(self, step: StepInput) -> None:
        """Raises InvalidRequestError for token ids or positions outside the model's tables.

        On CUDA such an index is an assertion on the device, which ends every session on it.
        """
        ids, positions = step.input, step.position_ids
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise InvalidRequestError(f"token id {worst} is outside the vocabulary of {self.vocabulary}")
        least = -1 if self._counts_by_mask else 0
        if int(positions.min()) < least or (self._positions is not None and int(positions.max()) >= self._positions):
            raise InvalidRequestError(
                f"position {int(positions.max())} is outside the model's {self._positions} positions: shorten the input"
            )

    def on_layer(self, breathe: Callable[[], None]) -> None:
        """Has `breathe` called before each layer of a forward pass; what it raises ends the pass."""
        self._breathe = breathe

    def _before_layer(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.device.type == "cuda" and inputs and inputs[0].shape[:2].numel() >= _LONG_TOKENS:
            torch.cuda.current_stream(self.device).synchronize()
        active = self.adapters.active
        self._breathe()
        self.adapters.use(active)  # others' may have been, meanwhile

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
        if step.one_by_one and cache is not None and step.input.shape[1] > 1:
            return self._forward_singly(step, cache, logits_to_keep)
        arguments = {
            "attention_mask": None if step.attention_mask is None else step.attention_mask.to(self.device),
            "position_ids": step.position_ids.to(self.device),
            "past_key_values": None if cache is None else cache.cache,
            "use_cache": step.use_cache,
        }
        with torch.inference_mode():
            output = self._run(step.input.to(self.device), arguments, step.adapters, logits_to_keep)
        if cache is not None:
            cache.advance(step.input.shape[1])
        return output

    def forward_rows(self, steps: Sequence[StepInput], caches: Sequence[StageCache]) -> list[torch.Tensor]:
        """Single-token steps of several sessions, with the same adapters, as one batch: for each what `forward` gives
        for it."""
        assert self.can_batch
        assert len({step.adapters for step in steps}) == 1
        parts = [self._part(step, cache, cache.cache) for step, cache in zip(steps, caches, strict=True)]
        output = self._forward_parts(torch.cat([step.input for step in steps]), parts, steps[0].adapters)
        for cache in caches:
            cache.advance(1)
        return list(output.split([part.rows for part in parts]))

    def _forward_singly(self, step: StepInput, cache: StageCache, logits_to_keep: int) -> torch.Tensor:
        """Each token as if it came alone: the same bits as then. Where kernels allow, many go as one batch all the
        same, each with attention of its own."""
        outputs = []
        length, rows = step.input.shape[1], step.input.shape[0]
        # What was tried out is the base: an adapter's matrices are small, and kernels may take them otherwise.
        at_once = _SINGLES_AT_ONCE if self.is_row_blind and not step.adapters else 1
        for start in range(0, length, at_once):
            singles = [
                _single(step, index, cache.length - start) for index in range(start, min(start + at_once, length))
            ]
            if len(singles) == 1:
                outputs.append(self.forward(singles[0], cache, 1))
                continue
            parts = [self._part(single, cache, cache.shape_after(index)) for index, single in enumerate(singles)]
            output = self._forward_parts(torch.cat([single.input for single in singles]), parts, step.adapters)
            cache.advance(len(singles))
            outputs.append(torch.cat(output.split(rows), dim=1))
        return torch.cat(outputs, dim=1)[:, -logits_to_keep:]

    def _part(self, step: StepInput, cache: StageCache, shape: Cache) -> Part:
        assert step.input.shape[1] == 1
        assert step.use_cache
        rows = step.input.shape[0]
        return Part(
            cache=cache,
            shape=shape,
            rows=rows,
            attention_mask=None if step.attention_mask is None else step.attention_mask.to(self.device),
            position_ids=step.position_ids.to(self.device).expand(rows, 1),
        )

    def _forward_parts(self, inputs: torch.Tensor, parts: Sequence[Part], adapters: tuple[str, ...]) -> torch.Tensor:
        like = torch.empty((1, 1, 0), dtype=self.dtype, device=self.device)
        with torch.inference_mode(), ragged_attention(self._config, parts, like) as ragged:
            arguments = {
                "position_ids": torch.cat([part.position_ids for part in parts]),
                "past_key_values": ragged,
                "use_cache": True,
            }
            return self._run(inputs.to(self.device), arguments, adapters, 1)

    def _run(
        self, inputs: torch.Tensor, arguments: dict[str, Any], adapters: tuple[str, ...], logits_to_keep: int
    ) -> torch.Tensor:
        self.adapters.use(adapters)
        arguments["input_ids" if self.cut.is_first else "inputs_embeds"] = inputs
        output: torch.Tensor
        if self.cut.is_last:
            output = self.model(**arguments, logits_to_keep=logits_to_keep).logits
        else:
            output = self._base(**arguments).last_hidden_state
        return output


def _single(step: StepInput, index: int, past: int) -> StepInput:
    """Token `index` of `step`, before which so much was `past`."""
    mask = step.attention_mask
    return StepInput(
        input=step.input[:, index : index + 1],
        attention_mask=None if mask is None else mask[:, : past + index + 1],
        position_ids=step.position_ids[:, index : index + 1],
        adapters=step.adapters,
    )
