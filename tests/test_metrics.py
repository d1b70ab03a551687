"""Metrics, scraped where Ray's Prometheus setup would, equal what was done; and what names them, names them right."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util import metrics as ray_metrics

import shardlift
from shardlift.client.handle import RemoteModel
from shardlift.cluster.events import GatewayNumbers
from shardlift.proto.v1 import errors, registry_pb2
from shardlift.worker import metrics
from shardlift.worker.metrics import Exporter, Pulse, ServingNumbers, StageStatus
from shardlift.worker.timeline import Phase
from tests.support import checkpoints
from tests.support.cluster import RunningCluster, eventually
from tests.support.quantization import nf4
from tests.support.scrape import Scrape, scrape

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "k8s" / "components" / "grafana" / "shardlift.json"
DOCUMENT = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
NAME = "counted"
STAGES = 3
ROWS, STEPS = 2, 12
# What Ray adds of its own, and what histograms have.
RAYS_LABELS = {"SessionName", "WorkerId", "Component", "Version", "NodeAddress", "NodeId", "JobId", "le"} | {
    f"otel_scope_{each}" for each in ("name", "version", "schema_url")
}


# -- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteModel]:
    folder = checkpoints.tiny(
        "llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16", max_position_embeddings=50000
    )
    with shardlift.connect(cluster.gateway) as client:
        yield client.load(
            str(folder), name=NAME, num_stages=STAGES, quantization_config=nf4(), max_sessions=2, part_cache=False
        )
        if NAME in {info.name for info in client.infos()}:
            client.unload(NAME)
    cluster.assert_nothing_left()


@pytest.fixture
def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def settled(holds: Any, otherwise: str) -> Scrape:
    """The first scrape that `holds`; a process tells its node once a second."""
    found: list[Scrape] = []

    def look() -> bool:
        found.append(scrape())
        return bool(holds(found[-1]))

    eventually(look, otherwise, timeout_s=45)
    return found[-1]


def test_what_was_done_is_what_is_scraped(model: RemoteModel, cluster: RunningCluster) -> None:
    ids = torch.arange(5, 5 + 7 * ROWS).reshape(ROWS, 7)
    for _ in range(3):
        model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    with model.stream(ids[:1], max_new_tokens=40_000) as stream:
        next(stream)
        _load_and_sessions(model, cluster)
    with pytest.raises(errors.InvalidRequestError):
        model.generate(torch.tensor([[100_000]]), max_new_tokens=2)

    worker = ray.get_actor(next(each for each in cluster.stage_workers() if each.endswith(":2")), namespace="shardlift")
    last = {"model": NAME, "stage": str(STAGES - 1)}

    def is_idle(found: Scrape) -> bool:
        # The stream's client left at some step or other; the three generations are known to the token.
        generated = ray.get(worker.status.remote()).generated_tokens
        assert generated > 3 * ROWS * STEPS
        ended = found.total("shardlift_generations_total", outcome="cancelled", **last) == 1
        refused = found.total("shardlift_requests_total", model=NAME, outcome="InvalidRequestError") == 1
        idle = found.total("shardlift_sessions", model=NAME) == found.total("shardlift_kv_bytes", model=NAME) == 0
        told = found.total("shardlift_generated_tokens_total", **last) == generated
        return idle and ended and refused and told

    found = settled(is_idle, "sessions that ended are still counted")
    assert found.total("shardlift_generations_total", outcome="length", **last) == 3
    assert found.total("shardlift_requests_total", model=NAME, method="Generate", outcome="ok") == 3
    assert found.total("shardlift_requests_total", model=NAME, method="Generate", outcome="cancelled") == 1
    assert found.total("shardlift_time_to_first_token_seconds_count", model=NAME) == 4
    assert found.total("shardlift_time_per_token_seconds_count", model=NAME) == 4
    assert found.total("shardlift_queue_seconds_count", model=NAME) >= 5
    assert found.total("shardlift_kv_reserved_tokens", model=NAME) == 0
    assert found.total("shardlift_kv_limit_tokens", model=NAME) == model.plan.kv_tokens
    assert found.total("shardlift_prompt_tokens_total", **last) == (3 * ROWS + 1) * 7 + 1


def _load_and_sessions(model: RemoteModel, cluster: RunningCluster) -> None:
    """While one session runs."""
    running = {"model": NAME, "state": "running"}

    def is_counted(found: Scrape) -> bool:
        generated = found.total("shardlift_generated_tokens_total", model=NAME)
        kv_bytes = found.total("shardlift_kv_bytes", model=NAME)
        return found.total("shardlift_sessions", **running) == 1 and kv_bytes > 0 and generated > 3 * ROWS * STEPS

    found = settled(is_counted, "the stream is not counted")
    plan, residency = model.plan, model.residency()
    for stage, measured in zip(plan.stages, residency, strict=True):
        at = {"model": NAME, "stage": str(stage.index), "node": stage.node, "device": stage.device}
        assert found.total("shardlift_load_bytes_total", phase="fetch", **at) == measured.fetched_bytes
        assert measured.fetched_bytes == stage.fetch_bytes
        assert found.total("shardlift_resident_bytes", **at) == measured.measured_bytes
        for phase, spent in measured.load.phases.items():
            assert found.total("shardlift_load_seconds_total", phase=phase, **at) == pytest.approx(spent.seconds)
    assert found.total("shardlift_load_bytes_total", model=NAME, phase="fetch") == plan.total_fetch_bytes
    assert found.total("shardlift_loads_total", model=NAME, outcome="ready") == 1
    assert found.total("shardlift_models", state="ready") == 1


def test_labels_are_those_of_the_table(model: RemoteModel) -> None:
    known = {metric.name: metric for metric in metrics.METRICS}
    found = scrape()
    assert found.samples
    for sample in found.samples:
        name = sample.name.removeprefix("ray_")
        metric = known.get(name) or known[re.sub(r"_(bucket|sum|count)$", "", name)]
        assert set(sample.labels) - RAYS_LABELS == set(metric.labels), sample.name
    types = {name.removeprefix("ray_"): kind for name, kind in found.types.items()}
    assert {known.get(name, known.get(f"{name}_total")).kind == kind for name, kind in types.items()} == {True}
    # Nothing of a session, a prompt, or a place on a disk.
    assert not re.search(r"[0-9a-f]{32}\"[,}]", re.sub(r'(WorkerId|SessionName|NodeId)="[^"]*"', "", found.text))
    assert "/" not in re.sub(r'SessionName="[^"]*"', "", found.text)


def test_the_dashboards_queries_ask_for_what_there_is(model: RemoteModel, dashboard: Any) -> None:
    found = scrape()
    scraped = {sample.name for sample in found.samples}
    for _, expression in expressions(dashboard):
        for name, labels in asked(expression):
            metric = of_series(name)
            assert labels <= {*metric.labels, "le"}, (name, labels)
            assert name in scraped, name
            assert all(label in sample.labels for sample in found.samples if sample.name == name for label in labels)


def test_a_killed_worker_is_a_recovery(model: RemoteModel, cluster: RunningCluster) -> None:
    before = scrape()
    victim = next(each for each in cluster.stage_workers() if f":{NAME}:" in each and each.endswith(":1"))
    os.kill(cluster.pid(victim), signal.SIGKILL)
    found = settled(lambda each: each.total("shardlift_recoveries_total", model=NAME) == 1, "no recovery is counted")
    assert before.total("shardlift_recoveries_total", model=NAME) == 0
    assert found.total("shardlift_lost_stages_total", model=NAME) == 1
    took = found.total("shardlift_recovery_seconds_total", model=NAME)
    assert took == pytest.approx(model.info().recovery_seconds)
    fetched = model.plan.total_fetch_bytes + model.plan.stages[1].fetch_bytes
    settled(
        lambda each: each.total("shardlift_load_bytes_total", model=NAME, phase="fetch") == fetched,
        "the new worker's load is not counted",
    )


def test_gauges_end_with_their_model(model: RemoteModel) -> None:
    # The last of these tests that needs it.
    model.unload()
    gauges = [metric.name for metric in metrics.OF_STAGES if metric.kind == "gauge"]
    settled(lambda each: not any(each.of(name, model=NAME) for name in gauges), "gauges of a model that is gone")
    settled(lambda each: each.total("shardlift_models", state="ready") == 0, "a model that is gone is counted")


# -- what names them --------------------------------------------------------------------------------------------------


def expressions(dashboard: Any) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The series of a PromQL expression, with the labels by which they are chosen or grouped."""
    grouped = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    for name, _, matchers in re.findall(r"\b(ray_\w+)(\{([^}]*)\})?", expression):
        yield name, grouped | set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def of_series(name: str) -> metrics.Metric:
    """The metric whose series is called `name`. Fails for one that there isn't, or not so."""
    known = {metric.name: metric for metric in metrics.METRICS}
    own = name.removeprefix("ray_")
    if own in known:
        assert known[own].kind != "histogram", f"{name} needs _bucket, _sum or _count"
        return known[own]
    metric = known[re.sub(r"_(bucket|sum|count)$", "", own)]
    assert metric.kind == "histogram", name
    return metric


