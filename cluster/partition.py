"""Which layers go to which device: contiguous runs over ordered devices, smallest fullest stage first. Pure, exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..proto.v1.errors import OutOfMemoryError
from ..worker.byte_sizes import format_size
from .devices import Device
from .sizes import ModelSizes

# Layers `[first, end)` of each stage, in order.
Runs = list[tuple[int, int]]
_NONE = -1


def balanced(sizes: ModelSizes, devices: Sequence[Device]) -> Runs:
    """The cut over all of `devices` (in their order) whose fullest stage holds the fewest bytes, within each memory.

    One run for each device, of at least one layer: where there are fewer layers than devices, the first ones are used.
    Of the cuts with the same fullest stage, the one whose stages differ the least (by the sum of their squares); of
    those, the one that ends its stages earliest. Raises OutOfMemoryError.
    """
    chosen = _cut(sizes, devices[: len(sizes.layers)], may_skip=False)
    if chosen is None:
        raise does_not_fit(sizes, devices)
    return [run for _, run in chosen]


def fit(sizes: ModelSizes, devices: Sequence[Device]) -> tuple[list[Device], Runs]:
    """As `balanced`, over those of `devices` (in their order) that make the fullest stage smallest, and as many of
    them as that allows: a device is left out where it is too small, or would make another one fuller.

    So another device, or more memory, never makes the fullest stage larger. Raises OutOfMemoryError.
    """
    chosen = _cut(sizes, devices, may_skip=True)
    if chosen is None:
        raise does_not_fit(sizes, devices)
    return [devices[index] for index, _ in chosen], [run for _, run in chosen]


def sequential(sizes: ModelSizes, devices: Sequence[Device]) -> tuple[list[Device], Runs]:
    """Fills each device before the next one is used. Raises OutOfMemoryError."""
    chosen: list[Device] = []
    runs: Runs = []
    first, layers = 0, len(sizes.layers)
    for device in devices:
        end = first
        while end < layers and sizes.stage(first, end + 1)[0] <= device.capacity_bytes:
            end += 1
        if end == first:
            continue
        chosen.append(device)
        runs.append((first, end))
        first = end
        if first == layers:
            return chosen, runs
    raise does_not_fit(sizes, devices)


def _cut(sizes: ModelSizes, devices: Sequence[Device], *, may_skip: bool) -> list[tuple[int, tuple[int, int]]] | None:
    """Index of a device and its run, in order; None where nothing fits.

    Two passes from device to device: the smallest possible maximum first, then the best cut that keeps to it. Longer
    runs are heavier, so each search ends where it can't improve any more.
    """
    layers, count = len(sizes.layers), len(devices)
    resident = _resident(sizes)

    def choices(index: int) -> Iterator[tuple[int, range]]:
        """Where the stage on a device may end, and begin: where each must have one, with a layer left to each other."""
        before, after = (0, 0) if may_skip else (index, count - index - 1)
        for end in range(before + 1, layers - after + 1):
            yield end, range(end - 1, before - 1, -1)

    # fullest[end]: the smallest maximum over the stages so far, when they cover layers [0, end).
    fullest: list[int | None] = [0] + [None] * layers
    for index, device in enumerate(devices):
        row: list[int | None] = list(fullest) if may_skip else [None] * (layers + 1)
        for end, firsts in choices(index):
            best = row[end]
            for first in firsts:
                here = resident(first, end)
                if here > device.capacity_bytes or (best is not None and here >= best):
                    break
                before = fullest[first]
                if before is not None and (best is None or max(before, here) < best):
                    best = max(before, here)
            row[end] = best
        fullest = row
    limit = fullest[layers]
    if limit is None:
        return None

    # score[end]: devices left idle, then the sum of squares; begins[index][end]: where that device's stage begins.
    score: list[tuple[int, int] | None] = [(0, 0)] + [None] * layers
    begins: list[list[int]] = []
    for index, device in enumerate(devices):
        capacity = min(limit, device.capacity_bytes)
        next_score: list[tuple[int, int] | None] = [None] * (layers + 1)
        begin = [_NONE] * (layers + 1)
        if may_skip:
            next_score = [None if known is None else (known[0] + 1, known[1]) for known in score]
        for end, firsts in choices(index):
            for first in firsts:
                here = resident(first, end)
                if here > capacity:
                    break
                known = score[first]
                if known is None:
                    continue
                value = (known[0], known[1] + here * here)
                best_score = next_score[end]
                if best_score is None or value < best_score or (value == best_score and begin[end] != _NONE):
                    next_score[end], begin[end] = value, first
        score = next_score
        begins.append(begin)

    chosen = []
    end = layers
    for index in reversed(range(count)):
        first = begins[index][end]
        if first != _NONE:
            chosen.append((index, (first, end)))
            end = first
    assert end == 0
    return chosen[::-1]


def _resident(sizes: ModelSizes) -> Callable[[int, int], int]:
    """`sizes.stage(first, end)[0]` in constant time."""
    layers = len(sizes.layers)
    prefix = [0]
    for layer_bytes, _ in sizes.layers:
        prefix.append(prefix[-1] + layer_bytes)

    def resident(first: int, end: int) -> int:
        total = prefix[end] - prefix[first] + sizes.shared[0]
        if first == 0:
            total += sizes.first[0]
        if end == layers:
            total += sizes.last[0] + (sizes.tied[0] if first else 0)
        return total

    return resident


def does_not_fit(sizes: ModelSizes, devices: Sequence[Device]) -> OutOfMemoryError:
    needed, _ = sizes.stage(0, len(sizes.layers))
    there = sum(device.capacity_bytes for device in devices)
    largest = max(devices, key=lambda device: device.capacity_bytes)
    layer = max(range(len(sizes.layers)), key=lambda index: sizes.layers[index][0])
    needs = f"{format_size(needed)} resident (its largest layer, {layer}, {format_size(sizes.layers[layer][0])}"
    ends = f"first and last stage {format_size(sizes.first[0])} and {format_size(sizes.last[0] + sizes.tied[0])} more)"
    return OutOfMemoryError(
        f"the model needs {needs}, {ends}, but {len(devices)} device(s) give {format_size(there)}, the largest "
        f"({largest.path}) {format_size(largest.capacity_bytes)}: quantize to 4 bits, raise max_memory, or add devices"
    )
