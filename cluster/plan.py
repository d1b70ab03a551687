"""A plan: stages with devices, layers and predicted bytes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidDeviceMapError, InvalidRequestError
from ..worker.anatomy import Cut, Place
from . import partition
from .device_map import place_by_module
from .devices import Device, gpus_or_all, limit_memory, share_cpus
from .load_time import Speeds, StageLoad, predict
from .refusal import Circumstances
from .sizes import ModelSizes

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")
# Keys and values for more than this have never been asked of a model.
_MOST_TOKENS = 1 << 40
# A cache grows by making a longer one: for a moment a layer has both.
_KV_PART_OF_GPU = 0.9
_KV_PART_OF_NODE = 0.25
# Of what is left then, for as long as a prompt is computed; other models' prompts take theirs from it, too.
_PROMPT_PART_OF_NODE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutline:
    """What the planner needs to know of a model.

    modules: name and place of each one that a device map names. lighter: what it would weigh, loaded another way: the
    option that does it, as a user would write it -> sizes; for the words of a refusal. notes: what the user should know
    of how it is loaded, a line each. is_fixed: that the checkpoint is quantized, and held as it is.
    """

    sizes: ModelSizes
    modules: tuple[tuple[str, Place], ...]
    tied: bool
    quantization: str
    dtype: str
    lighter: tuple[tuple[str, ModelSizes], ...] = ()
    notes: tuple[str, ...] = ()
    is_fixed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """How the user wants the model spread.

    device_map: names are accelerate's, and mean what they mean there. "auto" and "balanced": spread as evenly as can
    be; "balanced_low_0": with as little on the first device as the others allow; "sequential": each device full before
    the next; "cpu": CPU workers alone. by_module: module prefix -> device, in place of `device_map`.
    num_stages: exactly so many; 0 for as many as are best. reserve_tokens: tokens whose keys and values must have room
    beside the weights, over all sequences.
    """

    device_map: str = "auto"
    by_module: Mapping[str, str] | None = None
    max_memory: Mapping[str, str] | None = None
    num_stages: int = 0
    reserve_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """workspace_bytes, kv_bytes: what the plan leaves room for beside `resident_bytes`, on its device.

    kv_budget_bytes: what all sessions' keys and values may take there.
    """

    device: Device
    cut: Cut
    resident_bytes: int
    fetch_bytes: int
    kv_bytes_per_token: int
    modules: tuple[str, ...]
    workspace_bytes: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        """As `room_bytes`."""
        return room_bytes(
            is_gpu=self.device.kind == "cuda",
            capacity_bytes=self.device.capacity_bytes,
            resident_bytes=self.resident_bytes,
            workspace_bytes=self.workspace_bytes,
            kv_budget_bytes=self.kv_budget_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: str
    commit: str
    outline: ModelOutline
    stages: tuple[PlannedStage, ...]
    devices: tuple[Device, ...] = ()

    @property
    def kv_tokens(self) -> int:
        """Tokens of all sessions together whose keys and values have room on every stage."""
        return min(
            (stage.kv_budget_bytes // stage.kv_bytes_per_token for stage in self.stages if stage.kv_bytes_per_token),
            default=0,
        )

    def to_message(self, speeds: Speeds | None = None) -> registry_pb2.Plan:
        """With the time that a load will take, as far as `speeds` are known."""
        speeds = speeds or Speeds()
        predicted = predict(
            [
                StageLoad(node=stage.device.node, kind=stage.device.kind, fetch_bytes=stage.fetch_bytes)
                for stage in self.stages
            ],
            speeds,
        )
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
                    workspace_bytes=stage.workspace_bytes,
                    kv_bytes=stage.kv_bytes,
                    kv_budget_bytes=stage.kv_budget_bytes,
                    predicted_load_seconds=predicted.seconds[index] if predicted else 0.0,
                )
                for index, stage in enumerate(self.stages)
            ],
            devices=[
                registry_pb2.DeviceCapacity(node=device.node, device=device.name, capacity_bytes=device.capacity_bytes)
                for device in self.devices
            ],
            predicted_load_seconds=max(predicted.seconds) if predicted else 0.0,
            load_bottleneck=predicted.bottleneck if predicted else "",
            load_bottleneck_stage=predicted.slowest if predicted else 0,
            link_bytes_per_second=speeds.link,
            link_is_measured=speeds.is_measured,
            kv_tokens=self.kv_tokens,
            notes=self.outline.notes,
        )


def room_bytes(
    *, is_gpu: bool, capacity_bytes: int, resident_bytes: int, workspace_bytes: int, kv_budget_bytes: int
) -> int:
    """What keys, values and the computing of prompts may take together on a stage's device.

    Of a GPU what is set aside for them. Of a node's memory a part of what the plan leaves, too.
    """
    set_aside = workspace_bytes + kv_budget_bytes
    left = 0 if is_gpu else max(0, capacity_bytes - resident_bytes - set_aside)
    return set_aside + int(left * _PROMPT_PART_OF_NODE)


def make_plan(model: str, commit: str, outline: ModelOutline, devices: Sequence[Device], options: PlanOptions) -> Plan:
    """Lays the model over `devices`. Raises InvalidRequestError, InvalidDeviceMapError and OutOfMemoryError."""
    if options.device_map not in DEVICE_MAPS:
        raise InvalidDeviceMapError(
            f"device_map {options.device_map!r} is none of {', '.join(DEVICE_MAPS)}, nor a dict"
        )
    if not 0 <= options.reserve_tokens <= _MOST_TOKENS:
        raise InvalidRequestError(f"reserve_tokens={options.reserve_tokens}: write 0, or {_MOST_TOKENS} at most")
    sizes = outline.sizes
    layers = len(sizes.layers)
    if options.num_stages < 0:
        raise InvalidRequestError(f"num_stages={options.num_stages}: write 1 or more, or leave it out")
    if options.num_stages > layers:
        raise InvalidRequestError(f"num_stages={options.num_stages}, but the model has {layers} layers to spread")
    parts = sum(sizes.may_begin(layer) for layer in range(layers))
    if options.num_stages > parts:
        raise InvalidRequestError(
            f"num_stages={options.num_stages}, but this model's layers can be cut into {parts} stages at most"
        )
    circumstances = Circumstances(
        reserve_tokens=options.reserve_tokens,
        quantization=outline.quantization,
        lighter=outline.lighter,
        is_fixed=outline.is_fixed,
        is_limited=bool(options.max_memory),
    )
    if options.by_module:
        chosen, runs = place_by_module(
            sizes,
            outline.modules,
            devices,
            by_module=options.by_module,
            max_memory=options.max_memory or {},
            circumstances=circumstances,
        )
        if options.num_stages not in (0, len(runs)):
            raise InvalidDeviceMapError(
                f"num_stages={options.num_stages}, but device_map makes {len(runs)} stages: leave one of them out"
            )
    else:
        chosen, runs = _by_strategy(sizes, devices, options, circumstances)
    return Plan(
        model=model,
        commit=commit,
        outline=outline,
        stages=tuple(
            _stage(outline, device, Cut(first=first, end=end, num_layers=layers), options.reserve_tokens)
            for device, (first, end) in zip(chosen, runs, strict=True)
        ),
        devices=_as_divided(devices, chosen),
    )


def _as_divided(devices: Sequence[Device], chosen: Sequence[Device]) -> tuple[Device, ...]:
    """`devices`, with a CPU that stages share as the shares that were `chosen`."""
    paths = {device.path for device in devices}
    shares: dict[str, list[Device]] = {}
    for device in chosen:
        if device.path not in paths:
            shares.setdefault(device.path.rpartition(":")[0], []).append(device)
    return tuple(each for device in devices for each in shares.get(device.path, [device]))


def _by_strategy(
    sizes: ModelSizes, devices: Sequence[Device], options: PlanOptions, circumstances: Circumstances
) -> tuple[list[Device], partition.Runs]:
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
    if options.num_stages > len(devices):
        raise InvalidRequestError(f"num_stages={options.num_stages}, but max_memory leaves {len(devices)} devices")
    strategy = {"sequential": partition.sequential, "balanced_low_0": partition.sparing_first}
    lay = strategy.get(options.device_map, partition.fit)
    return lay(sizes, devices, num_stages=options.num_stages, circumstances=circumstances)


def _eligible(devices: Sequence[Device], device_map: str) -> Sequence[Device]:
    """The devices that a strategy may use: a CPU beside GPUs is not one of them, as with accelerate."""
    if device_map != "cpu":
        return gpus_or_all(devices)
    cpus = [device for device in devices if device.kind == "cpu"]
    if not cpus:
        raise InvalidDeviceMapError('device_map="cpu", but no node offers a CPU worker')
    return cpus


def _stage(outline: ModelOutline, device: Device, cut: Cut, reserve_tokens: int) -> PlannedStage:
    resident, fetch = outline.sizes.stage(cut.first, cut.end)
    kv_bytes = outline.sizes.kv_bytes(cut.first, cut.end, reserve_tokens)
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
        workspace_bytes=outline.sizes.workspace_bytes,
        kv_bytes=kv_bytes,
        kv_budget_bytes=_kv_budget(device, device.capacity_bytes - resident - outline.sizes.workspace_bytes, kv_bytes),
    )


def _kv_budget(device: Device, left_bytes: int, reserved_bytes: int) -> int:
    """What keys and values may take of the `left_bytes` of a device.

    A GPU is the stage's own. A node's memory is shared: what is reserved is what there is, or where nothing was asked
    for a part of what is left, so that other models fit beside it.
    """
    if device.kind == "cuda":
        return max(int(left_bytes * _KV_PART_OF_GPU), reserved_bytes)
    return reserved_bytes or max(int(left_bytes * _KV_PART_OF_NODE), 0)
