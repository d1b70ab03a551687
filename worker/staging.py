"""Where fetched bytes lie until they are taken: here, in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from .records import DTYPES, TensorRecord

_ALIGNMENT = 64

PlaceT = TypeVar("PlaceT")
TakenT_co = TypeVar("TakenT_co", covariant=True)


class Staging(Protocol[PlaceT, TakenT_co]):
    """Memory for chunks. `fill` is called by several threads at once, the rest by one at a time."""

    def allocate(self, size_bytes: int) -> PlaceT:
        """A place for a chunk."""
        ...

    def fill(self, place: PlaceT, start: int, end: int, read: Callable[[memoryview], None]) -> None:
        """Have `read` fill a buffer of `end - start` bytes, and see to it that they get to `start` of the place."""
        ...

    def take(self, place: PlaceT, offset: int, record: TensorRecord) -> TakenT_co:
        """The record's bytes at `offset` of a place that is full: the taker's, which keep the place as long as they
        live."""
        ...


class HostStaging:
    """Bytes as they are read, without a copy, at an address fit for their dtype."""

    def allocate(self, size_bytes: int) -> memoryview:
        # Not zeroed; from an address that is a multiple of 64.
        block = np.empty(size_bytes + _ALIGNMENT, np.uint8)
        offset = -block.ctypes.data % _ALIGNMENT
        return block[offset : offset + size_bytes].data

    def fill(self, place: memoryview, start: int, end: int, read: Callable[[memoryview], None]) -> None:
        read(place[start:end])

    def take(self, place: memoryview, offset: int, record: TensorRecord) -> memoryview:
        view = place[offset : offset + record.size_bytes]
        if offset % (DTYPES[record.dtype][1] // 8) == 0:
            return view
        copy = self.allocate(len(view))
        copy[:] = view
        return copy
