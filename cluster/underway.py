"""How many of a server's calls are under way, for its end to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from ..proto.v1.server import Malformed, abort


class Underway:
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


def counted(method: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], AsyncIterator[Any]]:
    """A method of a service that streams its answers, and has an `underway`: so that the server's end waits for it.

    A request that could not be read is refused here.
    """

    @functools.wraps(method)
    async def counting(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        if isinstance(request, Malformed):
            await abort(context, request.error)
        with self.underway.one():
            # Where the client has gone, the call must end now, not when the generator is collected.
            async with contextlib.aclosing(method(self, request, context)) as responses:
                async for response in responses:
                    yield response

    return counting
