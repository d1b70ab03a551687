"""The cut against brute force, and what must hold of every cut."""

from __future__ import annotations

import itertools
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.cluster.devices import Device
from shardlift.cluster.partition import balanced, fit, sequential, sparing_first
from shardlift.cluster.refusal import Circumstances
from shardlift.cluster.sizes import ModelSizes
from shardlift.proto.v1.errors import OutOfMemoryError

Runs = list[tuple[int, int]]
# Index of a device and the layers `[first, end)` on it.
Cut = list[tuple[int, int, int]]


def model(
    layers: Sequence[int],
    *,
    first: int = 0,
    last: int = 0,
    tied: bool = False,
    shared: int = 0,
    kv: int = 1,
    workspace: int = 0,
    cuts: Sequence[bool] | None = None,
) -> ModelSizes:
    """A model that weighs as told; `first` is its embedding."""
    return ModelSizes(
        layers=tuple((size, size) for size in layers),
        first=(first, first),
        last=(last, last),
        tied=(first, first) if tied else (0, 0),
        shared=(shared, 0),
        kv_bytes_per_token=(kv,) * len(layers),
        workspace_bytes=workspace,
        cuts=None if cuts is None else tuple(cuts),
    )


def gpu(index: int, capacity: int, speed: int = 1, node: str = "n") -> Device:
    return Device(node=node, name=f"cuda:{index}", kind="cuda", capacity_bytes=capacity, speed=speed)


def gpus(*capacities: int) -> list[Device]:
    return [gpu(index, size) for index, size in enumerate(capacities)]


