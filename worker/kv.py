"""A session's keys and values on one stage."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..proto.v1.errors import UnsupportedModelError
from .anatomy import Cut


class _ElsewhereLayer(DynamicLayer):
    """A full-attention layer of another stage: it knows its length, and holds nothing.

    transformers takes a mask's size from whichever layer comes first of its kind, on this stage or not; an empty
    one there gives masks that look right for a single token and are wrong for chunks and padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        pass


class _ElsewhereSlidingLayer(DynamicSlidingWindowLayer):
    """The same for a layer with a sliding window."""

    def advance(self, tokens: int) -> None:
        self.cumulative_length += tokens

    def crop(self, tokens_to_remove: int) -> None:
        self.cumulative_length -= abs(tokens_to_remove)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        pass


class _ElsewhereLinearLayer(LinearAttentionLayer):
    """The same for a layer that keeps states in place of keys and values: it has no length, only a past or none."""

    def advance(self, tokens: int) -> None:
        self.has_previous_state: dict[int, bool] = dict.fromkeys(range(self.number_of_states), True)


class _ElsewhereNothing(DummyLayer):
    """The same for a layer that keeps nothing anywhere."""

    def advance(self, tokens: int) -> None:
        pass


class _StateLayer(_ElsewhereLayer):
    """A layer that keeps a state and no keys, on this stage or another, in a cache whose model takes lengths from the
    first layer whatever its kind: it counts what went by, as a layer with keys would."""

    state: torch.Tensor | None = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state[indices]


@functools.cache
def _minimax_cache() -> type[DynamicCache]:
    """MiniMax takes no cache but its own, whose states lie beside the layers: here in them, as all else does."""
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class Cache(MiniMaxCache):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__()
            self.layers = [
                _StateLayer() if kind == "linear_attention" else DynamicLayer() for kind in config.layer_types
            ]

        def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
            state: torch.Tensor | None = self.layers[layer_idx].state
            return state

        def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
            self.layers[layer_idx].state = linear_cache

    return Cache


def _new_cache(config: PreTrainedConfig) -> DynamicCache:
    return _minimax_cache()(config) if config.model_type == "minimax" else DynamicCache(config=config)


class StageCache:
    """`cache` is what a model's forward takes as `past_key_values`; call `advance` after each forward."""

    def __init__(self, config: PreTrainedConfig, cut: Cut) -> None:
        self._config = config.get_text_config(decoder=True)
        self.cache = _new_cache(self._config)
        assert len(self.cache.layers) == cut.num_layers, (len(self.cache.layers), cut.num_layers)
        self._elsewhere: list[Any] = []
        for index, layer in enumerate(self.cache.layers):
            if cut.first <= index < cut.end:
                continue
            self._elsewhere.append(_elsewhere(layer))
            self.cache.layers[index] = self._elsewhere[-1]
        # Keys tell their number; the others must be told of each token.
        self._counting = [*self._elsewhere, *(layer for layer in self.held if isinstance(layer, _StateLayer))]
        self.length = 0

    def shape_after(self, tokens: int) -> DynamicCache:
        """What the cache will look like to whoever makes a mask, `tokens` positions from now. Holds nothing."""
        cache = _new_cache(self._config)
        cache.layers = [_elsewhere(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.advance(self.length + tokens)
        return cache

    def advance(self, tokens: int) -> None:
        """Notes that `tokens` positions went through the model."""
        self.length += tokens
        for layer in self._counting:
            layer.advance(tokens)

    def keep(self, length: int) -> None:
        """Forgets all positions but the first `length`; only where `can_keep` says so."""
        assert self.can_keep(length)
        if length < self.length:
            for layer in self.cache.layers:
                layer.crop(length - self.length)
            self.length = length

    def can_keep(self, length: int) -> bool:
        """Whether `keep` is possible. A window that has moved on has lost what it would have to hold again, and a state
        what it was.

        The same on every stage: layers of other stages count too.
        """
        if length >= self.length:
            return True
        if any(isinstance(layer, (LinearAttentionLayer, _StateLayer)) for layer in self.cache.layers):
            return False
        windows = [layer.sliding_window for layer in self.cache.layers if getattr(layer, "is_sliding", False)]
        return self.length < min(windows, default=self.length + 1)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(rows)
            elif isinstance(layer, _StateLayer) or layer.is_initialized or layer in self._elsewhere:
                layer.batch_select_indices(rows)

    @property
    def held(self) -> list[Any]:
        """This stage's own layers of the cache."""
        return [layer for layer in self.cache.layers if layer not in self._elsewhere]

    @property
    def size_bytes(self) -> int:
        """Device bytes of keys, values and states, counted by storage: a window keeps what it is a view of."""
        storages = {}
        for layer in self.cache.layers:
            kept = [getattr(layer, "keys", None), getattr(layer, "values", None)]
            if isinstance(layer, _StateLayer):
                kept.append(layer.state)
            if isinstance(layer, LinearAttentionLayer):
                kept += [*layer.conv_states.values(), *layer.recurrent_states.values()]
            for tensor in kept:
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def _elsewhere(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return _ElsewhereLayer()
    if type(layer) is _StateLayer:
        return _StateLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return _ElsewhereSlidingLayer(sliding_window=layer.sliding_window)
    if type(layer) is LinearAttentionLayer:
        return _ElsewhereLinearLayer(number_of_states=layer.number_of_states)
    if type(layer) is DummyLayer:
        return _ElsewhereNothing()
    raise UnsupportedModelError(f"a pipeline can't yet keep a cache layer of kind {type(layer).__name__}")
