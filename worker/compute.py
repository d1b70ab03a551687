"""The one thread on which a stage computes, and whose turn it is.

Three kinds of work wait for it. What frees memory comes at once. Rows are single-token steps: as many sessions' as are
due go together, as one batch. Anything else, a prompt above all, goes by itself, and takes turns with the rows: between
two layers of a long one, the rows that wait are computed (`breathe`). So a long prompt is computed whole, to the same
bits as if it were alone, and still holds nobody up for longer than one layer takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Row = TypeVar("Row")

# What is shorter isn't interrupted.
_BREATH_S = 0.02
# A session that hasn't sent a step for so long takes no part in how rows are grouped.
_ACTIVE_S = 5.0


class SessionOverError(Exception):
    """The session of a piece of work ended while it waited or ran. Nobody waits for its result."""


@dataclass(eq=False)
class _Job:
    session: str
    run: Callable[[], Any]
    future: asyncio.Future[Any]
    breathed: float = 0.0
    over: bool = False


@dataclass(eq=False)
class RowJob(Generic[Row]):
    """A single-token step of `session`. `future` gets what the batch's function gives for it, or its exception.

    kind: only rows of one kind go together.
    """

    session: str
    row: Row
    future: asyncio.Future[Any] = field(repr=False)
    kind: Hashable = ()


class Compute(Generic[Row]):
    """Runs work on a thread of its own, in turns. Everything but `breathe` is called on the event loop.

    run_rows: computes a batch; gives for each row a result, or the exception that it failed with.
    most: how many sessions' rows may go together, if so many sessions are active.
    """

    def __init__(self, run_rows: Callable[[Sequence[Row]], Sequence[Any]], most: Callable[[int], int]) -> None:
        self._run_rows = run_rows
        self._most = most
        self._wake = threading.Condition()
        self._urgent: deque[Callable[[], None]] = deque()
        self._jobs: deque[_Job] = deque()
        self._rows: deque[RowJob[Row]] = deque()
        # Sessions with a job waiting or running: their rows come after it.
        self._busy: Counter[str] = Counter()
        self._seen: dict[str, float] = {}
        self._running: list[_Job] = []
        self._rows_were_last = False
        self._in_rows = False
        self._closed = False
        self._new_rows: list[RowJob[Row]] = []
        self._thread: threading.Thread | None = None
        self.batches: Counter[int] = Counter()  # how many there were, by their number of rows

    # -- on the event loop -----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def run(self, session: str, function: Callable[[], T]) -> asyncio.Future[T]:
        """Has `function` run in its turn. Its result, or SessionOverError when the session ends before."""
        job = _Job(session, function, asyncio.get_running_loop().create_future())
        with self._wake:
            assert not self._closed
            self._busy[session] += 1
            self._jobs.append(job)
            self._awake()
        return job.future

    def run_row(self, job: RowJob[Row]) -> None:
        """Has a row computed. Those that are given in the same turn of the event loop can go into one batch."""
        if not self._new_rows:
            asyncio.get_running_loop().call_soon(self._flush)
        self._new_rows.append(job)

    def soon(self, function: Callable[[], None]) -> None:
        """Has `function`, which must be quick and not fail, run before anything else."""
        with self._wake:
            if not self._closed:
                self._urgent.append(function)
                self._awake()

    def end(self, session: str) -> None:
        """Drops the session's work: what waits at once, what runs at the next layer."""
        with self._wake:
            for job in [job for job in self._jobs if job.session == session]:
                self._jobs.remove(job)
                self._is_done(job)
                _fail(job.future)
            for row in [row for row in self._rows if row.session == session]:
                self._rows.remove(row)
                _fail(row.future)
            for job in self._running:
                job.over = job.over or job.session == session
            self._seen.pop(session, None)

    def close(self, last: Callable[[], None]) -> None:
        """Drops all work; the thread ends after `last`."""
        with self._wake:
            self._closed = True
            for future in [*(job.future for job in self._jobs), *(row.future for row in self._rows)]:
                _fail(future)
            self._jobs.clear()
            self._rows.clear()
            for job in self._running:
                job.over = True
            self._urgent.append(last)
            self._awake()

    def _flush(self) -> None:
        rows, self._new_rows = self._new_rows, []
        with self._wake:
            if self._closed:
                for row in rows:
                    _fail(row.future)
                return
            now = time.monotonic()
            for row in rows:
                self._seen[row.session] = now
            self._rows.extend(rows)
            self._awake()

    def _awake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
            self._thread.start()
        self._wake.notify()

    # -- on the thread ---------------------------------------------------------------------------------------------

    def breathe(self) -> None:
        """Called by a running job between two layers. Raises SessionOverError when its session has ended."""
        if not self._running or self._in_rows:
            return
        job = self._running[-1]
        if job.over:
            raise SessionOverError
        self._run_urgent()
        if time.monotonic() - job.breathed < _BREATH_S:
            return
        if rows := self._due():
            self._compute(rows)
        job.breathed = time.monotonic()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._urgent or self._jobs or self._rows or self._closed):
                    self._wake.wait()
            self._run_urgent()
            if self._closed:
                return
            rows = self._due() if self._rows and not (self._rows_were_last and self._jobs) else []
            self._rows_were_last = bool(rows)
            if rows:
                self._compute(rows)
            else:
                self._run_next()

    def _run_urgent(self) -> None:
        while self._urgent:
            self._urgent.popleft()()

    def _run_next(self) -> None:
        with self._wake:
            if not self._jobs:
                return
            job = self._jobs.popleft()
            job.breathed = time.monotonic()
            self._running.append(job)
        try:
            result, error = job.run(), None
        except BaseException as raised:
            result, error = None, raised
        with self._wake:
            self._running.pop()
            self._is_done(job)
        _deliver([(job.future, error if error is not None else result)])

    def _due(self) -> list[RowJob[Row]]:
        """Takes the rows that may go now, one of a session and all of a kind, no more than make a fair batch."""
        with self._wake:
            now = time.monotonic()
            active = sum(now - seen < _ACTIVE_S for seen in self._seen.values())
            most = max(1, self._most(active))
            due: dict[str, RowJob[Row]] = {}
            kind: Hashable = None
            for row in self._rows:
                if len(due) == most:
                    break
                if row.session in due or self._busy[row.session] or (due and row.kind != kind):
                    continue
                due[row.session], kind = row, row.kind
            for row in due.values():
                self._rows.remove(row)
            return list(due.values())

    def _compute(self, rows: list[RowJob[Row]]) -> None:
        self.batches[len(rows)] += 1
        self._in_rows = True
        try:
            results = self._run_rows([row.row for row in rows])
        except BaseException as error:
            results = [error] * len(rows)
        finally:
            self._in_rows = False
        _deliver(list(zip((row.future for row in rows), results, strict=True)))

    def _is_done(self, job: _Job) -> None:
        self._busy[job.session] -= 1
        if not self._busy[job.session]:
            del self._busy[job.session]


def _deliver(results: list[tuple[asyncio.Future[Any], Any]]) -> None:
    """Hands results to the event loop, all in one turn of it, so that what follows from them stays together."""

    def deliver() -> None:
        for future, result in results:
            if future.done():
                continue
            if isinstance(result, StopIteration):
                # A future takes any exception but this one.
                future.set_exception(RuntimeError(f"a computation ended with {result!r}"))
            elif isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    # A loop that has ended has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        results[0][0].get_loop().call_soon_threadsafe(deliver)


def _fail(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(SessionOverError())
        future.exception()  # seen, even where nobody waits any more
