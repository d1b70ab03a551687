"""What a load spends its time on: totals by phase always, single spans where a trace is wanted. Pure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Each is some 150 bytes of a trace, and a worker of a very large model makes a few million; those beyond are counted.
MAX_SPANS = 50_000

# The phases of a load. Those of the loading thread add up to its time; "fetch" runs beside it, in threads of its own.
FETCH = "fetch"  # a range read from the source
BUILD = "build"  # the model's modules, without weights
WAIT = "wait"  # for bytes that aren't there yet
CAST = "cast"  # to the model's dtype
COPY = "copy"  # host to device, as far as the loading thread waits for it
QUANTIZE = "quantize"
CONVERT = "convert"  # the rest of turning tensors into weights: merging experts, transposing, assigning
STORE = "store"  # into the node's cache of quantized parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`seconds`: summed over the threads that were in it; `bytes_`: what went through it."""

    name: str
    seconds: float
    bytes_: int
    count: int
    # From its first beginning to its last end, by `time.perf_counter`; 0 where only sums are known.
    start_s: float = 0.0
    end_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    phase: str
    label: str
    thread: str
    start_ns: int  # of the system's clock, so that workers on several nodes can be laid side by side
    duration_ns: int
    bytes_: int


class Timeline:
    """Safe to use from several threads. `keep_spans`: beside the totals, each span by itself."""

    def __init__(self, *, keep_spans: bool = False) -> None:
        self._lock = threading.Lock()
        self._keep_spans = keep_spans
        self._totals: dict[str, tuple[int, int, int]] = {}
        self._bounds_ns: dict[str, tuple[int, int]] = {}
        self._spans: list[Span] = []
        self._dropped = 0
        # Durations by the steady clock; starts shifted by a constant, so that an adjusted clock bends nothing.
        self._shift_ns = time.time_ns() - time.perf_counter_ns()

    @property
    def keeps_spans(self) -> bool:
        return self._keep_spans

    @contextmanager
    def span(self, phase: str, label: str = "", bytes_: int = 0) -> Iterator[None]:
        """Counts what is done in the context, also when it fails."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(phase, label, start_ns, time.perf_counter_ns(), bytes_)

    def add(self, phase: str, label: str, start_ns: int, end_ns: int, bytes_: int = 0) -> None:
        """A span between two readings of `time.perf_counter_ns`."""
        with self._lock:
            nanoseconds, total_bytes, count = self._totals.get(phase, (0, 0, 0))
            self._totals[phase] = (nanoseconds + end_ns - start_ns, total_bytes + bytes_, count + 1)
            first_ns, last_ns = self._bounds_ns.get(phase, (start_ns, end_ns))
            self._bounds_ns[phase] = (min(first_ns, start_ns), max(last_ns, end_ns))
            if not self._keep_spans:
                return
            if len(self._spans) >= MAX_SPANS:
                self._dropped += 1
                return
            self._spans.append(
                Span(
                    phase=phase,
                    label=label,
                    thread=threading.current_thread().name,
                    start_ns=start_ns + self._shift_ns,
                    duration_ns=end_ns - start_ns,
                    bytes_=bytes_,
                )
            )

    def count(self, phase: str, seconds: float) -> None:
        """Time that is known only as a sum: it shows in no trace."""
        with self._lock:
            nanoseconds, total_bytes, count = self._totals.get(phase, (0, 0, 0))
            self._totals[phase] = (nanoseconds + round(seconds * 1e9), total_bytes, count)

    def seconds(self, *phases: str) -> float:
        with self._lock:
            return sum(self._totals.get(phase, (0, 0, 0))[0] for phase in phases) / 1e9

    def phases(self) -> tuple[Phase, ...]:
        """The totals so far, the longest first."""
        with self._lock:
            found = []
            for name, (nanoseconds, total, count) in self._totals.items():
                start_ns, end_ns = self._bounds_ns.get(name, (0, 0))
                found.append(
                    Phase(
                        name=name,
                        seconds=nanoseconds / 1e9,
                        bytes_=total,
                        count=count,
                        start_s=start_ns / 1e9,
                        end_s=end_ns / 1e9,
                    )
                )
        return tuple(sorted(found, key=lambda phase: (-phase.seconds, phase.name)))

    def spans(self) -> tuple[list[Span], int]:
        """The spans kept, and how many were dropped."""
        with self._lock:
            return list(self._spans), self._dropped


def trace_events(spans: list[Span], *, process: int, name: str, dropped: int = 0) -> list[dict[str, Any]]:
    """The spans as events of Chrome's trace format: `process` is the stage, each thread a row, times in microseconds.

    Source: Trace Event Format (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
    """
    threads = {thread: index for index, thread in enumerate(dict.fromkeys(span.thread for span in spans))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}},
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": process, "tid": index, "args": {"name": thread}}
        for thread, index in threads.items()
    ]
    if dropped:
        events.append({"ph": "M", "name": "process_labels", "pid": process, "tid": 0,
                       "args": {"labels": f"{dropped} spans beyond {MAX_SPANS} left out"}})  # fmt: skip
    for span in spans:
        args: Mapping[str, Any] = {"tensor": span.label, "bytes": span.bytes_}
        events.append(
            {
                "ph": "X",
                "name": span.phase,
                "cat": span.phase,
                "pid": process,
                "tid": threads[span.thread],
                "ts": span.start_ns / 1000,
                "dur": span.duration_ns / 1000,
                "args": {key: value for key, value in args.items() if value},
            }
        )
    return events


def bottleneck(phases: tuple[Phase, ...]) -> str:
    """The phase that kept a load from being shorter.

    Where the loading thread waited for bytes, the slower of what brings them: reads, or copies to the device.
    """
    seconds = {phase.name: phase.seconds for phase in phases}
    own = {name: spent for name, spent in seconds.items() if name not in (FETCH, COPY)}
    longest = max(own, key=lambda name: (own[name], name), default=BUILD)
    if longest != WAIT:
        return longest
    return COPY if seconds.get(COPY, 0.0) > seconds.get(FETCH, 0.0) else FETCH
