"""How people write devices down, and what is refused."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.cluster.devices import (
    Device,
    find_device,
    limit_memory,
    parse_devices,
    parse_topology,
    share_cpus,
)
from shardlift.proto.v1.errors import InvalidDeviceMapError, InvalidRequestError
from shardlift.worker.byte_sizes import format_size, parse_size


def gpu(node: str, index: int, capacity: int = 100) -> Device:
    return Device(node=node, name=f"cuda:{index}", kind="cuda", capacity_bytes=capacity, slots=1)


def cpu(node: str, capacity: int = 100) -> Device:
    return Device(node=node, name="cpu", kind="cpu", capacity_bytes=capacity)


def slot(node: str, index: int, capacity: int = 100) -> Device:
    """A made-up GPU: a place for a CPU worker."""
    return Device(node=node, name=f"cpu:{index}", kind="cpu", capacity_bytes=capacity, slots=1)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("7B", 7),
        ("20GiB", 20 << 30),
        ("20gib", 20 << 30),
        (" 20 GiB ", 20 << 30),
        ("512MB", 512_000_000),
        ("1.5KiB", 1536),
        ("0.1GB", 100_000_000),
        ("1TiB", 1 << 40),
        ("2TB", 2 * 10**12),
        # A float would lose the last bits.
        ("8388607.999999999999TiB", int(8388607.999999999 * 2**40)),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_size(text: str | int, size: int) -> None:
    assert parse_size(text) == pytest.approx(size, rel=1e-12)
    if not isinstance(text, str) or "99" not in text:
        assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "GiB", "-1", -5, "1,5GiB", "20G", "20Gi", "20 gigabytes", "1e9", "0x10", "inf", "nan", "1.GiB", True),
        *("9" * 400 + ".5GiB", 2**63, "8388608TiB"),
    ],
)
def test_no_size(text: str | int) -> None:
    with pytest.raises(InvalidRequestError, match=r"is not a size|is more than"):
        parse_size(text)


@settings(deadline=None)
@given(st.integers(0, 2**62))
def test_a_written_size_says_about_as_much(size: int) -> None:
    assert parse_size(format_size(size).replace(" ", "")) == pytest.approx(size, rel=0.01)


# ---- devices without a cluster ---------------------------------------------------------------------------------------


def test_devices() -> None:
    devices = parse_devices("2x80GiB, 24GiB")
    assert [device.path for device in devices] == ["node-0/cuda:0", "node-0/cuda:1", "node-1/cuda:0"]
    assert [device.capacity_bytes >> 30 for device in devices] == [80, 80, 24]
    assert {device.kind for device in devices} == {"cuda"}


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "0x80GiB", "-1x80GiB", "x80GiB", "8x", "8*80GiB", "1.5x80GiB", "200000x1GiB", "axb"),
        *("60000x1GiB,60000x1GiB", f"{'9' * 5000}x1GiB", "8x0GiB", "8x0", "8x2000TiB", "4x80GiB@", "4x80GiB@0"),
        *("4x80GiB@-1", "4x80GiB@fast", "4x80GiB@1e3", "4x80GiB@nan", "4x80GiB@0.0001", "4x80GiB@99999999999"),
        *("4x80GiB@1@2", "4x80GiB@3350,4x24GiB", "@1"),
    ],
)
def test_no_devices(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_devices(text)


def test_speeds() -> None:
    devices = parse_devices("2x80GiB@3350, 24GiB @ 936")
    assert [device.speed for device in devices] == [3350, 3350, 936]
    assert [device.speed for device in parse_devices("1GiB@3.35,1GiB@0.9,1GiB@2.000")] == [335, 90, 200]
    assert {device.speed for device in parse_devices("2x80GiB,24GiB")} == {1}
    with pytest.raises(InvalidRequestError, match="node-1/cuda:0 has no speed, but others have"):
        parse_devices("1GiB@1,1GiB")


def test_topology() -> None:
    entries = [
        {"node": "a", "device": "cuda:0", "memory": "80GiB"},
        {"node": "a", "device": "cpu", "memory": 1000, "comment": "more than is read"},
    ]
    devices = parse_topology(entries)
    assert devices == parse_topology({"devices": entries})
    assert [(device.path, device.kind, device.capacity_bytes) for device in devices] == [
        ("a/cuda:0", "cuda", 80 << 30),
        ("a/cpu", "cpu", 1000),
    ]


@pytest.mark.parametrize(
    ("topology", "problem"),
    [
        ([], "no devices"),
        ({}, "no devices"),
        (None, "no devices"),
        ({"devices": "8x80GiB"}, "no devices"),
        (["8x80GiB"], "device 0 .* lacks node, device, memory"),
        ([{"node": "a", "device": "cuda:0", "memory": "1GiB"}, {"node": "a"}], "device 1 .* lacks device, memory"),
        ([{"node": "a", "device": "cuda:0", "memory": "lots"}], "not a size"),
        ([{"node": "a", "device": "cuda:0", "memory": None}], "not a size"),
        ([{"node": "a", "device": "cuda:0", "memory": 1}] * 2, "names a device twice: a/cuda:0"),
        ([{"node": "a", "device": "cuda:0", "memory": 1}] * 100_001, "100000 at most"),
        *(
            ([{"node": "a", "device": "cuda:0", "memory": memory}], problem)
            for memory, problem in [
                *((value, "more than 0 bytes") for value in (0, "0GiB", 0.5, "2000TiB")),
                *((value, "not a size") for value in (True, -1, [1], {}, float("nan"), float("inf"))),
                (1e300, "not a size|more than"),
            ]
        ),
        *(
            ([{"node": node, "device": "cuda:0", "memory": 1}], "has node")
            for node in (7, "", "a/b", "a b", None, "\x1b")
        ),
        *(
            ([{"node": "a", "device": name, "memory": 1}], "has device")
            for name in (0, "tpu:0", "cuda", "cuda:-1", "cpu:x", "", None, "cuda:٣", "cuda:0\n")
        ),
        *(
            ([{"node": "a", "device": "cuda:0", "memory": 1, "speed": speed}], "has speed")
            for speed in (0, -1, "fast", True, [1], 1e-9, 1e12, "9" * 5000, float("nan"))
        ),
        (
            [
                {"node": "a", "device": f"cuda:{index}", "memory": 1, **extra}
                for index, extra in enumerate([{"speed": 1}, {}])
            ],
            "a/cuda:1 has no speed",
        ),
    ],
)
def test_no_topology(topology: object, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        parse_topology(topology)


def test_a_topology_with_speeds() -> None:
    entries = [
        {"node": "a", "device": f"cuda:{index}", "memory": "1GiB", "speed": s} for index, s in enumerate([3.35, 2])
    ]
    assert [device.speed for device in parse_topology(entries)] == [335, 200]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_device_by_any_of_its_names() -> None:
    devices = [gpu("a", 0), gpu("a", 1), cpu("b")]
    assert find_device("a/cuda:1", devices) is devices[1]
    assert find_device("cuda:1", devices) is devices[1]
    assert find_device("1", devices) is devices[1]
    assert find_device("cpu", devices) is devices[2]


def test_an_index_counts_gpus_where_there_are_any() -> None:
    devices = [cpu("head"), gpu("a", 0), slot("b", 0)]
    assert [find_device(str(index), devices) for index in range(2)] == devices[1:]
    assert find_device("1", [cpu("a"), cpu("b")]).node == "b"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("cuda:0", "means 2 devices"), ("2", "is no device"), ("-1", "is no device"), ("disk", "is no device")],
)
def test_no_such_device(name: str, problem: str) -> None:
    with pytest.raises(InvalidDeviceMapError, match=problem) as refused:
        find_device(name, [gpu("a", 0), gpu("b", 0), cpu("c")])
    assert "0: a/cuda:0, 1: b/cuda:0, c/cpu" in str(refused.value)


def test_a_refusal_lists_no_thousands_of_devices() -> None:
    with pytest.raises(InvalidDeviceMapError, match="and 84 more") as refused:
        find_device("tpu:0", parse_devices("100x1GiB"))
    assert len(str(refused.value)) < 500


# ---- max_memory ------------------------------------------------------------------------------------------------------


def test_max_memory_limits_and_leaves_out() -> None:
    devices = [gpu("a", 0), gpu("a", 1), gpu("a", 2), cpu("a")]
    limited = limit_memory(devices, {"0": "30", "cuda:1": "5KB", "cpu": "7"})
    assert [(device.path, device.capacity_bytes) for device in limited] == [
        ("a/cuda:0", 30),
        ("a/cuda:1", 100),  # no more than it has
        ("a/cpu", 7),
    ]
    assert limit_memory(devices, {}) == devices
    assert limit_memory(devices, {"0": "0", "1": "1"}) == [gpu("a", 1, 1)]


def test_max_memory_of_cpu_names_every_cpu_and_may_name_none() -> None:
    assert [device.capacity_bytes for device in limit_memory([cpu("a"), cpu("b", 3)], {"cpu": "5"})] == [5, 3]
    assert limit_memory([gpu("a", 0)], {"0": "9", "cpu": "64GiB"}) == [gpu("a", 0, 9)]


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"disk": "1GiB"}, InvalidDeviceMapError),
        ({"cuda:7": "1GiB"}, InvalidDeviceMapError),
        ({"0": "-1"}, InvalidRequestError),
        ({"0": "much"}, InvalidRequestError),
        ({"0": "1", "cuda:0": "1"}, InvalidDeviceMapError),
        ({"a/cuda:0": "1", "cuda:0": "2"}, InvalidDeviceMapError),
    ],
)
def test_no_limit(limits: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error) as refused:
        limit_memory([gpu("a", 0)], limits)
    assert "max_memory" in str(refused.value) or "is no device" in str(refused.value)


def test_max_memory_means_the_same_in_any_order() -> None:
    devices = [cpu("a"), cpu("b")]
    for limits in ({"cpu": "5", "b/cpu": "7"}, {"b/cpu": "7", "cpu": "5"}):
        assert [device.capacity_bytes for device in limit_memory(devices, limits)] == [5, 7]


def test_max_memory_of_thousands_of_devices_is_quick() -> None:
    devices = parse_devices("4096x80GiB")
    started = time.process_time()
    assert len(limit_memory(devices, {str(index): "1GiB" for index in range(4096)})) == 4096
    assert time.process_time() - started < 1.0


# ---- CPU workers that share a node -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(nodes=st.lists(st.integers(1, 1000), min_size=1, max_size=4), gpus=st.integers(0, 3), wanted=st.integers(0, 12))
def test_cpus_are_shared_evenly_and_gpus_never(nodes: list[int], gpus: int, wanted: int) -> None:
    devices = [cpu(f"n{index}", size) for index, size in enumerate(nodes)] + [gpu("g", index) for index in range(gpus)]
    shared = share_cpus(devices, wanted)
    assert len(shared) == max(len(devices), wanted)
    assert len({device.path for device in shared}) == len(shared)
    assert [device for device in shared if device.kind == "cuda"] == devices[len(nodes) :]
    counts = []
    for index, size in enumerate(nodes):
        mine = [device for device in shared if device.node == f"n{index}"]
        assert sum(device.capacity_bytes for device in mine) <= size
        counts.append(len(mine))
    assert max(counts) - min(counts) <= 1


def test_slots_are_not_shared() -> None:
    devices = [slot("a", 0), slot("a", 1)]
    assert share_cpus(devices, 5) == devices
