"""A generation's steps put together as transformers' `generate` returns them, and told to its streamer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..proto.v1 import inference_pb2
from . import tensors
from .answer import Step

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request, and the form in which its answer is wanted. draws: from torch's global generator."""

    request: inference_pb2.GenerateRequest
    as_dict: bool
    draws: bool = False

    @property
    def prompt(self) -> torch.Tensor:
        """The ids sent: int64 [batch, length]."""
        return tensors.ids_to_torch(self.request.input_ids)


class Collected:
    """The answer to `wanted` so far. `start` when the prompt is accepted, `add` each step, `end` whatever happens."""

    def __init__(self, wanted: Wanted, streamer: BaseStreamer | None, before: torch.Tensor | None = None) -> None:
        """`before`: ids that come before the prompt in the result [rows, length]; they are not streamed."""
        self._wanted = wanted
        self._streamer = streamer
        self._before = before
        self._prompt = wanted.prompt
        self._steps: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []

    def start(self, batch: int) -> None:
        # num_return_sequences repeats each row, as transformers does.
        self._prompt = self._prompt.repeat_interleave(max(1, batch // max(1, len(self._prompt))), dim=0)
        if self._streamer is not None:
            self._streamer.put(self._prompt)

    def add(self, step: Step) -> None:
        if not step.token_ids:
            return
        tokens = torch.tensor(step.token_ids, dtype=torch.long)
        self._steps.append(tokens)
        if step.logits is not None:
            self._logits.append(tensors.to_torch(step.logits))
        if step.scores is not None:
            self._scores.append(tensors.to_torch(step.scores))
        if self._streamer is not None:
            self._streamer.put(tokens)

    def end(self) -> None:
        """Also on failure: whoever reads from the streamer must not wait for ever."""
        if self._streamer is not None:
            self._streamer.end()

    @property
    def new_ids(self) -> torch.Tensor:
        """What was generated: int64 [rows, new]."""
        empty = torch.empty((len(self._prompt), 0), dtype=torch.long)
        return torch.stack(self._steps, dim=1) if self._steps else empty

    @property
    def result(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        parts = [self._prompt, self.new_ids] if self._before is None else [self._before, self._prompt, self.new_ids]
        sequences = torch.cat(parts, dim=1)
        if not self._wanted.as_dict:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(self._scores) if self._wanted.request.output_scores else None,
            logits=tuple(self._logits) if self._wanted.request.output_logits else None,
        )
