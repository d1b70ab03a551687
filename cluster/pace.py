"""How fast a stage loads, and how long it will take, from what it said in the last seconds. Pure."""

from __future__ import annotations

from collections import deque

from ..proto.v1 import registry_pb2
from ..worker.spec import LoadSnapshot

_WINDOW_S = 4.0


class Pace:
    """One stage's load, as its snapshots come in."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()  # when, fetched, converted

    def progress(self, stage: int, snapshot: LoadSnapshot, now_s: float) -> registry_pb2.StageProgress:
        """The event for a snapshot taken at `now_s`, by a clock that never goes back."""
        if self._seen and snapshot.loaded_bytes < self._seen[-1][2]:
            self._seen.clear()  # begun anew, by another worker
        self._seen.append((now_s, snapshot.fetched_bytes, snapshot.loaded_bytes))
        while len(self._seen) > 2 and self._seen[0][0] < now_s - _WINDOW_S:
            self._seen.popleft()
        then_s, fetched, loaded = self._seen[0]
        elapsed_s = now_s - then_s
        fetching = (snapshot.fetched_bytes - fetched) / elapsed_s if elapsed_s > 0 else 0.0
        loading = (snapshot.loaded_bytes - loaded) / elapsed_s if elapsed_s > 0 else 0.0
        return registry_pb2.StageProgress(
            stage=stage,
            fetched_bytes=snapshot.fetched_bytes,
            fetch_bytes=snapshot.total_bytes,
            tensors_loaded=snapshot.tensors_loaded,
            tensors=snapshot.tensors,
            bytes_per_second=max(0.0, fetching),
            seconds_left=(snapshot.total_bytes - snapshot.loaded_bytes) / loading if loading > 0 else 0.0,
            cached=snapshot.is_cached,
        )
