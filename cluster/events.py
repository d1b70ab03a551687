"""What has happened in the cluster lately: for the page, `show --watch` and the log; and what was counted of it."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import cast

from ..proto.v1 import registry_pb2
from ..worker import metrics

logger = logging.getLogger(__name__)

_MOST_EVENTS = 300
# The same again is the same event, within this time of the last one.
_MERGE_S = 300.0
_WARNINGS = frozenset({"load-failed", "refused", "stages-lost", "unavailable"})


class Events:
    """The latest events, the oldest first; each is a log line, too."""

    def __init__(self) -> None:
        self._events: deque[registry_pb2.ClusterEvent] = deque(maxlen=_MOST_EVENTS)

    def record(self, kind: str, text: str, *, model: str = "", load_id: str = "", merge: bool = False) -> None:
        """merge: count it to the model's last event, if that is of the same kind and not long ago."""
        level = logging.WARNING if kind in _WARNINGS else logging.INFO
        logger.log(level, "%s: %s", kind, text, extra={"model": model, "load_id": load_id})
        now = time.time()
        last = next((event for event in reversed(self._events) if event.model == model), None)
        if merge and last is not None and last.kind == kind and now - last.unix_s < _MERGE_S:
            last.unix_s, last.text, last.count = now, text, last.count + 1
            # Where it is found: the latest last.
            self._events.remove(last)
            self._events.append(last)
            return
        self._events.append(registry_pb2.ClusterEvent(unix_s=now, kind=kind, model=model, text=text, count=1))

    def of(self, model: str = "") -> list[registry_pb2.ClusterEvent]:
        """All, or those of `model` alone."""
        return [event for event in self._events if model in ("", event.model)]


class GatewayNumbers:
    """What the gateway counts. Of one event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()  # model, method, outcome
        self.loads: Counter[tuple[str, str]] = Counter()  # model, outcome
        self.recoveries: Counter[str] = Counter()
        self.lost_stages: Counter[str] = Counter()
        self.recovery_seconds: dict[str, float] = {}

    def recovered(self, model: str, stages: int, seconds: float) -> None:
        self.recoveries[model] += 1
        self.lost_stages[model] += stages
        self.recovery_seconds[model] = self.recovery_seconds.get(model, 0.0) + seconds

    def export(self, exporter: metrics.Exporter, states: Mapping[str, registry_pb2.ModelState]) -> None:
        """states: of the models that there are, by their names. What may happen to one is told as 0 before it has."""
        for (model, method, outcome), count in self.requests.items():
            exporter.total(metrics.REQUESTS, count, model=model, method=method, outcome=outcome)
        for model in {*states, *(model for model, _ in self.loads), *self.recoveries}:
            for outcome in metrics.LOAD_OUTCOMES:
                exporter.total(metrics.LOADS, self.loads[model, outcome], model=model, outcome=outcome)
            exporter.total(metrics.RECOVERIES, self.recoveries[model], model=model)
            exporter.total(metrics.LOST_STAGES, self.lost_stages[model], model=model)
            exporter.total(metrics.RECOVERY_SECONDS, self.recovery_seconds.get(model, 0.0), model=model)
        found = Counter(states.values())
        for number in registry_pb2.ModelState.values():
            state = cast(registry_pb2.ModelState, number)
            if state != registry_pb2.MODEL_STATE_UNSPECIFIED:
                exporter.value(metrics.MODELS, found[state], state=state_name(state))


def state_name(state: registry_pb2.ModelState) -> str:
    """ "ready", "loading", …"""
    return registry_pb2.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()
