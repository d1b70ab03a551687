"""Why a model does not fit, and what would make it: the words of every refusal for want of memory. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..proto.v1.errors import OutOfMemoryError
from ..worker.byte_sizes import format_size
from .blocks import TOO_MUCH, Blocks, into_blocks
from .devices import Device
from .sizes import ModelSizes
from .slowest import Choice, fill


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a plan is made under, beside the model and the devices.

    reserve_tokens: tokens that every stage must have room for. quantization: as `describe_quantization` puts it, ""
    where it isn't known. lighter: what the model would weigh, loaded another way: name of the way -> sizes. is_fixed:
    that there is no other way. is_limited: whether max_memory has made the devices smaller.
    """

    reserve_tokens: int = 0
    quantization: str = ""
    lighter: tuple[tuple[str, ModelSizes], ...] = ()
    is_fixed: bool = False
    is_limited: bool = False


def does_not_fit(
    sizes: ModelSizes, devices: Sequence[Device], circumstances: Circumstances, num_stages: int = 0
) -> OutOfMemoryError:
    """For a model that no cut lays over `devices`: what it needs, what is there, what stands in the way, what helps."""
    blocks = into_blocks(sizes, circumstances.reserve_tokens)
    there = sum(device.capacity_bytes for device in devices)
    largest = max(devices, key=lambda device: device.capacity_bytes)
    stands = (
        f"{len(devices)} device(s) give {format_size(there)}, the largest ({largest.path}) "
        f"{format_size(largest.capacity_bytes)}"
    )
    total, made_of = _needed(sizes, 0, len(sizes.layers), circumstances)
    needs = f"the model needs {total}{made_of or ' resident'}"
    if num_stages and _fits(sizes, devices, circumstances.reserve_tokens):
        stages = len(fill(blocks, devices))
        return OutOfMemoryError(
            f"{needs}, which can't be laid over the devices in exactly {num_stages} stage(s): {stands}; "
            f"leave num_stages out: in {stages} it fits"
        )
    remedies = [
        *_lighter(devices, circumstances),
        *_fewer_tokens(sizes, devices, circumstances.reserve_tokens),
        *(["raise max_memory"] if circumstances.is_limited else []),
        *_more_devices(blocks, devices, largest),
    ]
    obstacle = _obstacle(sizes, blocks, devices, largest)
    return OutOfMemoryError(f"{needs}, but {stands}; {obstacle}: {_any_of(remedies)}")


def stage_does_not_fit(
    sizes: ModelSizes, device: Device, run: tuple[int, int], circumstances: Circumstances
) -> OutOfMemoryError:
    """For layers that a device map puts on a device which can't hold them."""
    first, end = run
    total, made_of = _needed(sizes, first, end, circumstances)
    problem = (
        f"device_map puts {total}{made_of} ({_named(sizes, first, end)}) on {device.path}, of which "
        f"{format_size(device.capacity_bytes)} may be used"
    )
    blocks = into_blocks(sizes, circumstances.reserve_tokens)
    begin = blocks.edges.index(first)
    reach = blocks.edges[blocks.needed.reach(begin, device.capacity_bytes)]
    remedies = ["put modules elsewhere" if reach == first else f"end its stage with layer {reach - 1}"]
    for name, other in circumstances.lighter:
        needed = into_blocks(other, circumstances.reserve_tokens).needed
        taken = needed.run(begin, blocks.edges.index(end))
        fits = "" if taken <= device.capacity_bytes else ", still too much"
        remedies.append(f"set {name} ({format_size(taken)} there{fits})")
    remedies += [] if circumstances.lighter else _unmeasured(circumstances)
    remedies += ["raise max_memory"] if circumstances.is_limited else []
    return OutOfMemoryError(f"{problem}: {_any_of(remedies)}")


def _needed(sizes: ModelSizes, first: int, end: int, circumstances: Circumstances) -> tuple[str, str]:
    """ "14.00 GiB", and " (…)", of what that is made, where it isn't weights alone."""
    weights, _ = sizes.stage(first, end)
    kv = sizes.kv_bytes(first, end, circumstances.reserve_tokens)
    parts = [f"{format_size(weights)} resident"]
    if kv:
        parts.append(f"{format_size(kv)} of keys and values for {circumstances.reserve_tokens} tokens")
    if sizes.workspace_bytes:
        parts.append(f"{format_size(sizes.workspace_bytes)} of workspace")
    total = format_size(weights + kv + sizes.workspace_bytes)
    return total, f" ({', '.join(parts)})" if len(parts) > 1 else ""