def test_the_dashboard_is_whole(dashboard: Any) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    named = {of_series(name) for _, expression in expressions(dashboard) for name, _ in asked(expression)}
    assert named == set(metrics.METRICS), "every metric has a panel"
    for title, expression in expressions(dashboard):
        assert expression.count("(") == expression.count(")"), title
        counters = [name for name, _ in asked(expression) if of_series(name).kind == "counter"]
        assert all(re.search(rf"\b(rate|increase)\({name}", expression) for name in counters), title
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    (variable,) = (each for each in dashboard["templating"]["list"] if each["type"] == "query")
    assert of_series(re.search(r"ray_\w+", variable["definition"])[0]) is metrics.LOADS  # type: ignore[index]


def test_a_wrong_query_would_be_noticed() -> None:
    with pytest.raises(KeyError):
        of_series("ray_shardlift_tokens_total")
    with pytest.raises(AssertionError):
        of_series("ray_shardlift_queue_seconds")
    ((name, labels),) = asked('sum by (colour) (rate(ray_shardlift_generated_tokens_total{modle="x"}[5m]))')
    assert labels == {"colour", "modle"}
    assert not labels <= set(of_series(name).labels)


def test_the_document_lists_every_metric() -> None:
    table = re.findall(r"^\| `(shardlift_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", DOCUMENT, flags=re.MULTILINE)
    expected = [
        (metric.name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.about)
        for metric in metrics.METRICS
    ]
    assert table == expected


