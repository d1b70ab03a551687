"""Which layers go to which device: contiguous runs over ordered devices, smallest fullest stage first. Pure, exact."""

from __future__ import annotations

from collections.abc import Sequence

from ..proto.v1.errors import OutOfMemoryError
from .devices import Device, format_size
from .sizes import ModelSizes


def balanced(sizes: ModelSizes, devices: Sequence[Device]) -> list[tuple[int, int]]:
    """The cut over all of `devices` (in their order) whose fullest stage holds the fewest bytes, within each memory.

    One run `[first, end)` for each device; every run has at least one layer, so at most as many devices are used as
    there are layers. Of equal cuts, the one that ends its stages earliest. Raises OutOfMemoryError.
    """
    layers, count = len(sizes.layers), min(len(devices), len(sizes.layers))
    prefix = [0]
    for resident, _ in sizes.layers:
        prefix.append(prefix[-1] + resident)

    def resident(first: int, end: int) -> int:
        total = prefix[end] - prefix[first] + sizes.shared[0]
        total += sizes.first[0] if first == 0 else 0
        if end == layers:
            total += sizes.last[0] + (sizes.tied[0] if first else 0)
        return total

    # best[end]: the smallest possible maximum over the stages so far, when they cover layers [0, end).
    unreachable = None
    best: list[int | None] = [0] + [unreachable] * layers
    choice: list[list[int]] = []
    for index in range(count):
        now: list[int | None] = [unreachable] * (layers + 1)
        cut = [-1] * (layers + 1)
        for end in range(index + 1, layers - (count - index - 1) + 1):
            if index == count - 1 and end != layers:
                continue
            for first in range(index, end):
                before = best[first]
                if before is None:
                    continue
                here = resident(first, end)
                if here > devices[index].capacity_bytes:
                    continue
                value = max(before, here)
                known = now[end]
                if known is None or value < known:
                    now[end], cut[end] = value, first
        best = now
        choice.append(cut)
    if best[layers] is None:
        raise does_not_fit(sizes, devices)
    runs: list[tuple[int, int]] = []
    end = layers
    for cut in reversed(choice):
        runs.append((cut[end], end))
        end = cut[end]
    return runs[::-1]


def sequential(sizes: ModelSizes, devices: Sequence[Device]) -> list[tuple[int, int]]:
    """Fills each device before the next one is used. Raises OutOfMemoryError."""
    runs: list[tuple[int, int]] = []
    first, layers = 0, len(sizes.layers)
    for device in devices:
        end = first
        while end < layers and sizes.stage(first, end + 1)[0] <= device.capacity_bytes:
            end += 1
        if end == first:
            continue
        runs.append((first, end))
        first = end
        if first == layers:
            return runs
    raise does_not_fit(sizes, devices)


def fit(sizes: ModelSizes, devices: Sequence[Device]) -> tuple[list[Device], list[tuple[int, int]]]:
    """`balanced` over all devices, or, where a device is too small for even one layer, over those that aren't."""
    usable = list(devices)
    while True:
        try:
            runs = balanced(sizes, usable)
            return usable[: len(runs)], runs
        except OutOfMemoryError:
            smallest = min(usable, key=lambda device: device.capacity_bytes)
            if len(usable) == 1:
                raise does_not_fit(sizes, devices) from None
            usable.remove(smallest)


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
