"""A plan: stages with devices, layers and predicted bytes. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidDeviceMapError, InvalidRequestError, OutOfMemoryError
from ..worker.anatomy import Cut, Place
from ..worker.byte_sizes import format_size
from . import partition
from .devices import Device, find_device, gpus_or_all, limit_memory, share_cpus
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
    """The devices that a strategy may use: a CPU beside GPUs is not one of them, as with accelerate."""
    if device_map != "cpu":
        return gpus_or_all(devices)
    cpus = [device for device in devices if device.kind == "cpu"]
    if not cpus:
        raise InvalidDeviceMapError('device_map="cpu", but no node offers a CPU worker')
    return cpus


def _by_module(
    outline: ModelOutline, devices: Sequence[Device], options: PlanOptions
) -> tuple[Sequence[Device], list[tuple[int, int]]]:
    """A device for each module, by the longest prefix that names it; runs must be contiguous."""
    assert options.by_module is not None
    wanted = {str(prefix): str(name) for prefix, name in options.by_module.items()}
    names = set(wanted.values())
    devices = _with_shares(devices, names)
    limited = {device.path: device for device in limit_memory(devices, options.max_memory or {})}
    by_name: dict[str, Device] = {}
    for name in sorted(names):
        path = find_device(name, devices).path
        if path not in limited:
            raise InvalidDeviceMapError(f"device_map names {path}, which max_memory leaves out: give it memory there")
        by_name[name] = limited[path]
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
        for module in known:
            if prefix.startswith(f"{module}.") and by_name[wanted[prefix]] is not placed[module]:
                raise InvalidDeviceMapError(
                    f"device_map puts {prefix} on {by_name[wanted[prefix]].path} and the rest of {module} on "
                    f"{placed[module].path}: a layer can't be cut"
                )
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
            raise OutOfMemoryError(
                f"device_map puts {format_size(resident)} (layers {first} to {end - 1}) on {device.path}, of which "
                f"{format_size(device.capacity_bytes)} may be used: put modules elsewhere, quantize to 4 bits, or "
                "raise max_memory"
            )
    if options.num_stages not in (0, len(runs)):
        raise InvalidDeviceMapError(
            f"num_stages={options.num_stages}, but device_map makes {len(runs)} stages: leave one of them out"
        )
    return chosen, runs


def _with_shares(devices: Sequence[Device], names: set[str]) -> Sequence[Device]:
    """`devices` with CPUs split where `names` ask for shares: "cpu:0" and "cpu:1", or 0 and 1 where there is no GPU."""

    def is_unknown(name: str) -> bool:
        try:
            find_device(name, devices)
        except InvalidDeviceMapError:
            return True
        return False

    unknown = sum(is_unknown(name) for name in names)
    if not unknown:
        return devices
    cpus = [device for device in devices if device.kind == "cpu" and not device.slots]
    gpus = len(devices) - len(cpus)
    return share_cpus(devices, gpus + max(len(cpus), unknown if gpus else len(names)))


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
