"""Devices that a plan may use, and how people write them down. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..proto.v1.errors import InvalidDeviceMapError, InvalidRequestError
from ..worker.byte_sizes import parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or a CPU worker's share of a node's memory.

    node: name of the node, unique in the cluster; node_id: Ray's, "" without a cluster.
    name: "cuda:0", "cpu", ... unique on the node. kind: "cuda" or "cpu".
    slots: GPUs that Ray must set aside for it (a made-up GPU is a slot for a CPU worker); 0 or 1.
    capacity_bytes: what may be used of it.
    """

    node: str
    name: str
    kind: str
    capacity_bytes: int
    node_id: str = ""
    slots: int = 0

    @property
    def path(self) -> str:
        """As `hf_device_map` gives it: "<node>/<device>"."""
        return f"{self.node}/{self.name}"


def parse_devices(text: str) -> list[Device]:
    """Devices from "8x80GiB,4x24GiB": groups of a count and a size, each group one imaginary node of GPUs."""
    devices: list[Device] = []
    for index, group in enumerate(part for part in text.split(",") if part.strip()):
        count, times, size = group.strip().rpartition("x")
        if not times:
            count = "1"
        if not count.isdecimal() or not 0 < int(count) <= 100_000:
            raise InvalidRequestError(f"{group.strip()!r} names no devices: write them like 8x80GiB,4x24GiB")
        capacity = parse_size(size)
        devices += [
            Device(node=f"node-{index}", name=f"cuda:{number}", kind="cuda", capacity_bytes=capacity)
            for number in range(int(count))
        ]
    if not devices:
        raise InvalidRequestError("no devices are given: write them like 8x80GiB,4x24GiB")
    return devices


def gpus_or_all(devices: Sequence[Device]) -> Sequence[Device]:
    """The GPUs (made-up ones too); where there are none, all of `devices`."""
    return [device for device in devices if device.kind == "cuda" or device.slots] or devices


def find_device(name: str, devices: Sequence[Device]) -> Device:
    """The device that a user's `name` means: "<node>/<device>", a device's name where only one has it, or its index
    among the GPUs, or among all where there are none. Raises InvalidDeviceMapError."""
    numbered = gpus_or_all(devices)
    if name.isdecimal() and int(name) < len(numbered):
        return numbered[int(name)]
    found = [device for device in devices if name in (device.path, device.name)]
    if len(found) == 1:
        return found[0]
    known = [f"{index}: {device.path}" for index, device in enumerate(numbered)]
    known += [device.path for device in devices if device not in numbered]
    problem = "is no device of this cluster" if not found else f"means {len(found)} devices"
    more = f" and {len(known) - 16} more" if len(known) > 16 else ""
    raise InvalidDeviceMapError(f"{name!r} {problem}; devices are {', '.join(known[:16])}{more}")


def limit_memory(devices: Sequence[Device], max_memory: Mapping[str, str]) -> list[Device]:
    """`devices` with their capacities cut to `max_memory`; those that it doesn't name are left out, as accelerate
    does. "cpu" names all CPU devices. Raises InvalidDeviceMapError and InvalidRequestError."""
    if not max_memory:
        return list(devices)
    limits: dict[Device, int] = {}
    for name, text in max_memory.items():
        size = parse_size(text)
        if name == "disk":
            raise InvalidDeviceMapError("max_memory names 'disk': nothing is offloaded; leave it out")
        cpus = [device for device in devices if device.kind == "cpu"]
        # accelerate's max_memory often names the CPU beside GPUs, for offloading; without CPU devices it is moot.
        named = cpus if name == "cpu" else [find_device(name, devices)]
        for device in named:
            limits[device] = min(size, device.capacity_bytes)
    return [replace(device, capacity_bytes=limits[device]) for device in devices if limits.get(device)]


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
    "devices". Raises InvalidRequestError."""
    entries = topology.get("devices") if isinstance(topology, dict) else topology
    if not isinstance(entries, list) or not entries:
        raise InvalidRequestError('the topology has no devices: write [{"node": …, "device": …, "memory": …}, …]')
    devices = []
    for index, entry in enumerate(entries):
        missing = [name for name in ("node", "device", "memory") if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise InvalidRequestError(f"device {index} of the topology lacks {', '.join(missing)}")
        name = str(entry["device"])
        kind = "cpu" if name.startswith("cpu") else "cuda"
        devices.append(
            Device(node=str(entry["node"]), name=name, kind=kind, capacity_bytes=parse_size(entry["memory"]))
        )
    if len({device.path for device in devices}) < len(devices):
        raise InvalidRequestError("the topology names a device twice")
    return devices
