"""Single tokens with pasts of unlike length as one batch: steps of several sessions, or of one that is made again.

Everything but attention sees one batch of rows. Attention sees each session by itself, with its own keys and values,
in the shapes and under the mask that it would have alone: nothing is padded, and what a session attends to can't depend
on its neighbours. transformers lets a model's attention be replaced by name, and makes no masks for a name that has no
mask function; so no model code is touched.

Shapes: B rows of all sessions together, H heads, D head width.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .kv import StageCache

_NAME = "shardlift_ragged"
_INTERFACE = AttentionInterface()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A session's rows of the batch. attention_mask: as for StepInput; position_ids: int64 [rows, 1].

    cache: where the keys and values are added, part after part. shape: the cache as a mask must fit it.
    """

    cache: StageCache
    shape: Cache
    rows: int
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor


class RaggedCache(Cache):
    """What a model's forward takes as `past_key_values` for a batch of `parts`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(layers=parts[0].cache.cache.layers)
        self._parts = parts
        self._latest: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives the new keys and values back as they are: attention takes each session's own from `latest`."""
        sizes = [part.rows for part in self._parts]
        self._latest = [
            part.cache.cache.update(keys, values, layer_idx, *args, **kwargs)
            for part, keys, values in zip(self._parts, key_states.split(sizes), value_states.split(sizes), strict=True)
        ]
        return key_states, value_states

    def take_latest(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each session's keys and values of the layer that was just updated. Once: no layer may see another's."""
        latest, self._latest = self._latest, []
        return latest


@dataclass(slots=True)
class _Batch:
    """The batch that is being computed, for the attention function, which transformers calls."""

    cache: RaggedCache
    parts: Sequence[Part]
    masks: dict[bool, list[torch.Tensor | None]]
    implementation: str


# One for the process: a stage computes on one thread, and so does each of several stages in one process, in tests.
_batches: dict[int, _Batch] = {}


@contextlib.contextmanager
def ragged_attention(config: PreTrainedConfig, parts: Sequence[Part], like: torch.Tensor) -> Iterator[RaggedCache]:
    """Within it, a forward pass of the model of `config` takes rows of `parts`; gives the cache to pass.

    like: [B, 1, ...] of the hidden states' device and dtype.
    """
    cache = RaggedCache(parts)
    implementation: str = config._attn_implementation
    batch = _Batch(cache=cache, parts=parts, masks=_masks(config, parts, like), implementation=implementation)
    # The modules of a model share its config; the batch is found again by it.
    key = id(config)
    assert key not in _batches
    _batches[key] = batch
    config._attn_implementation_internal = _NAME
    try:
        yield cache
    finally:
        config._attn_implementation_internal = implementation
        del _batches[key]


def _masks(
    config: PreTrainedConfig, parts: Sequence[Part], like: torch.Tensor
) -> dict[bool, list[torch.Tensor | None]]:
    """Each session's mask as the model's own code makes it, for layers without and with a sliding window."""
    masks: dict[bool, list[torch.Tensor | None]] = {}
    for is_sliding in {bool(layer.is_sliding) for layer in parts[0].cache.cache.layers}:
        make = create_sliding_window_causal_mask if is_sliding else create_causal_mask
        masks[is_sliding] = [
            make(
                config=config,
                # Only its extents, dtype and device are looked at.
                inputs_embeds=like.new_empty((part.rows, 1, 0)),
                attention_mask=part.attention_mask,
                past_key_values=part.shape,
                position_ids=part.position_ids,
            )
            for part in parts
        ]
    return masks


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function of the batch: query [B, H, 1, D]; gives [B, 1, H, D]."""
    batch = _batches[id(module.config)]
    default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = _INTERFACE.get_interface(batch.implementation, default)
    is_sliding = bool(batch.parts[0].cache.cache.layers[module.layer_idx].is_sliding)
    positions = kwargs.pop("position_ids", None)
    outputs = []
    first = 0
    latest = batch.cache.take_latest()
    for part, mask, (keys, values) in zip(batch.parts, batch.masks[is_sliding], latest, strict=True):
        own = slice(first, first + part.rows)
        if positions is not None:
            kwargs["position_ids"] = positions[own]
        outputs.append(attend(module, query[own], keys, values, mask, **kwargs)[0])
        first += part.rows
    return torch.cat(outputs), None


AttentionInterface.register(_NAME, _attend)
