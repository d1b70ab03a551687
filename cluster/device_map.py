"""A device map that names modules: which layers it puts where, and what is wrong with one that can't be met. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..proto.v1.errors import InvalidDeviceMapError
from ..worker.anatomy import Place
from .devices import Device, device_finder, limit_memory, share_cpus
from .partition import Runs
from .refusal import Circumstances, stage_does_not_fit
from .sizes import ModelSizes

# Name and place of each module that a map must give a device.
Modules = Sequence[tuple[str, Place]]


def place_by_module(
    sizes: ModelSizes,
    modules: Modules,
    devices: Sequence[Device],
    *,
    by_module: Mapping[str, str],
    max_memory: Mapping[str, str],
    circumstances: Circumstances,
) -> tuple[list[Device], Runs]:
    """Device and layers of each stage, in order. `by_module`: module prefix -> device; the longest prefix counts.

    Raises InvalidDeviceMapError, InvalidRequestError and OutOfMemoryError.
    """
    wanted = {str(prefix): str(name) for prefix, name in by_module.items()}
    by_name = _devices_named(sorted(set(wanted.values())), devices, max_memory)
    given = {prefix: by_name[name] for prefix, name in wanted.items()}
    placed = _placed(modules, given)
    chosen, runs = _stages(modules, placed)
    _check_ends(modules, placed, chosen)
    _check_cuts(sizes, modules, runs)
    for device, run in zip(chosen, runs, strict=True):
        first, end = run
        needed = sizes.stage(first, end)[0] + sizes.workspace_bytes
        if needed + sizes.kv_bytes(first, end, circumstances.reserve_tokens) > device.capacity_bytes:
            raise stage_does_not_fit(sizes, device, run, circumstances)
    return chosen, runs


def _devices_named(names: Sequence[str], devices: Sequence[Device], max_memory: Mapping[str, str]) -> dict[str, Device]:
    """The device that each name means, with what max_memory leaves of it."""
    devices = _with_shares(devices, names)
    limited = {device.path: device for device in limit_memory(devices, max_memory)}
    find = device_finder(devices)
    by_name: dict[str, Device] = {}
    for name in names:
        path = find(name).path
        if path not in limited:
            raise InvalidDeviceMapError(f"device_map names {path}, which max_memory leaves out: give it memory there")
        by_name[name] = limited[path]
    return by_name


def _with_shares(devices: Sequence[Device], names: Sequence[str]) -> Sequence[Device]:
    """`devices` with CPUs split where `names` ask for shares: "cpu:0" and "cpu:1", or 0 and 1 where there is no GPU."""
    find = device_finder(devices)

    def is_unknown(name: str) -> bool:
        try:
            find(name)
        except InvalidDeviceMapError:
            return True
        return False

    unknown = sum(is_unknown(name) for name in names)
    if not unknown:
        return devices
    cpus = [device for device in devices if device.kind == "cpu" and not device.slots]
    gpus = len(devices) - len(cpus)
    return share_cpus(devices, gpus + max(len(cpus), unknown if gpus else len(names)))


def _placed(modules: Modules, given: Mapping[str, Device]) -> dict[str, Device]:
    """The device of each module, by the longest prefix that names it. No prefix may be without effect."""
    placed: dict[str, Device] = {}
    used = set()
    for module, _ in modules:
        prefix = next((prefix for prefix in _prefixes(module) if prefix in given), None)
        if prefix is None:
            raise InvalidDeviceMapError(f"device_map names no device for {module}; add it, or a default under ''")
        used.add(prefix)
        placed[module] = given[prefix]
    for prefix in sorted(given.keys() - used - {""}):
        inside = [module for module in placed if prefix.startswith(f"{module}.")]
        for module in inside:
            if given[prefix] is not placed[module]:
                raise InvalidDeviceMapError(
                    f"device_map puts {prefix} on {given[prefix].path} and the rest of {module} on "
                    f"{placed[module].path}: a layer can't be cut"
                )
        below = [module for module in placed if module.startswith(f"{prefix}.")]
        if not inside and not below:
            raise InvalidDeviceMapError(f"device_map names {prefix[:80]!r}, which is no module of this model")
        # A map that says the same twice is a map all the same; one that overrides itself throughout is a mistake.
        if below and all(placed[module] is not given[prefix] for module in below):
            raise InvalidDeviceMapError(
                f"device_map puts {prefix} on {given[prefix].path}, but longer prefixes put each module of it "
                "elsewhere: leave it out, or leave those out"
            )
    return placed


def _prefixes(module: str) -> list[str]:
    """All prefixes of a module's name that end at a dot, longest first: "a.b" -> "a.b", "a", ""."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _stages(modules: Modules, placed: Mapping[str, Device]) -> tuple[list[Device], Runs]:
    chosen: list[Device] = []
    runs: Runs = []
    layers = [module for module, place in modules if place.part == "layer"]
    for layer, module in enumerate(layers):
        device = placed[module]
        if chosen and chosen[-1] is device:
            runs[-1] = (runs[-1][0], layer + 1)
            continue
        if device in chosen:
            raise InvalidDeviceMapError(
                f"device_map returns to {device.path} at {module}: a stage is one run of layers; put {module} on "
                f"{chosen[-1].path}, or on a device that has none yet"
            )
        chosen.append(device)
        runs.append((layer, layer + 1))
    return chosen, runs


def _check_ends(modules: Modules, placed: Mapping[str, Device], chosen: Sequence[Device]) -> None:
    """What stands before and after the layers belongs to the first and the last stage."""
    for module, place in modules:
        owner = {"embedding": chosen[0], "before": chosen[0], "after": chosen[-1]}.get(place.part)
        if owner is not None and placed[module] is not owner:
            raise InvalidDeviceMapError(
                f"device_map puts {module} on {placed[module].path}, but it belongs with "
                f"{'the first' if owner is chosen[0] else 'the last'} layer, on {owner.path}"
            )


def _check_cuts(sizes: ModelSizes, modules: Modules, runs: Runs) -> None:
    layers = [module for module, place in modules if place.part == "layer"]
    for first, _ in runs:
        if not sizes.may_begin(first):
            raise InvalidDeviceMapError(
                f"device_map cuts between {layers[first - 1]} and {layers[first]}, which must be on one device: what "
                "the one makes the other needs"
            )