@st.composite
def models(draw: st.DrawFn, most_layers: int = 5) -> ModelSizes:
    layers = draw(st.lists(st.integers(0, 20), min_size=1, max_size=most_layers))
    everywhere = st.just([True] * len(layers))
    return model(
        layers,
        first=draw(st.integers(0, 30)),
        last=draw(st.integers(0, 30)),
        tied=draw(st.booleans()),
        shared=draw(st.integers(0, 3)),
        kv=draw(st.integers(0, 3)),
        workspace=draw(st.integers(0, 5)),
        cuts=draw(everywhere | st.lists(st.booleans(), min_size=len(layers), max_size=len(layers))),
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[Device]:
    """Often too small, so that refusals and left-out devices are common; nodes may even come back."""
    sizes = draw(st.lists(st.integers(0, 120), min_size=1, max_size=4))
    return [
        gpu(index, size, draw(st.sampled_from([1, 2, 3, 7])), draw(st.sampled_from("ab")))
        for index, size in enumerate(sizes)
    ]


reserves = st.integers(0, 8)


def every_cut(sizes: ModelSizes, devices: Sequence[Device], tokens: int = 0, num_stages: int = 0) -> Iterator[Cut]:
    """All that fit, found without any of the code under test."""
    layers = len(sizes.layers)
    for stages in [num_stages] if num_stages else range(1, layers + 1):
        for inner in itertools.combinations(range(1, layers), stages - 1):
            if not all(sizes.cuts is None or sizes.cuts[layer] for layer in inner):
                continue
            runs = list(zip([0, *inner], [*inner, layers], strict=True))
            for indices in itertools.combinations(range(len(devices)), stages):
                cut = [(index, *run) for index, run in zip(indices, runs, strict=True)]
                if all(needed(sizes, run[1:], tokens) <= devices[run[0]].capacity_bytes for run in cut):
                    yield cut


def needed(sizes: ModelSizes, run: tuple[int, int], tokens: int) -> int:
    kv = sum(sizes.kv_bytes_per_token[run[0] : run[1]]) * tokens
    return sizes.stage(*run)[0] + kv + sizes.workspace_bytes


def slowest(sizes: ModelSizes, devices: Sequence[Device], cut: Cut) -> Fraction:
    return max(Fraction(sizes.stage(first, end)[0], devices[index].speed) for index, first, end in cut)


def crossings(devices: Sequence[Device], cut: Cut) -> int:
    nodes = [devices[index].node for index, _, _ in cut]
    return sum(node != after for node, after in itertools.pairwise(nodes))


def rank(sizes: ModelSizes, devices: Sequence[Device], cut: Cut) -> tuple[object, ...]:
    """Smaller is better: all that a cut is chosen by, in order."""
    worth = [device.speed * device.capacity_bytes for device in devices]
    weights = [min(256 * max(worth) // each, 65536) if each else 65536 for each in worth]
    uneven = sum(sizes.stage(first, end)[0] ** 2 * weights[index] // gcd(*weights) for index, first, end in cut)
    order = [(end, index) for index, _, end in cut]
    return slowest(sizes, devices, cut), crossings(devices, cut), -len(cut), uneven, order


def as_cut(devices: Sequence[Device], found: tuple[list[Device], Runs]) -> Cut:
    used, runs = found
    return [(devices.index(device), *run) for device, run in zip(used, runs, strict=True)]


def check(sizes: ModelSizes, devices: Sequence[Device], cut: Cut, tokens: int = 0) -> None:
    """Each layer once and in order, each device once and in order, none over its memory, no cut where none may be."""
    assert [first for _, first, _ in cut] == [0, *(end for _, _, end in cut[:-1])]
    assert cut[-1][2] == len(sizes.layers)
    assert all(first < end for _, first, end in cut)
    assert [index for index, _, _ in cut] == sorted({index for index, _, _ in cut})
    for index, first, end in cut:
        assert needed(sizes, (first, end), tokens) <= devices[index].capacity_bytes
        assert first == 0 or sizes.cuts is None or sizes.cuts[first]


# ---- the best cut ----------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(sizes=models(), devices=clusters(), tokens=reserves, num_stages=st.integers(0, 4))
def test_fit_is_the_best_cut_that_there_is(
    sizes: ModelSizes, devices: list[Device], tokens: int, num_stages: int
) -> None:
    possible = list(every_cut(sizes, devices, tokens, num_stages))
    circumstances = Circumstances(reserve_tokens=tokens)
    if not possible:
        with pytest.raises(OutOfMemoryError):
            fit(sizes, devices, num_stages=num_stages, circumstances=circumstances)
        return
    found = fit(sizes, devices, num_stages=num_stages, circumstances=circumstances)
    cut = as_cut(devices, found)
    check(sizes, devices, cut, tokens)
    best = min(possible, key=lambda cut: rank(sizes, devices, cut))
    assert cut == best, (rank(sizes, devices, cut), rank(sizes, devices, best))
    assert found == fit(sizes, devices, num_stages=num_stages, circumstances=circumstances)


@settings(max_examples=200, deadline=None)
@given(sizes=models(), devices=clusters())
def test_balanced_is_the_best_cut_over_all_devices(sizes: ModelSizes, devices: list[Device]) -> None:
    parts = sum(layer == 0 or sizes.cuts is None or sizes.cuts[layer] for layer in range(len(sizes.layers)))
    used = devices[:parts]
    possible = list(every_cut(sizes, used, num_stages=len(used)))
    if not possible:
        with pytest.raises(OutOfMemoryError):
            balanced(sizes, devices)
        return
    best = min(possible, key=lambda cut: rank(sizes, used, cut))
    assert balanced(sizes, devices) == [(first, end) for _, first, end in best]


def least_time(sizes: ModelSizes, devices: Sequence[Device], num_stages: int = 0) -> Fraction | None:
    """By a program so plain that it can be seen to be right: too slow for brute force's big sisters only."""
    layers = len(sizes.layers)
    best: dict[tuple[int, int], Fraction] = {(0, 0): Fraction(0)}  # layers and stages gone -> time
    for device in devices:
        for (first, stages), time_before in list(best.items()):
            for end in range(first + 1, layers + 1):
                weight = sizes.stage(first, end)[0]
                if weight <= device.capacity_bytes:
                    gone = (end, stages + 1 if num_stages else 0)
                    taken = max(time_before, Fraction(weight, device.speed))
                    best[gone] = min(best.get(gone, taken), taken)
    return best.get((layers, num_stages))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), scale=st.sampled_from([1, 10**6, 10**13]), fastest=st.sampled_from([1, 12, 5000, 10**9]))
def test_the_slowest_stage_is_exact_at_any_size(data: st.DataObject, scale: int, fastest: int) -> None:
    """Weights of petabytes and speeds without a common measure, where a float, or an int64, would go wrong."""
    weight = st.integers(1, 9 * scale)
    sizes = model(
        data.draw(st.lists(weight, min_size=1, max_size=12)),
        first=data.draw(weight),
        last=data.draw(weight),
        tied=data.draw(st.booleans()),
    )
    devices = [
        gpu(index, data.draw(st.integers(1, 40 * scale)), data.draw(st.integers(1, fastest)), f"n{index // 3}")
        for index in range(data.draw(st.integers(1, 9)))
    ]
    num_stages = data.draw(st.integers(0, len(devices)))
    time_s = least_time(sizes, devices, num_stages)
    if time_s is None:
        with pytest.raises(OutOfMemoryError):
            fit(sizes, devices, num_stages=num_stages)
        return
    cut = as_cut(devices, fit(sizes, devices, num_stages=num_stages))
    check(sizes, devices, cut)
    assert slowest(sizes, devices, cut) == time_s
    assert num_stages in (0, len(cut))


def goodness(sizes: ModelSizes, devices: Sequence[Device]) -> tuple[object, ...]:
    """Time of the slowest stage, crossings, devices in use: what more devices and memory must never make worse."""
    try:
        found = fit(sizes, devices)
    except OutOfMemoryError:
        return (float("inf"),)
    return rank(sizes, devices, as_cut(devices, found))[:3]


@settings(max_examples=200, deadline=None)
@given(sizes=models(), devices=clusters(), index=st.integers(0, 4), extra=st.integers(0, 120), speed=st.integers(1, 7))
def test_more_never_makes_it_worse(
    sizes: ModelSizes, devices: list[Device], index: int, extra: int, speed: int
) -> None:
    now = goodness(sizes, devices)
    index = min(index, len(devices))
    another = gpu(99, extra, speed, "ab"[extra % 2])
    assert goodness(sizes, [*devices[:index], another, *devices[index:]]) <= now
    for number, device in enumerate(devices):
        grown = gpu(number, device.capacity_bytes + extra, device.speed, device.node)
        assert goodness(sizes, [*devices[:number], grown, *devices[number + 1 :]]) <= now


# ---- what decides, one by one ----------------------------------------------------------------------------------------


def test_a_faster_device_gets_more() -> None:
    assert fit(model([10] * 9), [gpu(0, 100, 2), gpu(1, 100, 1)])[1] == [(0, 6), (6, 9)]


def test_a_slow_device_is_left_out_where_it_would_hold_the_others_up() -> None:
    devices = [gpu(0, 100, 100), gpu(1, 100, 1), gpu(2, 100, 100)]
    assert fit(model([10] * 4), devices)[0] == [devices[0], devices[2]]


def test_a_crossing_is_only_made_where_it_makes_the_slowest_stage_faster() -> None:
    devices = [gpu(index, 300, node="ab"[index // 2]) for index in range(4)]
    # The embedding decides: the second node would hold layers, but not make the model any faster.
    used, _ = fit(model([1] * 4, first=100), devices)
    assert [device.node for device in used] == ["a", "a"]
    used, _ = fit(model([1] * 4), devices)
    assert len(used) == 4


def test_stages_are_put_on_one_node_where_one_is_enough() -> None:
    devices = [gpu(index, 100, node=node) for index, node in enumerate("aabbbcc")]
    used, _ = fit(model([10] * 6), devices, num_stages=3)
    assert [device.node for device in used] == ["b", "b", "b"]


def test_num_stages_takes_the_devices_that_serve_it_best_not_the_largest() -> None:
    devices = [gpu(0, 40, 4), gpu(1, 100, 1), gpu(2, 40, 4)]
    assert fit(model([10] * 4), devices, num_stages=2)[0] == [devices[0], devices[2]]


def test_of_equal_ones_the_roomier_devices_are_taken() -> None:
    devices = gpus(41, 80, 42, 80)
    assert fit(model([10] * 4), devices, num_stages=2)[0] == [devices[1], devices[3]]


def test_a_device_too_small_for_any_layer_is_left_out() -> None:
    sizes, devices = model([10] * 4, first=5), gpus(3, 100, 100)
    assert fit(sizes, devices) == (devices[1:], [(0, 2), (2, 4)])
    assert sequential(sizes, devices) == (devices[1:2], [(0, 4)])


def test_heavy_ends_leave_the_middle_even() -> None:
    """The embedding alone decides on the fullest stage: the other stages must be even all the same."""
    assert balanced(model([1] * 10, first=100), gpus(200, 200, 200, 200)) == [(0, 1), (1, 4), (4, 7), (7, 10)]


def test_equal_layers_are_dealt_evenly() -> None:
    assert balanced(model([7] * 8), gpus(*[100] * 4)) == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_layers_that_belong_together_stay_together() -> None:
    sizes = model([10] * 6, cuts=[True, False, False, True, False, True])
    for lay in (fit, sequential, sparing_first):
        assert {first for first, _ in lay(sizes, gpus(30, 30, 30))[1]} <= {0, 3, 5}
    with pytest.raises(OutOfMemoryError, match="exactly 4 stage"):
        fit(sizes, gpus(60, 60, 60, 60), num_stages=4)


def test_room_for_tokens_and_workspace_counts_for_memory_but_not_for_time() -> None:
    sizes = model([10] * 4, kv=1, workspace=3)
    assert len(fit(sizes, gpus(43, 12))[0]) == 1, "the second has no room for a layer, its tokens and the workspace"
    with pytest.raises(OutOfMemoryError):
        fit(sizes, gpus(42))
    assert fit(sizes, gpus(83), circumstances=Circumstances(reserve_tokens=10))[1] == [(0, 4)]
    with pytest.raises(OutOfMemoryError):
        fit(sizes, gpus(82), circumstances=Circumstances(reserve_tokens=10))


# ---- other strategies ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sizes=models(), devices=clusters(), tokens=reserves)
def test_sequential_fills_each_device_before_the_next(sizes: ModelSizes, devices: list[Device], tokens: int) -> None:
    possible = list(every_cut(sizes, devices, tokens))
    circumstances = Circumstances(reserve_tokens=tokens)
    if not possible:
        with pytest.raises(OutOfMemoryError):
            sequential(sizes, devices, circumstances=circumstances)
        return
    cut = as_cut(devices, sequential(sizes, devices, circumstances=circumstances))
    check(sizes, devices, cut, tokens)
    # Stage by stage the earliest device, and as much of the model on it as can be.
    first = 0
    for index, device in enumerate(devices):
        ends = [
            end
            for end in range(first + 1, len(sizes.layers) + 1)
            if (end == len(sizes.layers) or sizes.cuts is None or sizes.cuts[end])
            and needed(sizes, (first, end), tokens) <= device.capacity_bytes
        ]
        if ends:
            assert (index, first, max(ends)) in cut
            first = max(ends)
        if first == len(sizes.layers):
            break


@settings(max_examples=200, deadline=None)
@given(sizes=models(), devices=clusters(), num_stages=st.integers(1, 4))
def test_sequential_in_so_many_stages(sizes: ModelSizes, devices: list[Device], num_stages: int) -> None:
    possible = list(every_cut(sizes, devices, num_stages=num_stages))
    if not possible:
        with pytest.raises(OutOfMemoryError):
            sequential(sizes, devices, num_stages=num_stages)
        return
    cut = as_cut(devices, sequential(sizes, devices, num_stages=num_stages))
    assert cut == min(possible, key=lambda cut: [(index, -end) for index, _, end in cut])


@settings(max_examples=200, deadline=None)
@given(sizes=models(), devices=clusters(), tokens=reserves, num_stages=st.integers(0, 3))
def test_the_first_device_is_spared_as_far_as_the_others_allow(
    sizes: ModelSizes, devices: list[Device], tokens: int, num_stages: int
) -> None:
    possible = list(every_cut(sizes, devices, tokens, num_stages))
    circumstances = Circumstances(reserve_tokens=tokens)
    if not possible:
        with pytest.raises(OutOfMemoryError):
            sparing_first(sizes, devices, num_stages=num_stages, circumstances=circumstances)
        return
    found = sparing_first(sizes, devices, num_stages=num_stages, circumstances=circumstances)
    cut = as_cut(devices, found)
    check(sizes, devices, cut, tokens)
    assert num_stages in (0, len(cut))

    def on_first(cut: Cut) -> int:
        return cut[0][2] if cut[0][0] == 0 else 0

    assert on_first(cut) == min(on_first(cut) for cut in possible)
    # Of those, what the others take is the best for them.
    spared = [other for other in possible if on_first(other) == on_first(cut)]
    others = [each for each in cut if each[0]]
    if others:
        quickest = min(slowest(sizes, devices, [each for each in other if each[0]]) for other in spared)
        assert slowest(sizes, devices, others) == quickest
        assert crossings(devices, cut) == min(
            crossings(devices, other)
            for other in spared
            if slowest(sizes, devices, [each for each in other if each[0]]) == quickest
        )


# ---- size ------------------------------------------------------------------------------------------------------------


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


LAY: list[Callable[..., tuple[list[Device], Runs]]] = [fit, sparing_first, sequential]


@pytest.mark.parametrize(("count", "most_s"), [(1024, 2.0), (4096, 8.0)])
@pytest.mark.parametrize("num_stages", [0, 20])
@pytest.mark.parametrize("lay", LAY)
def test_a_thousand_unequal_devices(
    count: int, most_s: float, num_stages: int, lay: Callable[..., tuple[list[Device], Runs]]
) -> None:
    """A 671-billion-parameter model's 61 layers over hundreds of nodes, no two devices alike."""
    chance = random.Random(0)
    sizes = model([(11 << 30) + chance.randrange(1 << 28) for _ in range(61)], first=2 << 30, last=2 << 30, kv=70_000)
    devices = [
        gpu(index, chance.randrange(20 << 30, 140 << 30), chance.randrange(300, 5000), f"n{index // 8}")
        for index in range(count)
    ]
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    found = lay(sizes, devices, num_stages=num_stages, circumstances=Circumstances(reserve_tokens=4096))
    assert time.process_time() - started < most_s
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 256 << 10
    cut = as_cut(devices, found)
    check(sizes, devices, cut, 4096)
    assert num_stages in (0, len(cut))
