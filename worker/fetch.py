"""Tensors' bytes, fetched ahead of their consumer, in its order, under a byte budget."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..proto.v1.errors import InternalError, LoadCancelledError
from .chunks import CHUNK_BYTES, Chunk, plan_chunks
from .records import FileVersion, TensorRecord
from .sources import Cancel, Source
from .staging import Staging
from .timeline import FETCH, Timeline

CONNECTIONS = 4
BUDGET_BYTES = 512 << 20

_JOIN_S = 2.0

TakenT = TypeVar("TakenT")


@dataclass(slots=True, kw_only=True)
class _Held:
    """A chunk that was admitted: where its bytes lie, as far as they are there, and who still waits for them."""

    chunk: Chunk
    place: Any
    missing_parts: int
    untaken: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one thread reads at a time: the bytes [start, end) of a chunk."""

    held: _Held
    start: int
    end: int


def part_bytes(budget_bytes: int, connections: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """What one thread reads at a time, at most: little enough for all connections to work within the budget while the
    consumer holds as much again."""
    return max(1, min(chunk_bytes, budget_bytes // (2 * connections)))


class RecordStream(Generic[TakenT]):
    """Fetches `records` in their order with `connections` threads, and hands each one over once.

    What was fetched or is being fetched, and not taken, stays within `budget_bytes`, with two exceptions that keep the
    stream moving in whatever order the consumer takes: a chunk larger than the budget is held alone, and one that is
    waited for is fetched at once.

    Args:
        staging: where the bytes lie meanwhile, and what `take` gives.
        alone: keys of records that share no chunk: what is taken of them may be kept without keeping others.
        versions: of every file in `records`, as the driver saw them.
        on_progress: called with `fetched_bytes` whenever it has grown, by the threads, one call at a time.
        timeline: gets a span for each read.
    """

    def __init__(
        self,
        source: Source,
        records: Sequence[TensorRecord],
        versions: Mapping[str, FileVersion],
        staging: Staging[Any, TakenT],
        *,
        budget_bytes: int = BUDGET_BYTES,
        connections: int = CONNECTIONS,
        chunk_bytes: int = CHUNK_BYTES,
        max_gap_bytes: int = 0,
        alone: Container[str] = (),
        on_progress: Callable[[int], None] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        assert budget_bytes > 0
        assert connections > 0
        self._part_bytes = part_bytes(budget_bytes, connections, chunk_bytes)
        self._source, self._versions, self._staging = source, versions, staging
        self._timeline = timeline or Timeline()
        self._budget_bytes, self._on_progress = budget_bytes, on_progress
        self._chunks = plan_chunks(records, chunk_bytes=self._part_bytes, max_gap_bytes=max_gap_bytes, alone=alone)
        self._places = {
            record.key: (index, record) for index, chunk in enumerate(self._chunks) for record in chunk.records
        }
        assert len(self._places) == len(records), "a tensor is listed twice"
        assert all(chunk.file in versions for chunk in self._chunks), "a file without a version"

        self._cancel = Cancel()
        self._progress_lock = threading.Lock()
        self._changed = threading.Condition()  # guards everything below
        self._next_chunk = 0
        self._held: dict[int, _Held] = {}
        self._admitted: set[int] = set()
        self._held_bytes = 0
        self._fetched_bytes = 0
        self._parts: deque[_Part] = deque()
        self._error: BaseException | None = None
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._fetch, name=f"shardlift-fetch-{index}", daemon=True)
            for index in range(connections)
        ]

    def __enter__(self) -> RecordStream[TakenT]:
        with self._changed:
            self._admit_ahead()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def fetched_bytes(self) -> int:
        with self._changed:
            return self._fetched_bytes

    @property
    def held_bytes(self) -> int:
        """What counts against the budget now."""
        with self._changed:
            return self._held_bytes

    def take(self, key: str) -> TakenT:
        """The record's bytes, as the staging gives them. Waits for them.

        They are the caller's. They may share their memory with the records beside them, which then stays as long as
        any of them: copy what is to be kept, or have it fetched `alone`.

        Raises:
            InternalError: no such record, or taken before.
            LoadCancelledError: the stream is closed.
            ShardliftError: what the first failed read raised.
        """
        with self._changed:
            self._check()
            if key not in self._places:
                raise InternalError(f"tensor {key!r} is not in this stream, or was taken before")
            index, record = self._places.pop(key)
            if index not in self._admitted:
                self._admit(index, is_urgent=True)
            held = self._held[index]
            while held.missing_parts:
                self._changed.wait()
                self._check()
            place = held.place  # a failed read elsewhere drops it
            held.untaken -= 1
            if not held.untaken:
                del self._held[index]
                self._held_bytes -= held.chunk.size_bytes
                self._admit_ahead()
        return self._staging.take(place, record.start - held.chunk.start, record)

    def close(self) -> None:
        """Give up on what wasn't taken: break off the reads, and wait for the threads, two seconds at most.

        A thread that hangs where nothing can wake it (a disk, a name lookup) ends by itself, and touches nothing then.
        """
        with self._changed:
            self._is_closed = True
            self._drop()
        self._cancel.set()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))

    # -- admission; the caller holds the lock

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._is_closed:
            raise LoadCancelledError("the stream of tensors was closed")

    def _admit_ahead(self) -> None:
        """Admit chunks in order, as far as the budget allows."""
        while self._next_chunk < len(self._chunks):
            if self._next_chunk not in self._admitted:
                size = self._chunks[self._next_chunk].size_bytes
                if self._held_bytes and self._held_bytes + size > self._budget_bytes:
                    return
                self._admit(self._next_chunk)
            self._next_chunk += 1

    def _admit(self, index: int, *, is_urgent: bool = False) -> None:
        chunk = self._chunks[index]
        starts = range(0, chunk.size_bytes, self._part_bytes)
        held = _Held(
            chunk=chunk,
            place=self._staging.allocate(chunk.size_bytes),
            missing_parts=len(starts),
            untaken=len(chunk.records),
        )
        parts = [_Part(held=held, start=start, end=min(start + self._part_bytes, chunk.size_bytes)) for start in starts]
        if is_urgent:
            self._parts.extendleft(reversed(parts))
        else:
            self._parts.extend(parts)
        self._admitted.add(index)
        self._held[index] = held
        self._held_bytes += chunk.size_bytes
        self._changed.notify_all()

    def _drop(self) -> None:
        self._parts.clear()
        for held in self._held.values():
            held.place = None  # an error's traceback may keep `held`
        self._held.clear()
        self._held_bytes = 0
        self._changed.notify_all()

    # -- the threads

    def _fetch(self) -> None:
        try:
            while (part := self._next_part()) is not None:
                self._read(part)
                del part  # it would keep its chunk's bytes while this thread waits for the next
        except BaseException as error:  # whatever it is, the consumer must learn of it
            with self._changed:
                if self._error is None and not self._is_closed:
                    self._error = error
                self._drop()
            self._cancel.set()

    def _read(self, part: _Part) -> None:
        chunk, place, size_bytes = part.held.chunk, part.held.place, part.end - part.start
        if place is None:
            return  # dropped since

        def read(buffer: memoryview) -> None:
            with self._timeline.span(FETCH, chunk.file, size_bytes):
                start = chunk.start + part.start
                self._source.read_into(chunk.file, start, buffer, self._versions[chunk.file], self._cancel)

        self._staging.fill(place, part.start, part.end, read)
        del place  # the taker's from now on
        with self._progress_lock:  # so that reports come in order
            with self._changed:
                self._fetched_bytes += size_bytes
                fetched_bytes = self._fetched_bytes
                part.held.missing_parts -= 1
                if not part.held.missing_parts:
                    self._changed.notify_all()
            if self._on_progress is not None:
                self._on_progress(fetched_bytes)

    def _next_part(self) -> _Part | None:
        with self._changed:
            while True:
                if self._is_closed or self._error is not None:
                    return None
                if self._parts:
                    return self._parts.popleft()
                if len(self._admitted) == len(self._chunks):
                    return None
                self._changed.wait()
