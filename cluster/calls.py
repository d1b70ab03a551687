"""How many of a server's calls are under way, for its end to wait for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Calls:
    """Counts calls, on one event loop."""

    def __init__(self) -> None:
        self._running = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """For the length of a call."""
        self._running += 1
        self._none.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._none.set()

    async def none(self) -> None:
        """Returns once no call is under way."""
        await self._none.wait()
