"""Every metric that is exported, and the numbers behind those of a stage. Pure: what exports them is handed in.

The work counts into plain numbers, each with one writer and no lock; a timer reads them and hands them on
(`Exporter`). So a token costs an addition, whoever scrapes. Labels are bounded: models, stages, nodes, devices, phases
and outcomes. Never a session, a token or a path.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Observations between two exports, beyond which the oldest are forgotten.
_MOST_OBSERVATIONS = 10_000
# Tokens per second are those of so many exports, a second each.
_PULSES = 6

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_STAGE = ("model", "stage", "node", "device")
GENERATION_OUTCOMES = ("stop", "length", "cancelled", "failed")
LOAD_OUTCOMES = ("ready", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric by its own name: Ray writes "ray_" before it. `about`: what it says, for people."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()


LOAD_BYTES = Metric(
    name="shardlift_load_bytes_total",
    kind="counter",
    about="Bytes that went through a phase of the stage's loads; those of fetch came from the source, or the cache.",
    labels=(*_STAGE, "phase"),
)
LOAD_SECONDS = Metric(
    name="shardlift_load_seconds_total",
    kind="counter",
    about="Seconds that the stage's loads spent in a phase, summed over the threads that were in it.",
    labels=(*_STAGE, "phase"),
)
RESIDENT_BYTES = Metric(
    name="shardlift_resident_bytes", kind="gauge", about="Weights on the device, as measured.", labels=_STAGE
)
KV_BYTES = Metric(
    name="shardlift_kv_bytes", kind="gauge", about="Keys and values of all sessions on the device.", labels=_STAGE
)
KV_RESERVED = Metric(
    name="shardlift_kv_reserved_tokens",
    kind="gauge",
    about="Tokens whose keys and values sessions have reserved (last stage).",
    labels=_STAGE,
)
KV_LIMIT = Metric(
    name="shardlift_kv_limit_tokens",
    kind="gauge",
    about="Tokens whose keys and values have room; 0 without a limit (last stage).",
    labels=_STAGE,
)
SESSIONS = Metric(
    name="shardlift_sessions",
    kind="gauge",
    about="Sessions, by state: running, or waiting for their turn (last stage).",
    labels=(*_STAGE, "state"),
)
BATCHES = Metric(
    name="shardlift_batches_total",
    kind="counter",
    about="Batches of single-token steps that the stage has computed.",
    labels=_STAGE,
)
BATCH_ROWS = Metric(
    name="shardlift_batch_sessions_total",
    kind="counter",
    about="Sessions in those batches; divided by the batches, how many share one.",
    labels=_STAGE,
)
PROMPT_TOKENS = Metric(
    name="shardlift_prompt_tokens_total",
    kind="counter",
    about="Tokens of prompts that generations began with, of all rows (last stage).",
    labels=_STAGE,
)
GENERATED_TOKENS = Metric(
    name="shardlift_generated_tokens_total",
    kind="counter",
    about="Tokens chosen, of all rows that had not ended (last stage). Its rate is the tokens per second.",
    labels=_STAGE,
)
GENERATIONS = Metric(
    name="shardlift_generations_total",
    kind="counter",
    about=f"Generations that ended, by outcome: {', '.join(GENERATION_OUTCOMES)} (last stage).",
    labels=(*_STAGE, "outcome"),
)
QUEUE_SECONDS = Metric(
    name="shardlift_queue_seconds",
    kind="histogram",
    about="How long sessions waited for their turn (last stage).",
    labels=_STAGE,
    buckets=_SECONDS,
)
FIRST_TOKEN_SECONDS = Metric(
    name="shardlift_time_to_first_token_seconds",
    kind="histogram",
    about="From a generation's arrival at the last stage to its first token, the queue included.",
    labels=_STAGE,
    buckets=_SECONDS,
)
TOKEN_SECONDS = Metric(
    name="shardlift_time_per_token_seconds",
    kind="histogram",
    about="Mean time of a generation's further tokens, a value for each generation (last stage).",
    labels=_STAGE,
    buckets=_TOKEN_SECONDS,
)
REQUESTS = Metric(
    name="shardlift_requests_total",
    kind="counter",
    about="Calls that the gateway has ended, by method and outcome: ok, cancelled, or the name of an error.",
    labels=("model", "method", "outcome"),
)
LOADS = Metric(
    name="shardlift_loads_total",
    kind="counter",
    about=f"Loads that ended, by outcome: {', '.join(LOAD_OUTCOMES)} (gateway).",
    labels=("model", "outcome"),
)
LOST_STAGES = Metric(
    name="shardlift_lost_stages_total",
    kind="counter",
    about="Stages that were lost and brought back (gateway).",
    labels=("model",),
)
RECOVERIES = Metric(
    name="shardlift_recoveries_total",
    kind="counter",
    about="Times that lost stages were brought back (gateway).",
    labels=("model",),
)
RECOVERY_SECONDS = Metric(
    name="shardlift_recovery_seconds_total",
    kind="counter",
    about="Seconds that took, from the loss on (gateway).",
    labels=("model",),
)
MODELS = Metric(
    name="shardlift_models",
    kind="gauge",
    about="Models by state: loading, ready, recovering, unavailable, unloading (gateway).",
    labels=("state",),
)

OF_STAGES = (
    *(LOAD_BYTES, LOAD_SECONDS, RESIDENT_BYTES, KV_BYTES, KV_RESERVED, KV_LIMIT, SESSIONS, BATCHES, BATCH_ROWS),
    *(PROMPT_TOKENS, GENERATED_TOKENS, GENERATIONS, QUEUE_SECONDS, FIRST_TOKEN_SECONDS, TOKEN_SECONDS),
)
OF_GATEWAY = (REQUESTS, LOADS, LOST_STAGES, RECOVERIES, RECOVERY_SECONDS, MODELS)
METRICS = (*OF_STAGES, *OF_GATEWAY)


def _observations() -> deque[float]:
    return deque(maxlen=_MOST_OBSERVATIONS)


@dataclass(slots=True)
class ServingNumbers:
    """What a last stage counts. The tokens belong to the computing thread, everything else to the event loop."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    generations: Counter[str] = field(default_factory=Counter)
    queue_s: deque[float] = field(default_factory=_observations)
    first_token_s: deque[float] = field(default_factory=_observations)
    token_s: deque[float] = field(default_factory=_observations)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """A stage at one moment. sessions: those that it keeps something of; running, waiting, the tokens: of a last stage.

    tokens_per_second: in the last seconds.
    """

    sessions: int = 0
    kv_bytes: int = 0
    running: int = 0
    waiting: int = 0
    max_sessions: int = 0
    reserved_tokens: int = 0
    limit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tokens_per_second: float = 0.0
    batches: int = 0
    batch_sessions: int = 0


