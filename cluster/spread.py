"""The best cut of all that keep to given limits: few crossings, few idle devices, even, early. Pure, exact integers.

A dynamic program from the last device to the first. For each it tells what the blocks from any one on cost when this
device takes the first run of them; then a walk from the first block on takes, stage by stage, the earliest end that is
still the best. What is known of the later devices is kept apart for each node, since a stage on the same node comes
without a crossing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .blocks import TOO_MUCH, Blocks
from .devices import Device
from .slowest import Choice

# An unreachable state. Sums of it with any cost, of which the largest is below _MOST_COST, stay apart from all costs.
_NO_WAY = 1 << 61
_MOST_COST = 1 << 59
# How finely devices are told apart for evenness: the fastest and largest one weighs so much, none more than the most.
_WEIGHT = 1 << 8
_MOST_WEIGHT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """How uneven a stage makes a cut: its time, times how full it makes its device.

    The sum is smallest where stages are equal on equal devices, and larger on faster and roomier ones. With bytes in
    units of `2**shift` and a weight for each device it is an integer of bounded size: a little rounded, the same
    everywhere. It chooses between cuts that are equally fast; what decides on speed and memory is never rounded.
    """

    shift: int
    weights: tuple[int, ...]


def evenness(devices: Sequence[Device], limits: Sequence[int], most: int) -> Evenness:
    """The finest measure by which no stage within `limits` counts for more than `most`."""
    worth = [device.speed * device.capacity_bytes for device in devices]
    best = max(worth)
    weights = [min(_WEIGHT * best // each, _MOST_WEIGHT) if each else _MOST_WEIGHT for each in worth]
    common = gcd(*weights)
    weights = [weight // common for weight in weights]
    heaviest = dict.fromkeys(weights, 0)
    for device, weight, limit in zip(devices, weights, limits, strict=True):
        heaviest[weight] = max(heaviest[weight], min(limit, device.capacity_bytes))
    shift = 0
    while any((limit >> shift) ** 2 * weight > most for weight, limit in heaviest.items()):
        shift += 1
    return Evenness(shift=shift, weights=tuple(weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a cut costs: for each crossing from node to node, less for each device that is used, and unevenness."""

    crossing: int
    device: int
    evenness: Evenness


