"""Devices that a plan may use, and how people write them down. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from ..proto.v1.errors import InvalidDeviceMapError, InvalidRequestError
from ..worker.byte_sizes import format_size, parse_size

_MOST_DEVICES = 100_000
# More than this is a slip of the pen: no device has it.
_MOST_MEMORY_BYTES = 1 << 50
_MOST_SPEED = 10**9
_SPEED_PLACES = 3
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_NODE = re.compile(r"[^\s/]{1,253}")
_DEVICE = re.compile(r"cpu(:[0-9]{1,6})?|cuda:[0-9]{1,6}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or a CPU worker's share of a node's memory.

    node: name of the node, unique in the cluster; node_id: Ray's, "" without a cluster. host: name of its machine,
    which several nodes may be on; "" where it isn't known.
    name: "cuda:0", "cpu", ... unique on the node. kind: "cuda" or "cpu".
    slots: GPUs that Ray must set aside for it (a made-up GPU is a slot for a CPU worker); 0 or 1.
    capacity_bytes: what may be used of it. speed: how fast it reads its weights, compared to the other devices; any
    unit that they share, such as GB/s of memory bandwidth.
    """

    node: str
    name: str
    kind: str
    capacity_bytes: int
    node_id: str = ""
    host: str = ""
    slots: int = 0
    speed: int = 1

    def __post_init__(self) -> None:
        assert self.speed > 0, self.speed

    @property
    def path(self) -> str:
        """As `hf_device_map` gives it: "<node>/<device>"."""
        return f"{self.node}/{self.name}"


def as_seen_by_worker(device: str) -> str:
    """A device, by its name or kind, as the stage's worker names it: it sees just the GPU that Ray gives it."""
    return "cuda:0" if device.startswith("cuda") else "cpu"


def parse_devices(text: str) -> list[Device]:
    """Devices from "8x80GiB,4x24GiB": groups of a count and a size, each group one imaginary node of GPUs.

    With "@" after the size, a speed: "4x80GiB@3350,4x24GiB@936". Raises InvalidRequestError.
    """
    devices: list[Device] = []
    speeds: list[Decimal | None] = []
    for index, group in enumerate(part.strip() for part in text.split(",") if part.strip()):
        sizes, at, speed = group.partition("@")
        count, times, size = sizes.rpartition("x")
        if not times:
            count = "1"
        if not _is_index(count) or not 0 < len(devices) + int(count) <= _MOST_DEVICES or not int(count):
            raise InvalidRequestError(
                f"{group[:80]!r} names no devices: write them like 8x80GiB,4x24GiB, {_MOST_DEVICES} at most"
            )
        capacity = _memory(size, repr(group[:80]))
        devices += [
            Device(node=f"node-{index}", name=f"cuda:{number}", kind="cuda", capacity_bytes=capacity)
            for number in range(int(count))
        ]
        speeds += [_speed(speed, repr(group[:80])) if at else None] * int(count)
    if not devices:
        raise InvalidRequestError("no devices are given: write them like 8x80GiB,4x24GiB")
    return _with_speeds(devices, speeds)


def _memory(size: object, owner: str) -> int:
    """Bytes that a device may be said to have. `owner`: of which this is told. Raises InvalidRequestError."""
    capacity = parse_size(size) if isinstance(size, (str, int)) else parse_size(str(size))
    if not 0 < capacity <= _MOST_MEMORY_BYTES:
        raise InvalidRequestError(
            f"{owner} has {size!r} of memory: a device has more than 0 bytes, and {format_size(_MOST_MEMORY_BYTES)} at "
            "most"
        )
    return capacity


def _speed(value: object, owner: str) -> Decimal:
    text = str(value).strip()
    if _NUMBER.fullmatch(text) and 0 < Decimal(text) <= _MOST_SPEED:
        speed = Decimal(text)
        if speed * 10**_SPEED_PLACES == int(speed * 10**_SPEED_PLACES):
            return speed
    raise InvalidRequestError(
        f"{owner} has speed {text[:80]!r}: write a number above 0, {_MOST_SPEED} at most, with at most {_SPEED_PLACES} "
        "decimals, such as GB/s of memory bandwidth"
    )


def _with_speeds(devices: Sequence[Device], speeds: Sequence[Decimal | None]) -> list[Device]:
    """`devices` with their speeds as integers, in the unit that is fine enough for all. Raises InvalidRequestError."""
    if all(speed is None for speed in speeds):
        return list(devices)
    for device, speed in zip(devices, speeds, strict=True):
        if speed is None:
            raise InvalidRequestError(
                f"{device.path} has no speed, but others have one: give it to all devices, in one unit, or to none"
            )
    known = [speed for speed in speeds if speed is not None]
    unit = next(10**places for places in range(_SPEED_PLACES + 1) if all(s * 10**places % 1 == 0 for s in known))
    return [replace(device, speed=int(speed * unit)) for device, speed in zip(devices, known, strict=True)]


def gpus_or_all(devices: Sequence[Device]) -> Sequence[Device]:
    """The GPUs (made-up ones too); where there are none, all of `devices`."""
    return [device for device in devices if device.kind == "cuda" or device.slots] or devices


def find_device(name: str, devices: Sequence[Device]) -> Device:
    """The device that a user's `name` means: "<node>/<device>", a device's name where only one has it, or its index
    among the GPUs, or among all where there are none. Raises InvalidDeviceMapError."""
    return device_finder(devices)(name)


