"""A loaded stage tried out on made-up inputs: what it can do as a batch, and what depends on shapes there.

A family whose attention is not where `worker.ragged` looks for it, or whose rotary frequencies depend on the longest
sequence of a batch, is found by what comes out, not by its name.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ..proto.v1.errors import one_line
from .kv import StageCache
from .rounding import mixing
from .stage import ResidentStage, StepInput

logger = logging.getLogger(__name__)

_LENGTHS = (3, 7)
_STEPS = 3
# More than go together, and a rest.
_SINGLES = 35
# Batches round differently; what is wrong is wrong by as much as the values themselves.
_TOLERANCE = 0.05


def try_batches(stage: ResidentStage) -> None:
    """Sets `stage.can_batch` and `stage.is_row_blind`. To be called on the thread that computes."""
    stage.can_batch = stage.is_row_blind = False
    if depends_on_the_longest(stage) or _attends_in_chunks(stage):
        return
    is_equal = True
    try:
        with mixing(stage.model) as mixed:
            _, alone_caches = _sessions(stage)
        if mixed:
            raise ArithmeticError(f"{mixed[0]} rounds a token by what others come with it")
        _, caches = _sessions(stage)
        for step in range(_STEPS):
            inputs = [_input(stage, length + step, seed=step) for length in _LENGTHS]
            expected = [stage.forward(one, cache, 1) for one, cache in zip(inputs, alone_caches, strict=True)]
            stage.can_batch = True  # for what is tried here
            got = stage.forward_rows(inputs, caches)
            for ours, theirs in zip(got, expected, strict=True):
                scale = float(theirs.abs().max())
                if not float((ours - theirs).abs().max()) <= _TOLERANCE * scale:
                    raise ArithmeticError("a batch gives other values than each session alone")
                is_equal = is_equal and torch.equal(ours, theirs)
        stage.is_row_blind = is_equal and _is_same_together(stage)
    except Exception as error:
        stage.can_batch = stage.is_row_blind = False
        logger.info("sessions on this stage are computed one by one: %s", one_line(error))


def depends_on_the_longest(stage: ResidentStage) -> bool:
    """Whether rotary frequencies hang on the longest sequence of a batch, or change as a sequence grows."""
    config = stage.model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _attends_in_chunks(stage: ResidentStage) -> bool:
    """Whether some layers see what lies in a token's own chunk: to the cache that is a window, to the mask it isn't."""
    kinds = getattr(stage.model.config.get_text_config(decoder=True), "layer_types", None)
    return "chunked_attention" in (kinds or ())


def _sessions(stage: ResidentStage) -> tuple[list[torch.Tensor], list[StageCache]]:
    caches = [stage.new_cache() for _ in _LENGTHS]
    outputs = [
        stage.forward(_input(stage, 0, seed=10 + length, tokens=length), cache, 1)
        for length, cache in zip(_LENGTHS, caches, strict=True)
    ]
    return outputs, caches


def _is_same_together(stage: ResidentStage) -> bool:
    """Whether tokens that are made again together come out as they did one by one."""
    found = []
    for together in (True, False):
        cache = stage.new_cache()
        stage.forward(_input(stage, 0, seed=1, tokens=_LENGTHS[0]), cache, 1)
        stage.is_row_blind = together  # for what is tried here
        again = replace(_input(stage, _LENGTHS[0], seed=2, tokens=_SINGLES), one_by_one=True)
        output = stage.forward(again, cache, 1)
        found.append([output, *(each for layer in cache.held for each in (layer.keys, layer.values))])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def _input(stage: ResidentStage, past: int, *, seed: int, tokens: int = 1) -> StepInput:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(past, past + tokens)[None]
    if stage.cut.is_first:
        made = torch.randint(0, stage.vocabulary, (1, tokens), generator=generator)
    else:
        width = stage.model.config.get_text_config(decoder=True).hidden_size
        made = torch.randn((1, tokens, width), generator=generator).to(stage.dtype)
    return StepInput(input=made, attention_mask=None, position_ids=positions)
