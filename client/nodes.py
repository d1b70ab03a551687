"""The cluster's nodes, what is moved off them, and what an examination finds: plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InternalError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAt:
    """A stage of a model, by its place."""

    model: str
    stage: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """A node of the cluster. drained: kept out of new plans; by_ray: since Ray itself is about to end it."""

    name: str
    node_id: str
    hostname: str
    drained: bool
    by_ray: bool
    stages: tuple[StageAt, ...]

    @classmethod
    def from_proto(cls, node: registry_pb2.NodeInfo) -> NodeInfo:
        return cls(
            name=node.name,
            node_id=node.node_id,
            hostname=node.hostname,
            drained=node.drained,
            by_ray=node.by_ray,
            stages=tuple(StageAt(model=each.model, stage=each.stage, device=each.device) for each in node.stages),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages]}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMove:
    """A stage that goes from one device to another. seconds: from the beginning of its load there to its use;
    pause_seconds: of these, for how long calls waited. Both are 0 while it loads."""

    model: str
    stage: int
    source: str
    target: str
    seconds: float = 0.0
    pause_seconds: float = 0.0

    @classmethod
    def from_proto(cls, move: registry_pb2.StageMove) -> StageMove:
        return cls(
            model=move.model,
            stage=move.stage,
            source=f"{move.from_node}/{move.from_device}",
            target=f"{move.to_node}/{move.to_device}",
            seconds=move.seconds,
            pause_seconds=move.pause_seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        what = f"stage {self.stage} of {self.model}"
        if not self.seconds:
            return f"{what}: {self.source} → {self.target}, loading"
        return (
            f"{what}: on {self.target} after {self.seconds:.1f} s; calls waited for {self.pause_seconds:.1f} s of them"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check of a machine, or of what lies between two. verdict: "ok", "warn" or "fail". node: empty for what
    concerns all, or this machine."""

    check: str
    verdict: str
    finding: str
    remedy: str = ""
    node: str = ""

    @classmethod
    def from_proto(cls, finding: registry_pb2.Finding) -> Finding:
        return cls(
            check=finding.check,
            verdict=registry_pb2.Verdict.Name(finding.verdict).removeprefix("VERDICT_").lower(),
            finding=finding.finding,
            remedy=finding.remedy,
            node=finding.node,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def version_finding(gateway: str, own: str | None = None) -> Finding:
    """Whether a client and a gateway of these versions understand each other: the same minor version does."""
    from .. import __version__  # the package is not whole yet when this module is imported

    own = own or __version__
    if gateway == own:
        return Finding(check="gateway-version", verdict="ok", finding=f"shardlift {own}, as here")
    alike = gateway.split(".")[:2] == own.split(".")[:2]
    return Finding(
        check="gateway-version",
        verdict="warn" if alike else "fail",
        finding=f"the gateway has shardlift {gateway}, this client {own}",
        remedy=f"install shardlift {gateway} here, or renew the gateway's image",
    )


class DrainReport:
    """What a drain tells, taken message by message: the moves that are done, and in the end the node."""

    def __init__(self, on_move: Callable[[StageMove], None] | None) -> None:
        self._on_move = on_move
        self._node: NodeInfo | None = None
        self._moves: list[StageMove] = []

    def take(self, response: registry_pb2.DrainNodeResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "drained":
            self._node = NodeInfo.from_proto(response.drained)
        elif kind in ("moving", "moved"):
            move = StageMove.from_proto(response.moved if kind == "moved" else response.moving)
            if kind == "moved":
                self._moves.append(move)
            if self._on_move is not None:
                self._on_move(move)

    def result(self) -> tuple[NodeInfo, list[StageMove]]:
        """The node, and what was moved."""
        if self._node is None:
            raise InternalError("the gateway ended a drain without its last message")
        return self._node, self._moves


def findings_of(response: registry_pb2.DiagnoseClusterResponse) -> Iterator[Finding]:
    if response.version:
        yield version_finding(response.version)
    yield from (Finding.from_proto(finding) for finding in response.findings)
