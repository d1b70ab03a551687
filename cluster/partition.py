"""Which layers go to which device: contiguous runs over ordered devices. Pure, exact, deterministic.

A stage takes as long as its device needs to read its weights: bytes / speed. A cut is within memory where each stage's
weights, workspace and reserved keys and values fit into its device. Of those, the best one has, in this order,

1. the least time of the slowest stage, which is what a pipeline's rate comes down to;
2. the fewest crossings between nodes: each costs every token the way over the network, and is one more way to fail;
3. the most devices in use, for room and for small stages. Not before 2: a device that can't make the slowest stage
   faster isn't worth a crossing, and may serve another model; within a node it costs next to nothing;
4. the most even load (`spread.Evenness`), on the faster and roomier devices, so that room is left for keys and values;
5. the earliest ends, stage by stage, on the earliest devices: there is one best cut, always the same.

Another device, or more memory, never makes it worse in 1 to 3: the cut of before is still there to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Blocks, into_blocks
from .devices import Device
from .refusal import Circumstances, does_not_fit
from .sizes import ModelSizes
from .slowest import Choice, fill, least_limits, ways
from .spread import best_cut

# Layers `[first, end)` of each stage, in order.
Runs = list[tuple[int, int]]


def fit(
    sizes: ModelSizes,
    devices: Sequence[Device],
    *,
    num_stages: int = 0,
    circumstances: Circumstances = Circumstances(),  # noqa: B008 -- frozen
) -> tuple[list[Device], Runs]:
    """The best cut over those of `devices` (in their order) that it takes; in `num_stages` stages, where that isn't 0.

    Raises OutOfMemoryError.
    """
    blocks = into_blocks(sizes, circumstances.reserve_tokens)
    chosen = _best(blocks, devices, num_stages)
    if chosen is None:
        raise does_not_fit(sizes, devices, circumstances, num_stages)
    return _laid(blocks, devices, chosen)


def balanced(sizes: ModelSizes, devices: Sequence[Device]) -> Runs:
    """The best cut with a run for each of `devices`, of at least one layer: where there are fewer runs to be had than
    devices, the first ones are used. Raises OutOfMemoryError."""
    count = into_blocks(sizes).count
    _, runs = fit(sizes, devices[:count], num_stages=min(count, len(devices)))
    return runs


def sparing_first(
    sizes: ModelSizes,
    devices: Sequence[Device],
    *,
    num_stages: int = 0,
    circumstances: Circumstances = Circumstances(),  # noqa: B008 -- frozen
) -> tuple[list[Device], Runs]:
    """As `fit`, with as little on the first device as the others allow: nothing, or else the fewest layers.

    It is accelerate's "balanced_low_0" (`get_balanced_memory`): the first device gets what the others can't hold.
    Raises OutOfMemoryError.
    """
    first, others = devices[0], devices[1:]
    blocks = into_blocks(sizes, circumstances.reserve_tokens)
    spared = _best(blocks, others, num_stages) if others else None
    if spared is not None:
        return _laid(blocks, others, spared)
    most = blocks.needed.reach(0, first.capacity_bytes) if others and num_stages != 1 else 0
    for layer in blocks.edges[1 : min(most + 1, blocks.count)]:
        rest = into_blocks(sizes.from_layer(layer), circumstances.reserve_tokens)
        chosen = _best(rest, others, max(num_stages - 1, 0), node=first.node)
        if chosen is not None:
            used, runs = _laid(rest, others, chosen)
            return [first, *used], [(0, layer), *((layer + begin, layer + end) for begin, end in runs)]
    return fit(sizes, devices, num_stages=num_stages, circumstances=circumstances)


def sequential(
    sizes: ModelSizes,
    devices: Sequence[Device],
    *,
    num_stages: int = 0,
    circumstances: Circumstances = Circumstances(),  # noqa: B008 -- frozen
) -> tuple[list[Device], Runs]:
    """Fills each device before the next one is used; where `num_stages` isn't 0, as far as leads to so many stages.

    Raises OutOfMemoryError.
    """
    blocks = into_blocks(sizes, circumstances.reserve_tokens)
    chosen = _filled(blocks, devices, num_stages) if num_stages else _filled_up(blocks, devices)
    if chosen is None:
        raise does_not_fit(sizes, devices, circumstances, num_stages)
    return _laid(blocks, devices, chosen)


def _laid(blocks: Blocks, devices: Sequence[Device], chosen: Sequence[Choice]) -> tuple[list[Device], Runs]:
    """The devices that were chosen, and the layers of each."""
    return [devices[index] for index, _ in chosen], [blocks.layers(*run) for _, run in chosen]


def _best(blocks: Blocks, devices: Sequence[Device], num_stages: int, node: str | None = None) -> list[Choice] | None:
    """None where nothing fits. node: of a stage before the first."""
    limits = least_limits(blocks, devices, num_stages)
    return None if limits is None else best_cut(blocks, devices, limits, num_stages, node)


def _filled_up(blocks: Blocks, devices: Sequence[Device]) -> list[Choice] | None:
    chosen = fill(blocks, devices)
    return chosen if chosen and chosen[-1][1][1] == blocks.count else None


def _filled(blocks: Blocks, devices: Sequence[Device], num_stages: int) -> list[Choice] | None:
    """As `_filled_up`, in so many stages: each goes as far as the later devices can take the rest in what is left."""
    if num_stages > min(blocks.count, len(devices)):
        return None
    reaches = blocks.needed.reaches([device.capacity_bytes for device in devices])
    later = [way.copy() for way in ways(reaches, num_stages)][-2::-1]
    most_spare = blocks.count - num_stages

    def leads_on(index: int, end: int, left: int) -> bool:
        """Whether the devices after this one can take the blocks from `end` on in `left` stages."""
        if not left:
            return end == blocks.count
        spare = end - (num_stages - left)
        return index < len(later) and 0 <= spare <= most_spare and bool(later[index][left - 1, spare])

    chosen: list[Choice] = []
    first = 0
    for index in range(len(devices)):
        left = num_stages - len(chosen) - 1
        ends = range(int(reaches[index, first]), first, -1)
        end = next((end for end in ends if leads_on(index, end, left)), None)
        if end is not None:
            chosen.append((index, (first, end)))
            first = end
        if first == blocks.count:
            return chosen
    return None