def device_finder(devices: Sequence[Device]) -> Callable[[str], Device]:
    """`find_device` for many names: each is looked up, not searched for."""
    numbered = gpus_or_all(devices)
    by_name: dict[str, list[Device]] = {}
    for device in devices:
        for name in dict.fromkeys((device.path, device.name)):
            by_name.setdefault(name, []).append(device)

    def find(name: str) -> Device:
        if _is_index(name) and int(name) < len(numbered):
            return numbered[int(name)]
        found = by_name.get(name, [])
        if len(found) == 1:
            return found[0]
        known = [f"{index}: {device.path}" for index, device in enumerate(numbered)]
        known += [device.path for device in devices if device not in numbered] if len(known) <= 16 else []
        problem = "is no device of this cluster" if not found else f"means {len(found)} devices"
        more = f" and {len(devices) - 16} more" if len(devices) > 16 else ""
        raise InvalidDeviceMapError(f"{name[:80]!r} {problem}; devices are {', '.join(known[:16])}{more}")

    return find


def _is_index(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def limit_memory(devices: Sequence[Device], max_memory: Mapping[str, str]) -> list[Device]:
    """`devices` with their capacities cut to `max_memory`; those that it doesn't name are left out, as accelerate
    does. "cpu" names all CPU devices that aren't named by themselves. A device never has more than it has.

    Raises InvalidDeviceMapError and InvalidRequestError.
    """
    if not max_memory:
        return list(devices)
    find = device_finder(devices)
    limits: dict[str, int] = {}
    names: dict[str, str] = {}
    for name, text in max_memory.items():
        try:
            size = parse_size(text)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"max_memory of {name[:80]!r}: {error}") from None
        if name == "disk":
            raise InvalidDeviceMapError("max_memory names 'disk': nothing is offloaded; leave it out")
        if name == "cpu":
            # accelerate's max_memory often names the CPU beside GPUs, for offloading; without CPU devices it is moot.
            limits |= {device.path: size for device in devices if device.kind == "cpu" and device.path not in names}
            continue
        path = find(name).path
        if path in names:
            raise InvalidDeviceMapError(
                f"max_memory names {path} twice, as {names[path]!r} and as {name!r}: keep one of them"
            )
        names[path] = name
        limits[path] = size
    return [
        replace(device, capacity_bytes=min(limits[device.path], device.capacity_bytes))
        for device in devices
        if limits.get(device.path)
    ]


def share_cpus(devices: Sequence[Device], wanted: int) -> list[Device]:
    """`devices` with CPU ones split until there are `wanted`, evenly over the nodes: CPU workers share a node.

    GPUs are never split. A share has its part of the node's memory.
    """
    cpus = [device for device in devices if device.kind == "cpu" and not device.slots]
    missing = wanted - len(devices)
    if missing <= 0 or not cpus:
        return list(devices)
    extra, rest = divmod(missing, len(cpus))
    shares = {device: 1 + extra + (index < rest) for index, device in enumerate(cpus)}
    result: list[Device] = []
    for device in devices:
        count = shares.get(device, 1)
        if count == 1:
            result.append(device)
            continue
        result += [
            replace(device, name=f"{device.name}:{number}", capacity_bytes=device.capacity_bytes // count)
            for number in range(count)
        ]
    return result


def parse_topology(topology: object) -> list[Device]:
    """Devices of a topology file: [{"node": "a", "device": "cuda:0", "memory": "80GiB"}, ...], or that list under
    "devices"; with a "speed" in each, or in none. Raises InvalidRequestError."""
    entries = topology.get("devices") if isinstance(topology, dict) else topology
    if not isinstance(entries, list) or not entries:
        raise InvalidRequestError('the topology has no devices: write [{"node": …, "device": …, "memory": …}, …]')
    if len(entries) > _MOST_DEVICES:
        raise InvalidRequestError(
            f"the topology has {len(entries)} devices: {_MOST_DEVICES} at most can be planned for"
        )
    devices: dict[str, Device] = {}
    speeds: list[Decimal | None] = []
    for index, entry in enumerate(entries):
        owner = f"device {index} of the topology"
        missing = [name for name in ("node", "device", "memory") if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise InvalidRequestError(f"{owner} lacks {', '.join(missing)}")
        node = _text(entry["node"], _NODE, f"{owner} has node", "a name without spaces and slashes")
        name = _text(entry["device"], _DEVICE, f"{owner} has device", "cuda:0, cuda:1, …, cpu or cpu:0, cpu:1, …")
        device = Device(
            node=node,
            name=name,
            kind="cpu" if name.startswith("cpu") else "cuda",
            capacity_bytes=_memory(entry["memory"], owner),
        )
        if device.path in devices:
            raise InvalidRequestError(f"the topology names a device twice: {device.path}; keep one of them")
        devices[device.path] = device
        speeds.append(None if entry.get("speed") is None else _speed(entry["speed"], owner))
    return _with_speeds(list(devices.values()), speeds)


def _text(value: object, pattern: re.Pattern[str], problem: str, remedy: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value) or not value.isprintable():
        raise InvalidRequestError(f"{problem} {str(value)[:80]!r}: write {remedy}")
    return value
