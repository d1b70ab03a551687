"""What one generation took, for the numbers of its stage, its spans and its log line."""

from __future__ import annotations

import logging
import time

from .metrics import ServingNumbers
from .tracing import Span

logger = logging.getLogger(__name__)


class Account:
    """Of a generation that arrived at `arrived_s`, by `time.perf_counter`, and whose turn it is now.

    resumed: it goes on where another worker was lost; its first token has been counted there.
    """

    def __init__(self, numbers: ServingNumbers, span: Span, arrived_s: float, *, resumed: bool) -> None:
        self._numbers = numbers
        self._span = span
        self._arrived_s = arrived_s
        self._begun_s = time.perf_counter()
        self._resumed = resumed
        self._first_s = self._last_s = 0.0
        self._steps = 0

    def prompt(self, tokens: int) -> None:
        if not self._resumed:
            self._numbers.prompt_tokens += tokens
        self._span.note(prompt_tokens=tokens, resumed=self._resumed)

    def step(self) -> None:
        """A step's tokens are there."""
        self._last_s = time.perf_counter()
        self._steps += 1
        if self._steps == 1:
            self._first_s = self._last_s
            if not self._resumed:
                self._numbers.first_token_s.append(self._first_s - self._arrived_s)

    def end(self, outcome: str) -> None:
        """It is over: "stop", "length", "cancelled" or "failed"."""
        self._numbers.generations[outcome] += 1
        decode_s = self._last_s - self._first_s
        if self._steps > 1:
            self._numbers.token_s.append(decode_s / (self._steps - 1))
        if self._steps:
            self._span.past("prefill", self._begun_s, self._first_s)
            self._span.past("decode", self._first_s, self._last_s, steps=self._steps)
        self._span.note(outcome=outcome, steps=self._steps)
        logger.debug(
            "a generation ended (%s): %d steps, the first after %.3f s, the others in %.3f s",
            outcome,
            self._steps,
            self._first_s - self._arrived_s if self._steps else 0.0,
            decode_s,
        )