def _obstacle(sizes: ModelSizes, blocks: Blocks, devices: Sequence[Device], largest: Device) -> str:
    """What is too large by itself; else what is left when all devices are full."""
    heaviest = max(range(blocks.count), key=lambda block: (blocks.needed.run(block, block + 1), -block))
    needed = blocks.needed.run(heaviest, heaviest + 1)
    if needed > largest.capacity_bytes:
        run = blocks.layers(heaviest, heaviest + 1)
        return f"the obstacle is {_named(sizes, *run)}, {format_size(needed)} in one piece"
    full = _end(fill(blocks, devices))
    rest, last = blocks.layers(full, blocks.count)
    missing = format_size(blocks.needed.run(full, blocks.count))
    return f"the obstacle is {_named(sizes, rest, last)}, {missing}, left over when the devices are full"


def _named(sizes: ModelSizes, first: int, end: int) -> str:
    """ "layer 3 (5.00 GiB)", "layers 0 to 5 with the embedding (1.00 GiB)", ...: of parts beside layers, the bytes."""
    parts = []
    if first == 0 and sizes.first[0]:
        parts.append(f"the embedding ({format_size(sizes.first[0])})")
    head = sizes.last[0] + (sizes.tied[0] if first else 0)
    if end == len(sizes.layers) and head:
        parts.append(f"the head ({format_size(head)})")
    layers = f"layers {first} to {end - 1}"
    if end - first == 1:
        layers = f"layer {first} ({format_size(sizes.layers[first][0])})"
    return f"{layers} with {' and '.join(parts)}" if parts else layers


def _fits(sizes: ModelSizes, devices: Sequence[Device], reserve_tokens: int) -> bool:
    blocks = into_blocks(sizes, reserve_tokens)
    return _end(fill(blocks, devices)) == blocks.count


def _end(chosen: Sequence[Choice]) -> int:
    """How many blocks have found room."""
    return chosen[-1][1][1] if chosen else 0


def _lighter(devices: Sequence[Device], circumstances: Circumstances) -> Iterator[str]:
    for name, sizes in circumstances.lighter:
        blocks = into_blocks(sizes, circumstances.reserve_tokens)
        fits = "fits" if _end(fill(blocks, devices)) == blocks.count else "still too much"
        yield f"set {name} ({format_size(blocks.needed.run(0, blocks.count))}, {fits})"
    if not circumstances.lighter:
        yield from _unmeasured(circumstances)


def _unmeasured(circumstances: Circumstances) -> list[str]:
    """What would make the model lighter, where nobody has told by how much."""
    quantization = circumstances.quantization
    if circumstances.is_fixed:
        return []
    if quantization in ("nf4", "fp4"):
        return ["set bnb_4bit_use_double_quant"]
    return [] if quantization.endswith("+double") else ["quantize to 4 bits"]


def _fewer_tokens(sizes: ModelSizes, devices: Sequence[Device], reserve_tokens: int) -> Iterator[str]:
    if not reserve_tokens or not _fits(sizes, devices, 0):
        return
    fewest, most = 0, reserve_tokens  # the model fits with the one, not with the other
    while most - fewest > 1:
        tokens = (fewest + most) // 2
        if _fits(sizes, devices, tokens):
            fewest = tokens
        else:
            most = tokens
    yield f"reserve {fewest} tokens at most" if fewest else "reserve no tokens"


def _more_devices(blocks: Blocks, devices: Sequence[Device], largest: Device) -> Iterator[str]:
    """How many more devices like the largest one would do; or how large a device must be, where none of that size."""
    heaviest = max(blocks.needed.run(block, block + 1) for block in range(blocks.count))
    if heaviest > largest.capacity_bytes:
        yield f"add devices of {format_size(heaviest)} at least"
        return
    first, more = _end(fill(blocks, devices)), 0
    while first < blocks.count:
        first = blocks.reach(first, TOO_MUCH, largest.capacity_bytes)
        more += 1
    yield f"add {more} device(s) of {format_size(largest.capacity_bytes)}"


def _any_of(remedies: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join(part for part in (", ".join(remedies[:-1]), remedies[-1]) if part)
