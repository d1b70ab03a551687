"""What Prometheus would find: the samples of every Ray node's own endpoint."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

PREFIX = "ray_shardlift_"


@dataclass(frozen=True)
class Scrape:
    """Samples of shardlift's metrics, of all nodes. `types`: by family."""

    samples: list[Sample]
    types: dict[str, str]
    text: str

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples that are called `name` and have `labels`."""
        return sum(sample.value for sample in self.of(name, **labels))

    def of(self, name: str, **labels: str) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample.name == f"ray_{name}" and labels.items() <= sample.labels.items()
        ]


def scrape() -> Scrape:
    texts = list(_texts())
    families = [family for text in texts for family in text_string_to_metric_families(text)]
    ours = [family for family in families if family.name.startswith(PREFIX)]
    return Scrape(
        samples=[sample for family in ours for sample in family.samples],
        types={family.name: family.type for family in ours},
        text="\n".join(line for text in texts for line in text.splitlines() if PREFIX in line),
    )


def _texts() -> Iterator[str]:
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=20) as answer:
                yield answer.read().decode()
