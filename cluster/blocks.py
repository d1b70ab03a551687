"""What any run of layers weighs, and how far a run may go: the model as the partition sees it. Pure, exact integers.

A block is the layers between two legal cuts: the partition moves whole blocks, and every boundary of theirs is legal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from .sizes import ModelSizes

# More than any device holds; an int64 has room for two of it.
TOO_MUCH = 1 << 61


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Bytes of runs of blocks `[first, end)`, by sums over the blocks before each.

    each: what every run weighs beside its blocks; first, last: what the first and the last one do, too; tied: what the
    last one does where it is not the first.
    """

    before: tuple[int, ...]
    each: int
    first: int
    last: int
    tied: int

    def run(self, first: int, end: int) -> int:
        total = self.before[end] - self.before[first] + self.each
        if first == 0:
            total += self.first
        if end == len(self.before) - 1:
            total += self.last + (self.tied if first else 0)
        return total

    def reach(self, first: int, limit: int) -> int:
        """The furthest end of a run from `first` that weighs no more than `limit`; `first` where there is none."""
        count = len(self.before) - 1
        room = limit - self.each - (self.first if first == 0 else 0) + self.before[first]
        end = bisect_right(self.before, room) - 1
        if end >= count:
            end = count if self.run(first, count) <= limit else count - 1
        return max(end, first)

    def reaches(self, limits: Sequence[int]) -> NDArray[np.int64]:
        """`[i, first]` -> `reach(first, limits[i])`, for many limits at once."""
        count = len(self.before) - 1
        before = np.array(self.before, dtype=np.int64)
        limit = np.array([min(limit, TOO_MUCH) for limit in limits], dtype=np.int64)[:, None]
        extra = np.full(count, self.each, dtype=np.int64)
        extra[0] += self.first
        ends = np.searchsorted(before, limit - extra + before[:-1], side="right") - 1
        to_end = np.array([self.run(first, count) for first in range(count)], dtype=np.int64)
        ends = np.where(ends >= count, count - (to_end > limit), ends)
        reached: NDArray[np.int64] = np.maximum(ends, np.arange(count))
        return reached

    def table(self) -> NDArray[np.int64]:
        """`[first, end - 1]` -> bytes; TOO_MUCH where there is no such run."""
        count = len(self.before) - 1
        table = np.full((count, count), TOO_MUCH, dtype=np.int64)
        for first in range(count):
            for end in range(first + 1, count + 1):
                table[first, end - 1] = self.run(first, end)
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A model as runs of blocks.

    edges: the layer that each block begins with, and the number of layers. resident: bytes of weights, which decide
    how long a stage takes. needed: those and workspace and reserved keys and values, which must fit into a device.
    """

    edges: tuple[int, ...]
    resident: Tally
    needed: Tally

    @property
    def count(self) -> int:
        return len(self.edges) - 1

    def reach(self, first: int, limit_bytes: int, capacity_bytes: int) -> int:
        """The furthest end of a run from `first` with no more than `limit_bytes` of weights that fits into
        `capacity_bytes`; `first` where there is none."""
        return min(self.resident.reach(first, limit_bytes), self.needed.reach(first, capacity_bytes))

    def layers(self, first: int, end: int) -> tuple[int, int]:
        """Layers `[first, end)` of a run of blocks."""
        return self.edges[first], self.edges[end]


def into_blocks(sizes: ModelSizes, reserve_tokens: int = 0) -> Blocks:
    """The blocks of a model of which each layer keeps keys and values for `reserve_tokens` tokens."""
    layers = len(sizes.layers)
    edges = (*(layer for layer in range(layers) if sizes.may_begin(layer)), layers)
    # Petabytes fit nowhere, however many they are; so no sum of parts leaves an int64.
    most = TOO_MUCH // (layers + 4)

    def tally(layer_bytes: Callable[[int], int], each: int) -> Tally:
        before = list(accumulate((min(layer_bytes(layer), most) for layer in range(layers)), initial=0))
        return Tally(
            before=tuple(before[edge] for edge in edges),
            each=min(each, most),
            first=min(sizes.first[0], most),
            last=min(sizes.last[0], most),
            tied=min(sizes.tied[0], most),
        )

    return Blocks(
        edges=edges,
        resident=tally(lambda layer: sizes.layers[layer][0], sizes.shared[0]),
        needed=tally(
            lambda layer: sizes.layers[layer][0] + sizes.kv_bytes(layer, layer + 1, reserve_tokens),
            sizes.shared[0] + sizes.workspace_bytes,
        ),
    )