class Pulse:
    """How fast a total grows, from readings at intervals."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque(maxlen=_PULSES)

    def take(self, now_s: float, total: int) -> None:
        self._readings.append((now_s, total))

    @property
    def per_second(self) -> float:
        if len(self._readings) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._readings[0], self._readings[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


class Exporter:
    """Hands numbers to a metrics library with Ray's interface (`ray.util.metrics`). labels: of everything exported."""

    def __init__(self, library: Any, labels: Mapping[str, str]) -> None:
        self._library = library
        self._labels = dict(labels)
        self._made: dict[str, Any] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def total(self, metric: Metric, total: float, **labels: str) -> None:
        """A counter's value so far; what it has grown by is told. One that hasn't grown yet is told as 0: Prometheus
        sees no growth in a counter that begins with its first count."""
        key = (metric.name, tuple(labels.values()))
        grown = total - self._told.get(key, 0)
        if grown > 0:
            self._told[key] = total
            self._of(metric).inc(grown, tags=self._labels | labels)
        elif key not in self._told:
            self._told[key] = 0
            # `inc` itself takes no zero.
            self._of(metric)._record(0.0, tags=self._labels | labels)

    def value(self, metric: Metric, value: float, **labels: str) -> None:
        self._of(metric).set(value, tags=self._labels | labels)

    def drain(self, metric: Metric, values: deque[float]) -> None:
        """Observations, which are gone from `values` then."""
        while values:
            self._of(metric).observe(values.popleft(), tags=self._labels)

    def phases(self, phases: Iterable[Any]) -> None:
        """The phases of a load (`worker.timeline.Phase`) so far."""
        for phase in phases:
            self.total(LOAD_BYTES, phase.bytes_, phase=phase.name)
            self.total(LOAD_SECONDS, phase.seconds, phase=phase.name)

    def stage(self, status: StageStatus, numbers: ServingNumbers, *, resident_bytes: int, is_last: bool) -> None:
        """A stage that serves."""
        self.value(RESIDENT_BYTES, resident_bytes)
        self.value(KV_BYTES, status.kv_bytes)
        self.total(BATCHES, status.batches)
        self.total(BATCH_ROWS, status.batch_sessions)
        if not is_last:
            return
        self.value(KV_RESERVED, status.reserved_tokens)
        self.value(KV_LIMIT, status.limit_tokens)
        self.value(SESSIONS, status.running, state="running")
        self.value(SESSIONS, status.waiting, state="waiting")
        self.total(PROMPT_TOKENS, status.prompt_tokens)
        self.total(GENERATED_TOKENS, status.generated_tokens)
        for outcome in GENERATION_OUTCOMES:
            self.total(GENERATIONS, numbers.generations[outcome], outcome=outcome)
        self.drain(QUEUE_SECONDS, numbers.queue_s)
        self.drain(FIRST_TOKEN_SECONDS, numbers.first_token_s)
        self.drain(TOKEN_SECONDS, numbers.token_s)

    def _of(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        if made is None:
            kind = {"counter": "Counter", "gauge": "Gauge", "histogram": "Histogram"}[metric.kind]
            more = {"boundaries": list(metric.buckets)} if metric.kind == "histogram" else {}
            make = getattr(self._library, kind)
            made = self._made[metric.name] = make(metric.name, metric.about, tag_keys=metric.labels, **more)
        return made
