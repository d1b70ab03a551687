"""The cut against brute force, and what must hold of every cut."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.cluster.devices import Device
from shardlift.cluster.partition import balanced, fit, sequential
from shardlift.cluster.sizes import ModelSizes
from shardlift.proto.v1.errors import OutOfMemoryError

Runs = list[tuple[int, int]]


def model(layers: Sequence[int], *, first: int = 0, last: int = 0, tied: bool = False, shared: int = 0) -> ModelSizes:
    """A model that weighs as told; `first` is its embedding."""
    return ModelSizes(
        layers=tuple((size, size) for size in layers),
        first=(first, first),
        last=(last, last),
        tied=(first, first) if tied else (0, 0),
        shared=(shared, 0),
        kv_bytes_per_token=(1,) * len(layers),
    )


def gpus(*capacities: int) -> list[Device]:
    return [
        Device(node="n", name=f"cuda:{index}", kind="cuda", capacity_bytes=size)
        for index, size in enumerate(capacities)
    ]


models = st.builds(
    model,
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    first=st.integers(0, 30),
    last=st.integers(0, 30),
    tied=st.booleans(),
    shared=st.integers(0, 3),
)
# Often too small, so that refusals and left-out devices are common.
clusters = st.lists(st.integers(0, 120), min_size=1, max_size=4).map(lambda sizes: gpus(*sizes))


def every_cut(layers: int, stages: int) -> Iterator[Runs]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        ends = [*inner, layers]
        yield list(zip([0, *inner], ends, strict=True))


def weights(sizes: ModelSizes, runs: Runs) -> list[int]:
    return [sizes.stage(first, end)[0] for first, end in runs]


def fits(sizes: ModelSizes, devices: Sequence[Device], runs: Runs) -> bool:
    return all(weight <= device.capacity_bytes for weight, device in zip(weights(sizes, runs), devices, strict=True))


def rank(sizes: ModelSizes, runs: Runs) -> tuple[int, int, int]:
    """Smaller is better: the fullest stage, then idle devices, then how uneven the stages are."""
    sizes_bytes = weights(sizes, runs)
    return max(sizes_bytes), -len(runs), sum(size * size for size in sizes_bytes)


def check(sizes: ModelSizes, devices: Sequence[Device], runs: Runs) -> None:
    assert [first for first, _ in runs] == [0, *(end for _, end in runs[:-1])]
    assert runs[-1][1] == len(sizes.layers)
    assert all(first < end for first, end in runs)
    assert fits(sizes, devices, runs)


@settings(max_examples=200, deadline=None)
@given(sizes=models, devices=clusters)
def test_balanced_is_the_best_cut_over_all_devices(sizes: ModelSizes, devices: list[Device]) -> None:
    used = devices[: len(sizes.layers)]
    possible = [runs for runs in every_cut(len(sizes.layers), len(used)) if fits(sizes, used, runs)]
    if not possible:
        with pytest.raises(OutOfMemoryError):
            balanced(sizes, devices)
        return
    runs = balanced(sizes, devices)
    check(sizes, used, runs)
    assert rank(sizes, runs) == min(rank(sizes, cut) for cut in possible)
    assert runs == balanced(sizes, devices)


@settings(max_examples=200, deadline=None)
@given(sizes=models, devices=clusters)
def test_fit_is_the_best_cut_over_any_of_the_devices(sizes: ModelSizes, devices: list[Device]) -> None:
    layers = len(sizes.layers)
    possible = [
        runs
        for count in range(1, min(layers, len(devices)) + 1)
        for some in itertools.combinations(devices, count)
        for runs in every_cut(layers, count)
        if fits(sizes, some, runs)
    ]
    if not possible:
        with pytest.raises(OutOfMemoryError):
            fit(sizes, devices)
        return
    used, runs = fit(sizes, devices)
    check(sizes, used, runs)
    assert used == [device for device in devices if device in used], "in the cluster's order"
    assert rank(sizes, runs) == min(rank(sizes, cut) for cut in possible)
    assert (used, runs) == fit(sizes, devices)


def fullest(sizes: ModelSizes, devices: Sequence[Device]) -> float:
    try:
        _, runs = fit(sizes, devices)
    except OutOfMemoryError:
        return float("inf")
    return max(weights(sizes, runs))


@settings(max_examples=200, deadline=None)
@given(sizes=models, devices=clusters, index=st.integers(0, 4), extra=st.integers(0, 120))
def test_more_never_makes_the_fullest_stage_fuller(
    sizes: ModelSizes, devices: list[Device], index: int, extra: int
) -> None:
    now = fullest(sizes, devices)
    capacities = [device.capacity_bytes for device in devices]
    index = min(index, len(devices))
    assert fullest(sizes, gpus(*capacities[:index], extra, *capacities[index:])) <= now
    grown = [size + extra if number == index else size for number, size in enumerate(capacities)]
    assert fullest(sizes, gpus(*grown)) <= now


@settings(max_examples=200, deadline=None)
@given(sizes=models, devices=clusters)
def test_sequential_fills_each_device_before_the_next(sizes: ModelSizes, devices: list[Device]) -> None:
    try:
        used, runs = sequential(sizes, devices)
    except OutOfMemoryError:
        assert fullest(sizes, devices) == float("inf"), "what can be cut at all, can be filled up in order"
        return
    check(sizes, used, runs)
    for device, (first, end) in zip(used[:-1], runs[:-1], strict=True):
        assert sizes.stage(first, end + 1)[0] > device.capacity_bytes, "one layer more would have gone there"
    skipped = [device for device in devices[: devices.index(used[-1])] if device not in used]
    for device in skipped:
        first = sum(
            end - begin
            for known, (begin, end) in zip(used, runs, strict=True)
            if devices.index(known) < devices.index(device)
        )
        assert sizes.stage(first, first + 1)[0] > device.capacity_bytes


def test_a_device_too_small_for_any_layer_is_left_out() -> None:
    sizes, devices = model([10] * 4, first=5), gpus(3, 100, 100)
    assert fit(sizes, devices) == (devices[1:], [(0, 2), (2, 4)])
    assert sequential(sizes, devices) == (devices[1:2], [(0, 4)])


def test_heavy_ends_leave_the_middle_even() -> None:
    """The embedding alone decides on the fullest stage: the other stages must be even all the same."""
    assert balanced(model([1] * 10, first=100), gpus(200, 200, 200, 200)) == [(0, 1), (1, 4), (4, 7), (7, 10)]


def test_equal_layers_are_dealt_evenly() -> None:
    assert balanced(model([7] * 8), gpus(*[100] * 4)) == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_refusal_says_what_is_needed_what_is_there_and_what_to_do() -> None:
    sizes = model([3 << 30, 5 << 30, 3 << 30], first=1 << 30, last=2 << 30, tied=True)
    for cut in (balanced, fit, sequential):
        with pytest.raises(OutOfMemoryError) as refused:
            cut(sizes, gpus(4 << 30, 6 << 30))
        text = str(refused.value)
        assert "\n" not in text
        for part in ("14.00 GiB", "10.00 GiB", "n/cuda:1", "6.00 GiB", "layer, 1, 5.00 GiB", "4 bits", "max_memory"):
            assert part in text, part


@pytest.mark.parametrize("capacity", [80 << 30, 130 << 20, 50 << 20])
@pytest.mark.parametrize("ends", [0, 2 << 30])
def test_a_large_cluster_is_quick(capacity: int, ends: int) -> None:
    sizes = model([(100 + index % 7) << 20 for index in range(128)], first=ends, last=ends)
    devices = gpus(*[capacity] * 128)
    started = time.process_time()
    for cut in (balanced, fit):
        try:
            cut(sizes, devices)
        except OutOfMemoryError:
            assert capacity < max(ends, 100 << 20)
    assert time.process_time() - started < 2.0
