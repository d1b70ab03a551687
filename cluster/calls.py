"""A call to the gateway from its beginning to its end: counted, traced, and told of where it was refused."""

from __future__ import annotations

import logging

import grpc
import grpc.aio

from ..proto.v1.errors import ModelBusyError, OutOfMemoryError, one_line
from ..proto.v1.status import to_error
from ..worker import tracing
from .registry import Registry

logger = logging.getLogger(__name__)


class Call:
    """The first end that it is told of is the one that counts."""

    def __init__(self, registry: Registry, method: str, model: str, context: grpc.aio.ServicerContext) -> None:
        self._registry = registry
        self._method = method
        self.model = model
        # A name that nobody loaded is anybody's: it labels nothing.
        self._model = model if registry.has(model) else ""
        self.span = tracing.span(method, tracing.given(context.invocation_metadata()))
        self._ended = False

    def end(self, error: Exception | None = None) -> None:
        """It was answered to its end, or failed."""
        if error is None:
            self._end("ok", None)
        elif isinstance(error, grpc.aio.AioRpcError):
            self._end(error.code().name.lower(), error)
        else:
            ours = to_error(error)
            self._end(type(ours).__name__, ours)
            if isinstance(ours, (ModelBusyError, OutOfMemoryError)):
                self._registry.events.record("refused", one_line(ours), model=self._model, merge=True)

    def left(self) -> None:
        """Nobody waits for it any more. After `end`, this means nothing."""
        self._end("cancelled", None)

    def _end(self, outcome: str, error: Exception | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._registry.numbers.requests[self._model, self._method, outcome] += 1
        self.span.note(outcome=outcome)
        self.span.end(error)
        logger.debug("%s ended: %s", self._method, outcome)
