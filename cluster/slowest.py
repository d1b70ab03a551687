"""The least time that the slowest stage can take, and what each device may hold for it. Pure, exact integers.

A stage's time is its bytes of weights over the speed of its device: decoding is bound by reading the weights. Times are
fractions, so they are searched for on a grid finer than the distance of any two of them: no rounding decides.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .blocks import TOO_MUCH, Blocks
from .devices import Device

# For each device, the most bytes of weights that it may hold.
Limits = list[int]
# Index of a device and its run of blocks `[first, end)`.
Choice = tuple[int, tuple[int, int]]


def least_limits(blocks: Blocks, devices: Sequence[Device], num_stages: int = 0) -> Limits | None:
    """The bytes of weights that each device may hold where the slowest stage takes the least time possible.

    In `num_stages` stages, or, with 0, in any number. None where the model does not fit.
    """
    if num_stages > min(blocks.count, len(devices)):
        return None
    common = gcd(*(device.speed for device in devices))
    speeds = [device.speed // common for device in devices]
    # Two times, bytes / speed each, that differ do so by 1 / finest² at least: between neighbours of a grid of
    # that width lies only one.
    grid = max(speeds) ** 2
    total = blocks.resident.run(0, blocks.count)

    def limits(step: int) -> Limits:
        known = {speed: min(step * speed // grid, total) for speed in set(speeds)}
        return [known[speed] for speed in speeds]

    if num_stages:
        capacities = blocks.needed.reaches([device.capacity_bytes for device in devices])

    def feasible(step: int) -> bool:
        if not num_stages:
            return greedy_reach(blocks, devices, limits(step)) == blocks.count
        return _has_way(np.minimum(blocks.resident.reaches(limits(step)), capacities), num_stages)

    runs = sorted({blocks.resident.run(first, end) for first, end in combinations(range(blocks.count + 1), 2)})
    distinct = sorted(set(speeds), reverse=True)

    def is_single(below: int, step: int) -> bool:
        """Whether between the two lies the time of one run on one device at most."""
        found = 0
        for speed in distinct:
            found += bisect_right(runs, step * speed // grid) - bisect_right(runs, below * speed // grid)
            if found > 1:
                return False
        return True

    below, step = -1, -(-total * grid // min(speeds))
    if not feasible(step):
        return None
    while step - below > 1 and not is_single(below, step):
        middle = (below + step) // 2
        if feasible(middle):
            step = middle
        else:
            below = middle
    return limits(step)


def can_cut(blocks: Blocks, devices: Sequence[Device], limits: Sequence[int], num_stages: int = 0) -> bool:
    """Whether the model can be laid over `devices`, in their order, with at most so many bytes of weights on each.

    In `num_stages` stages, or, with 0, in any number.
    """
    if not num_stages:
        return greedy_reach(blocks, devices, limits) == blocks.count
    if num_stages > min(blocks.count, len(devices)):
        return False
    capacities = blocks.needed.reaches([device.capacity_bytes for device in devices])
    return _has_way(np.minimum(blocks.resident.reaches(limits), capacities), num_stages)


def greedy_reach(blocks: Blocks, devices: Sequence[Device], limits: Sequence[int]) -> int:
    """How many blocks the devices hold when each is filled as far as it can be before the next.

    No cut reaches further: a run that begins later weighs less, so it may end later.
    """
    first = 0
    for device, limit in zip(devices, limits, strict=True):
        first = blocks.reach(first, limit, device.capacity_bytes)
        if first == blocks.count:
            break
    return first


def fill(blocks: Blocks, devices: Sequence[Device]) -> list[Choice]:
    """Each device filled with as many blocks as it can hold, before the next: as far as that goes."""
    chosen: list[Choice] = []
    first = 0
    for index, device in enumerate(devices):
        if first == blocks.count:
            break
        end = blocks.reach(first, TOO_MUCH, device.capacity_bytes)
        if end > first:
            chosen.append((index, (first, end)))
        first = end
    return chosen


def ways(reaches: NDArray[np.int64], num_stages: int) -> Iterator[NDArray[np.bool_]]:
    """For each device, from the last one to the first, what it and those after it can take: `[stages - 1, spare]`,
    whether the blocks from `first` on can be cut into so many stages, `first` being the number of stages before these
    and `spare` blocks more. Each array is the one before, changed.

    reaches: `[device, first]` -> the furthest end of its run. Filling up won't do where each stage wants a block of its
    own: all ends are followed.
    """
    spare = reaches.shape[1] - num_stages
    # With a row before the first, for no stage left: then all blocks must be gone.
    known = np.zeros((num_stages + 1, spare + 1), dtype=np.bool_)
    known[0, spare] = True
    before = np.arange(num_stages - 1, -1, -1)[:, None]
    # As column of the row before, one past the furthest end: a sum up to there leaves out what the run can't reach.
    ends = np.clip(reaches.astype(np.int32)[:, before + np.arange(spare + 1)] - before, 0, spare + 1)
    rows = np.arange(num_stages)[:, None]
    sums = np.zeros((num_stages, spare + 2), dtype=np.int32)
    for end in ends[::-1]:
        np.cumsum(known[:-1], axis=1, out=sums[:, 1:])
        known[1:] |= sums[rows, end] > sums[:, :-1]
        yield known[1:]


def _has_way(reaches: NDArray[np.int64], num_stages: int) -> bool:
    return any(way[-1, 0] for way in ways(reaches, num_stages))
