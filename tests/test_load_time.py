"""How long a load will take: from speeds given, or seen in earlier loads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlift.cluster.devices import Device
from shardlift.cluster.load_time import CONVERSION, LINK, Speeds, StageLoad, predict
from shardlift.cluster.seen_speeds import SeenSpeeds
from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.worker.byte_sizes import parse_rate
from shardlift.worker.records import SourceSpec
from shardlift.worker.spec import LoadReport
from shardlift.worker.timeline import Phase

HUB = SourceSpec(kind="hub", location="org/name")


def stages(*fetch: tuple[str, int], kind: str = "cuda") -> list[StageLoad]:
    return [StageLoad(node=node, kind=kind, fetch_bytes=size) for node, size in fetch]


def test_stages_of_a_node_share_its_link() -> None:
    found = predict(stages(("a", 100), ("a", 300), ("b", 200)), Speeds(link=10.0))
    assert found is not None
    assert found.seconds == (40.0, 40.0, 20.0)
    assert (found.bottleneck, found.slowest) == (LINK, 0)


def test_a_slow_device_is_the_bottleneck() -> None:
    found = predict(stages(("a", 100), ("b", 300)), Speeds(link=100.0, conversion={"cuda": 10.0}))
    assert found is not None
    assert found.seconds == (10.0, 30.0)
    assert (found.bottleneck, found.slowest) == (CONVERSION, 1)


def test_nothing_is_known_without_a_speed() -> None:
    assert predict(stages(("a", 100)), Speeds()) is None
    assert predict(stages(("a", 100)), Speeds(conversion={"cpu": 10.0})) is None
    assert predict(stages(("a", 100)), Speeds(conversion={"cuda": 10.0})) is not None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**12)), min_size=1), st.floats(1, 1e12))
def test_a_faster_link_never_takes_longer(fetch: list[tuple[str, int]], link: float) -> None:
    slow, fast = predict(stages(*fetch), Speeds(link=link)), predict(stages(*fetch), Speeds(link=2 * link))
    assert slow is not None
    assert fast is not None
    assert all(after <= before for after, before in zip(fast.seconds, slow.seconds, strict=True))


@pytest.mark.parametrize(
    ("text", "rate"),
    [("1.2GB/s", 1.2e9), ("500MiB/s", 500 * 2**20), ("10Gbit/s", 1.25e9), ("800Mbps", 1e8), ("1000", 1000.0)],
)
def test_speeds_as_people_write_them(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "-1GB/s", "0", "1GB/h", "10 potatoes"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no speed"):
        parse_rate(text)


# ---- learnt ----------------------------------------------------------------------------------------------------------


def report(fetched: int, fetch_s: float, quantize_s: float, *, cached: int = 0) -> LoadReport:
    return LoadReport(
        address="",
        fetched_bytes=fetched,
        cached_bytes=cached,
        modules=(),
        seconds=1.0,
        phases=(
            Phase(name="fetch", seconds=fetch_s, bytes_=fetched, count=1),
            Phase(name="quantize", seconds=quantize_s, bytes_=fetched, count=1),
        ),
        link="",
        bottleneck="fetch",
        connections=4,
    )


def device(node: str) -> Device:
    return Device(node=node, name="cuda:0", kind="cuda", capacity_bytes=1)


def test_the_slowest_nodes_link_counts_while_all_its_connections_read() -> None:
    seen = SeenSpeeds()
    assert seen.of(HUB).link == 0
    # Four connections, each busy for half of the seconds told.
    seen.learn(HUB, [device("a"), device("b")], [report(8 << 20, 4.0, 2.0), report(8 << 20, 8.0, 2.0)])
    found = seen.of(HUB)
    assert found.is_measured
    assert found.link == 4 << 20
    assert found.conversion == {"cuda": 4 << 20}
    assert seen.of(SourceSpec(kind="folder", location="/data")).link == 0


def test_a_cached_or_tiny_part_teaches_nothing() -> None:
    seen = SeenSpeeds()
    seen.learn(HUB, [device("a")], [report(8 << 20, 4.0, 2.0, cached=1)])
    seen.learn(HUB, [device("a")], [report(1000, 4.0, 2.0)])
    assert seen.of(HUB).link == 0
