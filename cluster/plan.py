"""A plan: stages with devices, layers and predicted bytes. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidDeviceMapError, InvalidRequestError, OutOfMemoryError
from ..worker.anatomy import Cut, Place
from . import partition
from .devices import Device, find_device, limit_memory, share_cpus
from .sizes import ModelSizes

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """What the planner needs to know of a model. `modules`: name and place of each one that a device map names."""

    sizes: ModelSizes
    modules: tuple[tuple[str, Place], ...]
    tied: bool
    quantization: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """How the user wants the model spread. `by_module`: module prefix -> device, in place of `device_map`."""

    device_map: str = "auto"
    by_module: Mapping[str, str] | None = None
    max_memory: Mapping[str, str] | None = None
    num_stages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    device: Device
    cut: Cut
    resident_bytes: int
    fetch_bytes: int
    kv_bytes_per_token: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: str
    commit: str
    outline: ModelOutline
    stages: tuple[PlannedStage, ...]

    def to_message(self) -> registry_pb2.Plan:
        return registry_pb2.Plan(
            model=self.model,
            quantization=self.outline.quantization,
            dtype=self.outline.dtype,
            commit=self.commit,
            total_resident_bytes=sum(stage.resident_bytes for stage in self.stages),
            total_fetch_bytes=sum(stage.fetch_bytes for stage in self.stages),
            stages=[
                registry_pb2.StagePlan(
                    index=index,
                    node=stage.device.node,
                    device=stage.device.name,
                    first_layer=stage.cut.first,
                    last_layer=stage.cut.end - 1,
                    resident_bytes=stage.resident_bytes,
                    fetch_bytes=stage.fetch_bytes,
                    kv_bytes_per_token=stage.kv_bytes_per_token,
                    capacity_bytes=stage.device.capacity_bytes,
                    modules=stage.modules,
                )
                for index, stage in enumerate(self.stages)
            ],
        )


def make_plan(model: str, commit: str, outline: ModelOutline, devices: Sequence[Device], options: PlanOptions) -> Plan:
    """Lays the model over `devices`. Raises InvalidRequestError, InvalidDeviceMapError and OutOfMemoryError."""
    if options.device_map not in DEVICE_MAPS:
        raise InvalidDeviceMapError(
            f"device_map {options.device_map!r} is none of {', '.join(DEVICE_MAPS)}, nor a dict"
        )
    layers = len(outline.sizes.layers)
    if options.num_stages > layers:
        raise InvalidRequestError(f"num_stages={options.num_stages}, but the model has {layers} layers to spread")
    chosen, runs = (
        _by_module(outline, devices, options) if options.by_module else _by_strategy(outline.sizes, devices, options)
    )
    return Plan(
        model=model,
        commit=commit,
        outline=outline,
        stages=tuple(
            _stage(outline, device, Cut(first=first, end=end, num_layers=layers))
            for device, (first, end) in zip(chosen, runs, strict=True)
        ),
    )


def _by_strategy(
    sizes: ModelSizes, devices: Sequence[Device], options: PlanOptions
) -> tuple[Sequence[Device], list[tuple[int, int]]]:
    devices = _eligible(devices, options.device_map)
    if options.num_stages:
        devices = share_cpus(devices, options.num_stages)
        if options.num_stages > len(devices):
            raise InvalidRequestError(
                f"num_stages={options.num_stages}, but there are {len(devices)} devices: ask for fewer, or add some"
            )
    devices = limit_memory(devices, options.max_memory or {})
    if not devices:
        raise InvalidDeviceMapError("max_memory leaves no device to use: name one, with more than 0 bytes")
    if options.num_stages:
        if options.num_stages > len(devices):
            raise InvalidRequestError(f"num_stages={options.num_stages}, but max_memory leaves {len(devices)} devices")
        if options.device_map == "balanced_low_0" and options.num_stages < len(devices):
            devices = devices[1:]
        # The largest ones, in the cluster's order.
        kept = sorted(range(len(devices)), key=lambda index: (-devices[index].capacity_bytes, index))
        devices = [devices[index] for index in sorted(kept[: options.num_stages])]
        return devices, partition.balanced(sizes, devices)
    if options.device_map == "sequential":
        return partition.sequential(sizes, devices)
    if options.device_map == "balanced_low_0" and len(devices) > 1:
        # accelerate's meaning: leave the first device free for other work, as far as the rest suffices.
        with contextlib.suppress(OutOfMemoryError):
            return partition.fit(sizes, devices[1:])
    return partition.fit(sizes, devices)


def _eligible(devices: Sequence[Device], device_map: str) -> Sequence[Device]:
    """The devices that a strategy may use: GPUs (or their slots) where there are any, as accelerate has it."""
    if device_map == "cpu":
        cpus = [device for device in devices if device.kind == "cpu"]
        if not cpus:
            raise InvalidDeviceMapError('device_map="cpu", but no node offers a CPU worker')
        return cpus
    return [device for device in devices if device.kind == "cuda" or device.slots] or devices


def _by_module(
    outline: ModelOutline, devices: Sequence[Device], options: PlanOptions
) -> tuple[Sequence[Device], list[tuple[int, int]]]:
    """A device for each module, by the longest prefix that names it; runs must be contiguous."""
    assert options.by_module is not None
    wanted = {str(prefix): str(name) for prefix, name in options.by_module.items()}
    names = set(wanted.values())
    # "cpu", "cpu:0", "cpu:1" share the CPUs of a cluster without GPUs, or what it has beside them.
    devices = share_cpus(devices, max(len(devices), len(names)))
    devices = limit_memory(devices, options.max_memory or {})
    by_name = {name: find_device(name, devices) for name in sorted(names)}
    unused = {prefix for prefix in wanted if prefix}
    placed: dict[str, Device] = {}
    for module, _ in outline.modules:
        prefixes = [prefix for prefix in wanted if prefix in ("", module) or module.startswith(f"{prefix}.")]
        if not prefixes:
            raise InvalidDeviceMapError(f"device_map names no device for {module}; add it, or a default under ''")
        longest = max(prefixes, key=len)
        unused.discard(longest)
        placed[module] = by_name[wanted[longest]]
    known = [module for module, _ in outline.modules]
    for prefix in sorted(unused):
        if not any(
            module == prefix or module.startswith(f"{prefix}.") or prefix.startswith(f"{module}.") for module in known
        ):
            raise InvalidDeviceMapError(f"device_map names {prefix!r}, which is no module of this model")
        if any(
            prefix.startswith(f"{module}.") and wanted[prefix] != _name_of(placed[module], by_name) for module in known
        ):
            raise InvalidDeviceMapError(f"device_map splits {prefix.rsplit('.', 1)[0]!r}: a layer can't be cut")
    order = [(module, placed[module]) for module, place in outline.modules if place.part == "layer"]
    chosen: list[Device] = []
    runs: list[tuple[int, int]] = []
    for layer, (module, device) in enumerate(order):
        if chosen and chosen[-1] is device:
            runs[-1] = (runs[-1][0], layer + 1)
            continue
        if device in chosen:
            raise InvalidDeviceMapError(
                f"device_map returns to {device.path} at {module}: a stage is one run of layers"
            )
        chosen.append(device)
        runs.append((layer, layer + 1))
    for module, place in outline.modules:
        owner = {"embedding": chosen[0], "before": chosen[0], "after": chosen[-1]}.get(place.part)
        if owner is not None and placed[module] is not owner:
            raise InvalidDeviceMapError(
                f"device_map puts {module} on {placed[module].path}, but it belongs with "
                f"{'the first' if owner is chosen[0] else 'the last'} layer, on {owner.path}"
            )
    for device, (first, end) in zip(chosen, runs, strict=True):
        resident, _ = outline.sizes.stage(first, end)
        if resident > device.capacity_bytes:
            raise partition.does_not_fit(outline.sizes, devices)
    return chosen, runs


def _name_of(device: Device, by_name: Mapping[str, Device]) -> str:
    return next(name for name, known in by_name.items() if known is device)


def _stage(outline: ModelOutline, device: Device, cut: Cut) -> PlannedStage:
    resident, fetch = outline.sizes.stage(cut.first, cut.end)
    return PlannedStage(
        device=device,
        cut=cut,
        resident_bytes=resident,
        fetch_bytes=fetch,
        kv_bytes_per_token=sum(outline.sizes.kv_bytes_per_token[cut.first : cut.end]),
        # Each module once: what all stages share, or hold for tying, is named where it comes first.
        modules=tuple(
            module
            for module, place in outline.modules
            if place.held_by(cut, tied=False) and (place.part != "shared" or cut.is_first)
        ),
    )
