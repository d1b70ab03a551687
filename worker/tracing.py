"""OpenTelemetry spans, where they are configured: by the environment, as every OpenTelemetry SDK is.

Without OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) nothing of OpenTelemetry is imported, and a span is one
object that does nothing. Spans are handed on explicitly, as W3C `traceparent`: what runs in generators, on threads and
in other processes has no context in common.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType
from typing import Any

from ..proto.v1.errors import one_line

logger = logging.getLogger(__name__)

# The header of a gRPC call that carries it.
TRACEPARENT = "traceparent"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_S = 2.0

_provider: Any = None
_tracer: Any = None


class Span:
    """A span, or nothing. A context manager: leaving it ends it, with what was raised."""

    __slots__ = ("_span",)

    def __init__(self, span: Any = None) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What makes another span its child; "" where spans are off."""
        if self._span is None:
            return ""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def child(self, name: str, **attributes: Any) -> Span:
        return self if self._span is None else span(name, self.traceparent, **attributes)

    def note(self, **attributes: Any) -> None:
        """Adds attributes, under "shardlift."."""
        if self._span is not None:
            self._span.set_attributes({f"shardlift.{name}": value for name, value in attributes.items()})

    def past(self, name: str, start_s: float, end_s: float, **attributes: Any) -> None:
        """A child that is over: between two readings of `time.perf_counter`."""
        if self._span is None:
            return
        shift_ns = time.time_ns() - time.perf_counter_ns()
        child = _start(name, self.traceparent, attributes, start_time=round(start_s * 1e9) + shift_ns)
        child.end(end_time=round(end_s * 1e9) + shift_ns)

    def end(self, error: BaseException | None = None) -> None:
        if self._span is None:
            return
        # A generator that is closed, or a task that is cancelled, was left on purpose.
        if isinstance(error, Exception):
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, one_line(error))
            self._span.set_attribute("error.type", type(error).__name__)
        self._span.end()

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)


OFF = Span()


def span(name: str, parent: str = "", **attributes: Any) -> Span:
    """A span that begins now. parent: a `traceparent`, which may be from outside and nonsense; without one it is the
    first of its trace."""
    return OFF if _tracer is None else Span(_start(name, parent, attributes))


def given(metadata: Any) -> str:
    """The `traceparent` among a call's headers; "" where there is none, or spans are off."""
    return "" if _tracer is None else str(dict(metadata or ()).get(TRACEPARENT, ""))


def configure(service: str, **attributes: str) -> bool:
    """Has spans exported over OTLP if the environment says where to; whether they are. attributes: of the process."""
    global _provider, _tracer  # noqa: PLW0603 - a process exports, or it doesn't
    if _tracer is not None or not any(os.environ.get(name) for name in _ENDPOINTS):
        return _tracer is not None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no spans are exported, though the environment asks: %s; install shardlift[otel]", error)
        return False
    named = {f"shardlift.{name}": value for name, value in attributes.items()}
    # Resource.create reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which count more than our name.
    found = Resource.create()
    if str(found.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        found = found.merge(Resource({"service.name": service}))
    # Ours alone: Ray, and whoever else is in the process, has its own.
    _provider = TracerProvider(resource=found.merge(Resource(named)))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("shardlift")
    return True


def flush() -> None:
    """Sends what waits. Blocking, for 2 s at most."""
    if _provider is not None:
        # In a thread that may be left behind: the SDK goes on trying a receiver that is not there, whatever its limit.
        sending = threading.Thread(target=_provider.force_flush, name="flush-spans", daemon=True)
        sending.start()
        sending.join(_FLUSH_S)


def _start(name: str, parent: str, attributes: dict[str, Any], **times: int) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({TRACEPARENT: parent}) if parent else None
    named = {f"shardlift.{key}": value for key, value in attributes.items()}
    return _tracer.start_span(name, context=context, attributes=named, **times)
