"""How long a load will take, from what links and devices are known to do. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LINK = "link"
CONVERSION = "conversion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Bytes of checkpoint a second.

    link: from the source to one node; 0 if unknown. conversion: what a worker converts and quantizes, by its kind of
    device; a kind that is missing is unknown, and taken to keep up with its link. is_measured: by an earlier load, not
    given.
    """

    link: float = 0.0
    conversion: Mapping[str, float] = field(default_factory=dict)
    is_measured: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    node: str
    kind: str
    fetch_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """seconds: of each stage. bottleneck: LINK or CONVERSION, of the slowest one, and that stage's index."""

    seconds: tuple[float, ...]
    bottleneck: str
    slowest: int


def predict(stages: Sequence[StageLoad], speeds: Speeds) -> Prediction | None:
    """None where no speed is known. Stages of one node share its link; starting workers is not counted."""
    if not speeds.link and not any(speeds.conversion.get(stage.kind) for stage in stages):
        return None
    through: Counter[str] = Counter()
    for stage in stages:
        through[stage.node] += stage.fetch_bytes
    linked = [through[stage.node] / speeds.link if speeds.link else 0.0 for stage in stages]
    converted = [_over(stage.fetch_bytes, speeds.conversion.get(stage.kind, 0.0)) for stage in stages]
    seconds = tuple(max(pair) for pair in zip(linked, converted, strict=True))
    slowest = max(range(len(stages)), key=lambda index: (seconds[index], -index))
    bottleneck = LINK if linked[slowest] >= converted[slowest] else CONVERSION
    return Prediction(seconds=seconds, bottleneck=bottleneck, slowest=slowest)


def _over(bytes_: int, rate: float) -> float:
    return bytes_ / rate if rate else 0.0
