"""Until when a generation may run. Pure, but for the clock."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from ..proto.v1.errors import DeadlineExceededError, InvalidRequestError, ShardliftError


class _Timer(Protocol):
    def cancel(self) -> None: ...


class Deadline:
    """`timeout_s` seconds from its making; None never passes. Raises InvalidRequestError for what is no time."""

    def __init__(self, timeout_s: float | None, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        if timeout_s is not None and not (
            isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool) and 0 < timeout_s < math.inf
        ):
            raise InvalidRequestError(f"timeout_s is {timeout_s!r}: a number of seconds above 0 is needed")
        self._timeout_s = timeout_s
        self._model = model
        self._clock = clock
        self._until = None if timeout_s is None else clock() + timeout_s

    @property
    def left_s(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - self._clock())

    @property
    def passed(self) -> bool:
        return self._until is not None and self._clock() >= self._until

    @contextlib.contextmanager
    def within(self, start: Callable[[float], _Timer]) -> Iterator[None]:
        """Raises DeadlineExceededError for what fails within it once the time has passed. start: has something end it
        after so many seconds, unless that is cancelled first."""
        if self.left_s is None:
            yield
            return
        timer = start(self.left_s)
        try:
            yield
        except ShardliftError as error:
            if self.passed:
                raise self.error(error) from None
            raise
        finally:
            timer.cancel()

    def error(self, ended: ShardliftError) -> ShardliftError:
        """What to tell of what `ended` it: itself, where there was no time to keep to."""
        if self._timeout_s is None:
            return ended
        return DeadlineExceededError(
            f"model {self._model} was not done in timeout_s={self._timeout_s:g}, and what it held is freed: allow more "
            "time, or ask for fewer tokens"
        )
