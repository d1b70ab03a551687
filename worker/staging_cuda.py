"""Where fetched bytes lie until they are taken: on a GPU, brought there through a few pinned slabs of host memory.

A read fills a slab, which a stream of its own copies to the device while other slabs are being filled; the tensor is on
the device when it is taken. So the host holds the slabs and nothing else, whatever a tensor's size; the budget is the
device's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from .fetch import part_bytes
from .records import DTYPES, TensorRecord
from .timeline import COPY, Timeline


class CudaPlace:
    """A chunk on the device, and the copies that are under way to it."""

    def __init__(self, block: torch.Tensor) -> None:
        self.block = block
        self.copies: list[torch.cuda.Event] = []


class CudaStaging:
    """Chunks on `device`: three quarters of `budget_bytes` for those ahead, the rest for those being quantized.

    Each of `connections` has two slabs: one that it fills, and one that is being copied.
    """

    def __init__(self, device: torch.device, timeline: Timeline, *, budget_bytes: int, connections: int) -> None:
        self._device, self._timeline = device, timeline
        self.stream_bytes = max(1, budget_bytes * 3 // 4)
        self._lag_bytes = max(1, budget_bytes // 4)
        self._copying = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._slab_bytes = part_bytes(self.stream_bytes, connections)
        self._most, self._made = 2 * connections, 0
        self._slabs: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        # What was taken, and whether what the taker then launched has run: (event, bytes) in order.
        self._lagging: deque[tuple[torch.cuda.Event, int]] = deque()
        self._lagging_bytes = 0
        self._taken_bytes = 0

    def allocate(self, size_bytes: int) -> CudaPlace:
        with torch.cuda.device(self._device), torch.cuda.stream(self._copying):
            # Of the copying stream's memory: a block that it is given again has no reader left there.
            return CudaPlace(torch.empty(size_bytes, dtype=torch.uint8, device=self._device))

    def fill(self, place: CudaPlace, start: int, end: int, read: Callable[[memoryview], None]) -> None:
        slab, copied = self._slab()
        try:
            with self._timeline.span(COPY, "", end - start):
                copied.synchronize()  # its last copy: done, unless copies are what is slow
            read(slab.numpy().data[: end - start])
            with torch.cuda.device(self._device), torch.cuda.stream(self._copying):
                place.block[start:end].copy_(slab[: end - start], non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(self._copying)
            with self._lock:
                place.copies.append(copied)
        finally:
            with self._lock:
                self._slabs.append((slab, copied))

    def take(self, place: CudaPlace, offset: int, record: TensorRecord) -> torch.Tensor:
        self._hold_back(record.size_bytes)
        computing = torch.cuda.current_stream(self._device)
        with self._lock:
            copies = list(place.copies)
        for copied in copies:
            computing.wait_event(copied)
        # Read by another stream than its own: it may be given away again only once that has passed.
        place.block.record_stream(computing)
        view = place.block[offset : offset + record.size_bytes]
        return view if offset % (DTYPES[record.dtype][1] // 8) == 0 else view.clone()

    def close(self) -> None:
        """Waits for copies under way, and gives the slabs back."""
        self._copying.synchronize()
        with self._lock:
            self._slabs.clear()
        self._lagging.clear()
        # torch keeps memory for later, of the copying stream for that stream alone; there is no later.
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()

    def _slab(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """One that nobody fills; its event tells when its last copy is done."""
        with self._lock:
            # As many threads fill as there are connections, so half of the slabs are here.
            if self._slabs and (self._made == self._most or self._slabs[0][1].query()):
                return self._slabs.popleft()
            self._made += 1
        return torch.empty(self._slab_bytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()

    def _hold_back(self, size_bytes: int) -> None:
        """Keeps the taker from running ahead of the device: what waits to be quantized takes memory there."""
        launched = torch.cuda.Event()
        launched.record(torch.cuda.current_stream(self._device))
        self._lagging.append((launched, self._taken_bytes))  # what was taken last has been launched by now
        self._lagging_bytes += self._taken_bytes
        self._taken_bytes = size_bytes
        while self._lagging and (self._lagging_bytes > self._lag_bytes or self._lagging[0][0].query()):
            event, passed = self._lagging.popleft()
            event.synchronize()
            self._lagging_bytes -= passed