def prices(blocks: Blocks, devices: Sequence[Device], limits: Sequence[int]) -> Prices:
    """Such that no number of devices makes up for a crossing, and no unevenness for an idle device."""
    stages = min(blocks.count, len(devices))
    # All crossings, and what is taken off for all devices, must stay below _MOST_COST.
    device = _MOST_COST // (stages + 1) ** 2
    return Prices(
        crossing=device * stages,
        device=device,
        evenness=evenness(devices, limits, (device - 1) // stages),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """Where a cut may stand, as rows and columns of an array.

    With a number of stages: a row for each number of stages left, 0 to `num_stages`; the column tells how many blocks
    more are gone than there are stages before, as each takes one. With any number: one row, with a column a block.
    """

    blocks: int
    num_stages: int

    @property
    def columns(self) -> int:
        """Columns from which a stage begins, and at which it ends."""
        return self.blocks - max(self.num_stages, 1) + 1

    @property
    def shifts(self) -> NDArray[np.int64]:
        """For each row from which a stage begins: column + shift = its first block, column + shift + 1 = its end."""
        return np.arange(max(self.num_stages, 1) - 1, -1, -1)

    def empty(self) -> NDArray[np.int64]:
        """No way from anywhere, but from the end, where nothing is left."""
        shape = (self.num_stages + 1, self.columns) if self.num_stages else (1, self.columns + 1)
        states = np.full(shape, _NO_WAY, dtype=np.int64)
        states[0, -1] = 0
        return states

    def begins(self, states: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of `states` from which a stage begins: `[row, column]`."""
        return states[1:] if self.num_stages else states[:, :-1]

    def ends(self, states: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of `states` in which it ends: the same rows, by the stage's end."""
        return states[:-1] if self.num_stages else states[:, 1:]

    def runs(self, table: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[first, end - 1]` as `[row, column of the first block, column of the end]`."""
        blocks = self.shifts[:, None] + np.arange(self.columns)
        runs: NDArray[np.int64] = table[blocks[:, :, None], blocks[:, None, :]]
        return runs


def best_cut(
    blocks: Blocks, devices: Sequence[Device], limits: Sequence[int], num_stages: int = 0, node: str | None = None
) -> list[Choice]:
    """The cut that crosses from node to node the fewest times; of those, one that uses the most devices; of those, the
    most even; of those, stage by stage, the one that ends it earliest, on the earliest device.

    In `num_stages` stages, or, with 0, in any number. There must be one that fits. node: of a stage before the first.
    """
    states = _States(blocks=blocks.count, num_stages=num_stages)
    price = prices(blocks, devices, limits)
    costs = np.empty((len(devices), *states.begins(states.empty()).shape), dtype=np.int64)
    columns = np.empty(costs.shape, dtype=np.int16)

    anywhere = states.empty()
    near: dict[str, NDArray[np.int64]] = {}
    left = Counter(device.node for device in devices)
    for index, stage in _stage_costs(blocks, devices, limits, states, price):
        here = near.setdefault(devices[index].node, states.empty())
        after = states.ends(np.minimum(here, anywhere + price.crossing))
        # No overflow: what leads nowhere twice is still an int64.
        total = stage + after[:, None, :]
        columns[index] = total.argmin(axis=2)
        cost = total.min(axis=2)
        cost[cost > _MOST_COST] = _NO_WAY
        costs[index] = cost
        for known in (here, anywhere):
            begins = states.begins(known)
            np.minimum(begins, cost, out=begins)
        left[devices[index].node] -= 1
        if not left[devices[index].node]:
            del near[devices[index].node]
    return list(_walk(states, devices, costs, columns, price.crossing, node))


def _stage_costs(
    blocks: Blocks, devices: Sequence[Device], limits: Sequence[int], states: _States, price: Prices
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each device's index, from the last one, and the cost of each run on it: `[row, first, end]`."""
    resident = states.runs(blocks.resident.table())
    needed = states.runs(blocks.needed.table())
    units = resident >> price.evenness.shift
    # The square of what no device may hold could be too large for an int64; it is not needed.
    squares = np.where(resident <= max(limits), units, 0) ** 2
    last: tuple[int, int, int] | None = None
    stage = np.empty(0, dtype=np.int64)
    for index in reversed(range(len(devices))):
        limit, capacity = min(limits[index], TOO_MUCH - 1), min(devices[index].capacity_bytes, TOO_MUCH - 1)
        weight = price.evenness.weights[index]
        # Devices of a kind stand together.
        if last != (limit, capacity, weight):
            last = (limit, capacity, weight)
            fits = (resident <= limit) & (needed <= capacity)
            stage = np.where(fits, squares * weight - price.device, _NO_WAY)
        yield index, stage


def _walk(
    states: _States,
    devices: Sequence[Device],
    costs: NDArray[np.int64],
    columns: NDArray[np.int16],
    crossing: int,
    node: str | None,
) -> Iterator[Choice]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(device.node for device in devices))}
    nodes = np.array([numbers[device.node] for device in devices])
    shifts = states.shifts
    row, column, later = len(shifts) - 1, 0, 0
    while True:
        cost = costs[later:, row, column]
        if node is not None:
            cost = cost + np.where(nodes[later:] == numbers.get(node, -1), 0, crossing)
        assert cost.min() <= _MOST_COST, "there is a cut"
        best = np.flatnonzero(cost == cost.min())
        ends = columns[later:, row, column][best]
        index = later + int(best[ends.argmin()])
        end = int(ends.min())
        shift = int(shifts[row])
        yield index, (column + shift, end + shift + 1)
        if end + shift + 1 == states.blocks:
            return
        node, later = devices[index].node, index + 1
        row, column = (row - 1, end) if states.num_stages else (row, end + 1)
