"""Which device takes a stage that has to go elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .devices import Device, gpus_or_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a stage needs of a device: "cuda" or "cpu", and how many bytes. what: of which this is told."""

    what: str
    kind: str
    bytes_: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A stage that finds no room. most_bytes: what the roomiest device of its kind has left, at `most_path`."""

    need: Need
    most_bytes: int
    most_path: str

    def __str__(self) -> str:
        most = f"the roomiest, {self.most_path}, has {self.most_bytes:,}" if self.most_path else "there is none"
        return (
            f"{self.need.what} needs {self.need.bytes_:,} bytes of a {self.need.kind} device, and of the others {most}"
        )


def choose(needs: Sequence[Need], devices: Sequence[Device]) -> list[Device] | Shortage:
    """A device for each need, together: the largest need first, each on the smallest device that has room for it.

    As a plan chooses: a node's processor beside GPUs is not a device. Stages share a CPU device, and no other.
    """
    left = {device.path: device for device in gpus_or_all(devices)}
    chosen: dict[int, Device] = {}
    for index in sorted(range(len(needs)), key=lambda index: -needs[index].bytes_):
        need = needs[index]
        able = [device for device in left.values() if device.kind == need.kind]
        fitting = [device for device in able if device.capacity_bytes >= need.bytes_]
        if not fitting:
            most = max(able, key=lambda device: device.capacity_bytes, default=None)
            return Shortage(
                need=need,
                most_bytes=0 if most is None else most.capacity_bytes,
                most_path="" if most is None else most.path,
            )
        device = chosen[index] = min(fitting, key=lambda device: (device.capacity_bytes, device.path))
        rest = 0 if device.slots or device.kind == "cuda" else device.capacity_bytes - need.bytes_
        left[device.path] = replace(device, capacity_bytes=rest)
    return [chosen[index] for index in range(len(needs))]
