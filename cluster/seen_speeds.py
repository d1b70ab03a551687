"""How fast links and devices were in earlier loads: what the next one's time is predicted from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..worker.records import SourceSpec
from ..worker.spec import LoadReport
from ..worker.timeline import CAST, CONVERT, FETCH, QUANTIZE
from .devices import Device
from .load_time import Speeds

# A load of less tells little of a link.
_LEAST_BYTES = 1 << 20
_MOST_LINKS = 256


class SeenSpeeds:
    """The latest load over each link, and onto each kind of device, counts."""

    def __init__(self) -> None:
        self._links: dict[str, float] = {}
        self._conversion: dict[str, float] = {}

    def of(self, source: SourceSpec) -> Speeds:
        link = self._links.get(_link(source), 0.0)
        return Speeds(link=link, conversion=dict(self._conversion), is_measured=True)

    def learn(self, source: SourceSpec, devices: Sequence[Device], reports: Sequence[LoadReport]) -> None:
        """devices: of the stages that reported. Stages that came from a cache say nothing of the link."""
        of_node: Counter[str] = Counter()
        for device, report in zip(devices, reports, strict=True):
            phases = {phase.name: phase for phase in report.phases}
            fetch = phases.get(FETCH)
            if report.cached_bytes or fetch is None or fetch.bytes_ < _LEAST_BYTES or not fetch.seconds:
                continue
            # While all of its connections read.
            of_node[device.node] += round(fetch.bytes_ * report.connections / fetch.seconds)
            busy_s = sum(phases[name].seconds for name in (CAST, QUANTIZE, CONVERT) if name in phases)
            if busy_s:
                self._conversion[device.kind] = fetch.bytes_ / busy_s
        if of_node:
            self._links.pop(_link(source), None)
            self._links[_link(source)] = float(min(of_node.values()))
            while len(self._links) > _MOST_LINKS:
                del self._links[next(iter(self._links))]


def _link(source: SourceSpec) -> str:
    """The Hub, a store's host or bucket, or folders: what shares a way."""
    if source.kind == "url":
        parts = urlsplit(source.location)
        return f"{parts.scheme}://{parts.netloc}"
    return f"{source.kind} {source.endpoint}"
