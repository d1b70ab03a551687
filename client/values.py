"""What a gateway tells of plans, loads and resident models, as plain values.

Sizes are bytes. `from_proto` reads the wire's form, `to_dict` gives the form that `--json` prints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..proto.v1 import registry_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A contiguous run of layers on one device. `first_layer` and `last_layer` are both included."""

    index: int
    node: str
    device: str
    first_layer: int
    last_layer: int
    resident_bytes: int
    fetch_bytes: int
    kv_bytes_per_token: int
    capacity_bytes: int = 0  # what the plan may use on the device; 0 when unknown
    modules: tuple[str, ...] = ()
    workspace_bytes: int = 0  # beside the weights: for activations and scratch
    kv_bytes: int = 0  # beside them: for keys and values of the tokens reserved
    predicted_load_seconds: float = 0.0  # 0 when no speed is known
    kv_budget_bytes: int = 0  # for keys and values of all sessions together; 0 when unknown

    @property
    def place(self) -> str:
        """Node and device."""
        return f"{self.node}/{self.device}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "node": self.node,
            "device": self.device,
            "layers": [self.first_layer, self.last_layer],
            "resident_bytes": self.resident_bytes,
            "fetch_bytes": self.fetch_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "capacity_bytes": self.capacity_bytes,
            "workspace_bytes": self.workspace_bytes,
            "kv_bytes": self.kv_bytes,
            "kv_budget_bytes": self.kv_budget_bytes,
            "predicted_load_seconds": self.predicted_load_seconds or None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCapacity:
    """A device that a plan could choose. `capacity_bytes`: what may be used of it; 0 where something else holds it."""

    node: str
    device: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which layers go where, and how many bytes that takes.

    predicted_load_seconds: until all stages are resident, once their workers are there; 0 when no speed is known.
    load_bottleneck: "link" or "conversion", of the stage `load_bottleneck_stage`. link_bytes_per_second: from the
    source to one node, as given, or as an earlier load has measured it. kv_tokens: tokens of all sessions together
    whose keys and values have room on every stage; 0 when unknown. notes: what to know before the load.
    """

    model: str
    quantization: str
    total_resident_bytes: int
    total_fetch_bytes: int
    stages: tuple[StagePlan, ...]
    dtype: str = ""
    commit: str = ""
    devices: tuple[DeviceCapacity, ...] = ()
    predicted_load_seconds: float = 0.0
    load_bottleneck: str = ""
    load_bottleneck_stage: int = 0
    link_bytes_per_second: float = 0.0
    link_is_measured: bool = False
    kv_tokens: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, plan: registry_pb2.Plan) -> Plan:
        return cls(
            model=plan.model,
            quantization=plan.quantization,
            total_resident_bytes=plan.total_resident_bytes,
            total_fetch_bytes=plan.total_fetch_bytes,
            stages=tuple(
                StagePlan(
                    index=stage.index,
                    node=stage.node,
                    device=stage.device,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    resident_bytes=stage.resident_bytes,
                    fetch_bytes=stage.fetch_bytes,
                    kv_bytes_per_token=stage.kv_bytes_per_token,
                    capacity_bytes=stage.capacity_bytes,
                    modules=tuple(stage.modules),
                    workspace_bytes=stage.workspace_bytes,
                    kv_bytes=stage.kv_bytes,
                    predicted_load_seconds=stage.predicted_load_seconds,
                    kv_budget_bytes=stage.kv_budget_bytes,
                )
                for stage in plan.stages
            ),
            dtype=plan.dtype,
            commit=plan.commit,
            devices=tuple(
                DeviceCapacity(node=device.node, device=device.device, capacity_bytes=device.capacity_bytes)
                for device in plan.devices
            ),
            predicted_load_seconds=plan.predicted_load_seconds,
            load_bottleneck=plan.load_bottleneck,
            load_bottleneck_stage=plan.load_bottleneck_stage,
            link_bytes_per_second=plan.link_bytes_per_second,
            link_is_measured=plan.link_is_measured,
            kv_tokens=plan.kv_tokens,
            notes=tuple(plan.notes),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "quantization": self.quantization,
            "total_resident_bytes": self.total_resident_bytes,
            "total_fetch_bytes": self.total_fetch_bytes,
            "stages": [stage.to_dict() for stage in self.stages],
            "kv_tokens": self.kv_tokens,
            "notes": list(self.notes),
            "predicted_load_seconds": self.predicted_load_seconds or None,
            "load_bottleneck": self.load_bottleneck or None,
            "link_bytes_per_second": self.link_bytes_per_second or None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleResidency:
    """One module's parameters and buffers as they lie on its device. `dtype` is "bfloat16", "nf4", "int8", …"""

    dtype: str
    bytes: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "bytes": self.bytes, "device": self.device}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """What a load spent in "fetch", "wait", "quantize", …: seconds, summed over threads, and the bytes of it."""

    seconds: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "bytes": self.bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """How one stage's load went.

    cached_bytes: read from its node's cache of quantized parts, in place of the checkpoint. bottleneck: the phase
    without which it would have been shorter. link: what the bytes came over, in words. connections: reads at a time.
    """

    seconds: float
    cached_bytes: int
    bottleneck: str
    link: str
    connections: int
    phases: dict[str, PhaseTime]

    @classmethod
    def from_proto(cls, load: registry_pb2.StageLoad) -> StageLoad:
        return cls(
            seconds=load.seconds,
            cached_bytes=load.cached_bytes,
            bottleneck=load.bottleneck,
            link=load.link,
            connections=load.connections,
            phases={phase.name: PhaseTime(seconds=phase.seconds, bytes=phase.bytes) for phase in load.phases},
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "cached_bytes": self.cached_bytes,
            "bottleneck": self.bottleneck,
            "link": self.link,
            "connections": self.connections,
            "phases": {name: phase.to_dict() for name, phase in self.phases.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResidency:
    """What one stage holds, measured on its device, and how it got there. `modules`: module name → what it holds."""

    stage: int
    measured_bytes: int
    fetched_bytes: int
    modules: dict[str, ModuleResidency]
    load: StageLoad

    @classmethod
    def from_proto(cls, residency: registry_pb2.StageResidency) -> StageResidency:
        return cls(
            stage=residency.stage,
            measured_bytes=residency.measured_bytes,
            fetched_bytes=residency.fetched_bytes,
            modules={
                module.module: ModuleResidency(dtype=module.dtype, bytes=module.bytes, device=module.device)
                for module in residency.modules
            },
            load=StageLoad.from_proto(residency.load),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "measured_bytes": self.measured_bytes,
            "fetched_bytes": self.fetched_bytes,
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
            "load": self.load.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter on a resident model. kind: "LORA", "IA3", … stage_bytes: what it takes of each stage's device, as
    measured. commit: as its workers have read it. config: its adapter_config.json."""

    name: str
    path: str
    commit: str
    kind: str
    stage_bytes: tuple[int, ...]
    config: dict[str, Any]

    @classmethod
    def from_proto(cls, adapter: registry_pb2.Adapter) -> Adapter:
        return cls(
            name=adapter.name,
            path=adapter.path,
            commit=adapter.commit,
            kind=adapter.kind,
            stage_bytes=tuple(adapter.stage_bytes),
            config=json.loads(adapter.config_json or "{}"),
        )

    @property
    def bytes(self) -> int:
        """On all devices together."""
        return sum(self.stage_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": self.path,
            "commit": self.commit,
            "kind": self.kind,
            "bytes": self.bytes,
            "stage_bytes": list(self.stage_bytes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One model in the registry. `state` is "loading", "ready", "recovering", "unavailable" or "unloading".

    recoveries: how often lost stages were brought back. recovery_seconds: how long that took the last time. adapters:
    those that are attached. default_adapters: what computes where a request doesn't say. moves: how often stages were
    moved off nodes that were drained. drained_nodes: those that are drained and hold a stage still.
    """

    name: str
    state: str
    path: str
    reason: str  # why it is not ready, in one line
    plan: Plan
    residency: tuple[StageResidency, ...]  # one per stage; empty until the model is ready
    config_json: str
    generation_config_json: str
    load_seconds: float
    recoveries: int = 0
    recovery_seconds: float = 0.0
    quantization_config_json: str = ""
    # As transformers counts a model's footprint; None until it has been measured.
    parameter_bytes: int | None = None
    buffer_bytes: int = 0
    adapters: tuple[Adapter, ...] = ()
    default_adapters: tuple[str, ...] = ()
    moves: int = 0
    drained_nodes: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, info: registry_pb2.ModelInfo) -> ModelInfo:
        state = registry_pb2.ModelState.Name(info.state) if info.state in registry_pb2.ModelState.values() else ""
        return cls(
            name=info.name,
            state=state.removeprefix("MODEL_STATE_").lower() or "unspecified",
            path=info.path,
            reason=info.reason,
            plan=Plan.from_proto(info.plan),
            residency=tuple(StageResidency.from_proto(stage) for stage in info.residency),
            config_json=info.config_json,
            generation_config_json=info.generation_config_json,
            load_seconds=info.load_seconds,
            recoveries=info.recoveries,
            recovery_seconds=info.recovery_seconds,
            quantization_config_json=info.quantization_config_json,
            parameter_bytes=info.footprint.parameter_bytes if info.HasField("footprint") else None,
            buffer_bytes=info.footprint.buffer_bytes,
            adapters=tuple(Adapter.from_proto(adapter) for adapter in info.adapters),
            default_adapters=tuple(info.default_adapters),
            moves=info.moves,
            drained_nodes=tuple(info.drained_nodes),
        )

    @property
    def measured_bytes(self) -> int | None:
        """What all stages hold together; None until it has been measured."""
        return sum(stage.measured_bytes for stage in self.residency) if self.residency else None

    def summary(self) -> dict[str, Any]:
        """A line of `list --json`."""
        return {
            "name": self.name,
            "state": self.state,
            "path": self.path,
            "model": self.plan.model,
            "quantization": self.plan.quantization,
            "stages": len(self.plan.stages),
            "total_resident_bytes": self.plan.total_resident_bytes,
            "measured_bytes": self.measured_bytes,
            "reason": self.reason,
            "drained_nodes": list(self.drained_nodes),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan's form, with what was measured beside each prediction."""
        measured = {stage.stage: stage for stage in self.residency}
        values = {"name": self.name, "state": self.state, "path": self.path, **self.plan.to_dict()}
        values["stages"] = [
            {
                **stage.to_dict(),
                "measured_bytes": measured[stage.index].measured_bytes if stage.index in measured else None,
                "fetched_bytes": measured[stage.index].fetched_bytes if stage.index in measured else None,
                "modules": measured[stage.index].to_dict()["modules"] if stage.index in measured else {},
                "load": measured[stage.index].load.to_dict() if stage.index in measured else None,
            }
            for stage in self.plan.stages
        ]
        values["measured_bytes"] = self.measured_bytes
        values["load_seconds"] = self.load_seconds
        values["recoveries"] = self.recoveries
        values["recovery_seconds"] = self.recovery_seconds
        values["adapters"] = [adapter.to_dict() for adapter in self.adapters]
        values["default_adapters"] = list(self.default_adapters)
        values["moves"] = self.moves
        values["drained_nodes"] = list(self.drained_nodes)
        values["commit"] = self.plan.commit
        values["dtype"] = self.plan.dtype
        values["reason"] = self.reason
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPart:
    """A quantized part of a model that a node keeps. used_unix_s: when it was last read or written. about: what it is:
    model, commit, layers, quantization, dtype, device and versions."""

    node: str
    key: str
    bytes: int
    used_unix_s: float
    quantization: str
    about: dict[str, Any]

    @classmethod
    def from_proto(cls, part: registry_pb2.CachedPart) -> CachedPart:
        return cls(
            node=part.node,
            key=part.key,
            bytes=part.bytes,
            used_unix_s=part.used_unix_s,
            quantization=part.quantization,
            about=json.loads(part.about_json or "{}"),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "key": self.key,
            "bytes": self.bytes,
            "used_unix_s": self.used_unix_s,
            **self.about,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStarted:
    """`commit` is what every worker will read."""

    name: str
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlaced:
    stage: int
    node: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """How far a stage is. The bytes are the checkpoint's, or, if `cached`, of a part in its node's cache.

    seconds_left: until all is resident; 0 when unknown.
    """

    stage: int
    fetched_bytes: int
    fetch_bytes: int
    tensors_loaded: int
    tensors: int
    resident_bytes: int
    done: bool
    bytes_per_second: float = 0.0
    seconds_left: float = 0.0
    cached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWarning:
    message: str


LoadEvent = LoadStarted | Plan | StagePlaced | StageProgress | LoadWarning | ModelInfo


def load_event(response: registry_pb2.LoadModelResponse) -> LoadEvent | None:
    """The event in `response`; None for one that this client is too old to know."""
    match response.WhichOneof("event"):
        case "started":
            return LoadStarted(name=response.started.name, commit=response.started.commit)
        case "planned":
            return Plan.from_proto(response.planned)
        case "placed":
            placed = response.placed
            return StagePlaced(stage=placed.stage, node=placed.node, device=placed.device)
        case "progress":
            progress = response.progress
            return StageProgress(
                stage=progress.stage,
                fetched_bytes=progress.fetched_bytes,
                fetch_bytes=progress.fetch_bytes,
                tensors_loaded=progress.tensors_loaded,
                tensors=progress.tensors,
                resident_bytes=progress.resident_bytes,
                done=progress.done,
                bytes_per_second=progress.bytes_per_second,
                seconds_left=progress.seconds_left,
                cached=progress.cached,
            )
        case "warning":
            return LoadWarning(message=response.warning)
        case "ready":
            return ModelInfo.from_proto(response.ready)
        case _:
            return None
