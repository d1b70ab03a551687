"""What a check says. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...proto.v1 import registry_pb2

Verdict = Literal["ok", "warn", "fail"]
_VERDICTS: dict[str, registry_pb2.Verdict] = {
    "ok": registry_pb2.VERDICT_OK,
    "warn": registry_pb2.VERDICT_WARN,
    "fail": registry_pb2.VERDICT_FAIL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check of one machine, or of what lies between two. finding: what was seen, in one line. remedy: what to do
    about it; empty where nothing is. node: empty for what concerns all, or the machine asked."""

    check: str
    verdict: Verdict
    finding: str
    remedy: str = ""
    node: str = ""

    def __post_init__(self) -> None:
        assert self.verdict == "ok" or self.remedy, f"{self.check} finds fault without a remedy"

    def message(self) -> registry_pb2.Finding:
        return registry_pb2.Finding(
            check=self.check,
            node=self.node,
            verdict=_VERDICTS[self.verdict],
            finding=self.finding,
            remedy=self.remedy,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
