"""How long a client goes on trying when its gateway is gone. Pure, but for the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

# For a stream whose gateway is lost: as long as a restart takes, and then some.
RETRY_S = 30.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class Patience:
    """Pauses between attempts, each twice the one before, until `retry_s` have passed without a sign of life."""

    def __init__(self, retry_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry_s = retry_s
        self._clock = clock
        self._pause_s = _FIRST_PAUSE_S
        self._until: float | None = None

    def heard(self) -> None:
        """Somebody answered: what is lost from here on is lost anew."""
        self._until = None
        self._pause_s = _FIRST_PAUSE_S

    @property
    def left_s(self) -> float:
        """For how long to go on, from the first loss."""
        if self._until is None:
            self._until = self._clock() + self._retry_s
        return max(0.0, self._until - self._clock())

    def within(self, limit_s: float | None) -> Patience:
        """What is left of it, and no more than `limit_s`."""
        return Patience(self.left_s if limit_s is None else min(self.left_s, limit_s), self._clock)

    def pause_s(self) -> float | None:
        """How long to wait before the next attempt; None: give up."""
        left_s = self.left_s
        if left_s <= 0:
            return None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return min(pause_s, left_s)
