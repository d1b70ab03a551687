"""Trying again: how often, and how long to wait in between. One policy for every source."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...proto.v1.errors import SourceError, one_line
from . import answers
from .base import Cancel

ATTEMPTS = 6

_PROGRESS_BYTES = 64 << 10  # whoever breaks off after less than this each time makes no progress
_NETWORK_REMEDY = "check the network and the endpoint, then load again"

# Waits so many seconds; what it returns is ignored. None, where one is taken: a sleep that a `Cancel` ends.
Sleep = Callable[[float], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one attempt didn't bring all bytes, though a later one may."""

    cause: str
    wait_s: float | None = None  # what the server asked for
    is_stale: bool = False  # what was asked has expired: no fault of the network, so the first time ask anew at once
    error: BaseException | None = None  # becomes the cause of the SourceError: its text may hold no secret


class Patience:
    """Counts failures since the last progress, and waits between attempts.

    Args:
        what: is being read, for the error: "bytes 0 to 8 of model.safetensors".
        attempts: that may fail in a row, without progress, before `SourceError`.
    """

    def __init__(
        self,
        what: str,
        attempts: int = ATTEMPTS,
        *,
        sleep: Sleep | None = None,
        cancel: Cancel | None = None,
        remedy: str = _NETWORK_REMEDY,
    ) -> None:
        self._what, self._attempts, self._remedy = what, attempts, remedy
        self._cancel = cancel or Cancel()
        self._sleep: Sleep = self._cancel.wait if sleep is None else sleep
        self._failures = self._gained_bytes = 0

    def check(self, file: str) -> None:
        self._cancel.check(file)

    def gained(self, byte_count: int) -> None:
        self._gained_bytes += byte_count
        if self._gained_bytes >= _PROGRESS_BYTES:
            self._failures = self._gained_bytes = 0

    def failed(self, failure: Failure) -> None:
        """Wait for the next attempt, or raise SourceError when there is none left."""
        self._failures += 1
        if self._failures >= self._attempts:
            raise SourceError(
                f"reading {self._what} failed {self._failures} times in a row, last: {failure.cause}; {self._remedy}"
            ) from failure.error
        wait_s = failure.wait_s
        if wait_s is None:
            at_once = failure.is_stale and self._failures == 1
            wait_s = 0.0 if at_once else answers.backoff_s(self._failures, random.random())
        if wait_s > 0:
            self._sleep(wait_s)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def cause_of(error: BaseException, host: str = "") -> str:
    """The error as a part of one line, without secrets. A host's unknown name is said in words."""
    for each in chain(error):
        if isinstance(each, socket.gaierror):  # httpx doesn't say whose name; aiohttp does
            host = host or next(filter(None, (str(getattr(one, "host", "")) for one in chain(error))), "")
            name = f"the name {host}" if host else "the host's name"
            return f"{name} can't be resolved ({each.strerror or one_line(each, 80)})"
    return answers.redact(f"{type(error).__name__}: {one_line(error, 200)}")