def test_names_keep_to_prometheus_conventions() -> None:
    for metric in metrics.METRICS:
        assert re.fullmatch(r"shardlift_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert metric.buckets == tuple(sorted(set(metric.buckets)))
        assert not {"session", "token", "path", "prompt"} & set(metric.labels)


# -- counting ---------------------------------------------------------------------------------------------------------


class Library:
    """Stands where Ray's module does, and takes what that takes."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, tuple[tuple[str, str], ...]]] = []

    def __getattr__(self, kind: str) -> Any:
        real = getattr(ray_metrics, kind)

        def make(name: str, about: str, tag_keys: tuple[str, ...], **more: Any) -> Any:
            metric = real(name, about, tag_keys=tag_keys, **more)
            metric._record = lambda value, tags=None: self.told.append(
                (name, value, tuple(sorted((tags or {}).items())))
            )
            return metric

        return make


def test_totals_are_told_as_what_they_grew_by() -> None:
    library = Library()
    exporter = Exporter(library, {"model": "m"})
    for total in (5, 5, 8):
        exporter.total(metrics.GENERATED_TOKENS, total)
    exporter.total(metrics.GENERATIONS, 2, outcome="stop")
    exporter.total(metrics.GENERATIONS, 1, outcome="length")
    assert [(name, value) for name, value, _ in library.told] == [
        ("shardlift_generated_tokens_total", 5),
        ("shardlift_generated_tokens_total", 3),
        ("shardlift_generations_total", 2),
        ("shardlift_generations_total", 1),
    ]


def test_what_has_not_happened_yet_is_told_as_zero() -> None:
    """Or Prometheus would see nothing of what happens first: `increase` of a counter that begins with 1 is 0."""
    library, numbers = Library(), GatewayNumbers()
    exporter = Exporter(library, {})
    states = {"m": registry_pb2.MODEL_STATE_LOADING}
    numbers.export(exporter, states)
    counted = [(name, value, dict(tags)) for name, value, tags in library.told if name.endswith("_total")]
    assert counted == [
        *(("shardlift_loads_total", 0, {"model": "m", "outcome": each}) for each in ("ready", "failed", "cancelled")),
        *((f"shardlift_{what}_total", 0, {"model": "m"}) for what in ("recoveries", "lost_stages", "recovery_seconds")),
    ]
    library.told.clear()
    numbers.loads["m", "ready"] += 1
    numbers.recovered("m", 2, 3.5)
    numbers.export(exporter, states)
    numbers.export(exporter, {})
    counted = [(name, value) for name, value, _ in library.told if name.endswith("_total")]
    assert sorted(counted) == [
        ("shardlift_loads_total", 1),
        ("shardlift_lost_stages_total", 2),
        ("shardlift_recoveries_total", 1),
        ("shardlift_recovery_seconds_total", 3.5),
    ]
    library.told.clear()
    exporter = Exporter(library, dict.fromkeys(("model", "stage", "node", "device"), "x"))
    exporter.stage(StageStatus(), ServingNumbers(), resident_bytes=3, is_last=True)
    zeros = [name for name, value, _ in library.told if name.endswith("_total") and value == 0]
    assert zeros.count("shardlift_generations_total") == 4
    assert {"shardlift_generated_tokens_total", "shardlift_prompt_tokens_total"} <= set(zeros)


def test_a_stage_tells_what_its_kind_has() -> None:
    library = Library()
    exporter = Exporter(library, dict.fromkeys(("model", "stage", "node", "device"), "x"))
    numbers = ServingNumbers(first_token_s=deque([0.5, 0.7]))
    exporter.stage(StageStatus(batches=1, batch_sessions=2), numbers, resident_bytes=3, is_last=False)
    assert {name for name, _, _ in library.told} == {
        *("shardlift_resident_bytes", "shardlift_kv_bytes", "shardlift_batches_total", "shardlift_batch_sessions_total")
    }
    exporter.stage(StageStatus(), numbers, resident_bytes=3, is_last=True)
    exporter.stage(StageStatus(), numbers, resident_bytes=3, is_last=True)
    observed = [value for name, value, _ in library.told if name == "shardlift_time_to_first_token_seconds"]
    assert observed == [0.5, 0.7], "each once"
    exporter.phases([Phase(name="fetch", seconds=1.5, bytes_=10, count=1)])
    assert library.told[-1][:2] == ("shardlift_load_seconds_total", 1.5)


def test_the_pulse_is_that_of_the_last_seconds() -> None:
    pulse = Pulse()
    assert pulse.per_second == 0.0
    for second, total in enumerate([0, 10, 20, 30, 30, 30, 30, 30]):
        pulse.take(float(second), total)
    assert pulse.per_second == pytest.approx((30 - 20) / 5)
