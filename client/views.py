"""The cluster as a gateway tells it at one moment, as plain values. Sizes are bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..proto.v1 import registry_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A GPU, or ("cpu") the memory of a node. total_bytes: 0 when unknown. free_bytes: nobody's."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    node: str
    alive: bool
    is_head: bool
    devices: tuple[DeviceView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadView:
    """How far a stage's load is. seconds_left: 0 when unknown."""

    fetched_bytes: int
    fetch_bytes: int
    tensors_loaded: int
    tensors: int
    bytes_per_second: float
    seconds_left: float
    cached: bool
    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """A stage. resident_bytes: measured; until then, as planned. kv_bytes of kv_budget_bytes: of all sessions.

    answers: whether its worker has. progress: while it loads.
    """

    index: int
    node: str
    device: str
    first_layer: int
    last_layer: int
    resident_bytes: int
    kv_bytes: int
    kv_budget_bytes: int
    sessions: int
    answers: bool
    progress: LoadView | None

    @property
    def place(self) -> str:
        return f"{self.node}/{self.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """A model. state: as in ModelInfo. load_seconds: how long the load took, or has taken until now.

    reserved_tokens of kv_tokens: promised to sessions; kv_tokens is 0 when unknown. generated_tokens: since the last
    stage's worker was started.
    """

    name: str
    state: str
    reason: str
    path: str
    quantization: str
    stages: tuple[StageView, ...]
    recoveries: int
    recovery_seconds: float
    load_seconds: float
    sessions_running: int
    sessions_waiting: int
    max_sessions: int
    reserved_tokens: int
    kv_tokens: int
    generated_tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """What has happened. kind: "load-started", "stages-lost", … count: how often, without another one between."""

    unix_s: float
    kind: str
    model: str
    text: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Nodes, models and the latest events (the last one last) at `unix_s`, in seconds since 1970."""

    unix_s: float
    nodes: tuple[NodeView, ...]
    models: tuple[ModelView, ...]
    events: tuple[ClusterEvent, ...]

    @classmethod
    def from_proto(cls, view: registry_pb2.ClusterView) -> ClusterView:
        return cls(
            unix_s=view.unix_s,
            nodes=tuple(
                NodeView(
                    node=node.node,
                    alive=node.alive,
                    is_head=node.is_head,
                    devices=tuple(
                        DeviceView(
                            device=device.device,
                            name=device.name,
                            total_bytes=device.total_bytes,
                            free_bytes=device.free_bytes,
                        )
                        for device in node.devices
                    ),
                )
                for node in view.nodes
            ),
            models=tuple(_model(model) for model in view.models),
            events=tuple(
                ClusterEvent(
                    unix_s=event.unix_s, kind=event.kind, model=event.model, text=event.text, count=event.count
                )
                for event in view.events
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _model(model: registry_pb2.ModelView) -> ModelView:
    state = registry_pb2.ModelState.Name(model.state) if model.state in registry_pb2.ModelState.values() else ""
    return ModelView(
        name=model.name,
        state=state.removeprefix("MODEL_STATE_").lower() or "unspecified",
        reason=model.reason,
        path=model.path,
        quantization=model.quantization,
        stages=tuple(_stage(stage) for stage in model.stages),
        recoveries=model.recoveries,
        recovery_seconds=model.recovery_seconds,
        load_seconds=model.load_seconds,
        sessions_running=model.sessions_running,
        sessions_waiting=model.sessions_waiting,
        max_sessions=model.max_sessions,
        reserved_tokens=model.reserved_tokens,
        kv_tokens=model.kv_tokens,
        generated_tokens=model.generated_tokens,
        tokens_per_second=model.tokens_per_second,
    )


def _stage(stage: registry_pb2.StageView) -> StageView:
    progress = stage.progress
    return StageView(
        index=stage.index,
        node=stage.node,
        device=stage.device,
        first_layer=stage.first_layer,
        last_layer=stage.last_layer,
        resident_bytes=stage.resident_bytes,
        kv_bytes=stage.kv_bytes,
        kv_budget_bytes=stage.kv_budget_bytes,
        sessions=stage.sessions,
        answers=stage.answers,
        progress=LoadView(
            fetched_bytes=progress.fetched_bytes,
            fetch_bytes=progress.fetch_bytes,
            tensors_loaded=progress.tensors_loaded,
            tensors=progress.tensors,
            bytes_per_second=progress.bytes_per_second,
            seconds_left=progress.seconds_left,
            cached=progress.cached,
            done=progress.done,
        )
        if stage.HasField("progress")
        else None,
    )
