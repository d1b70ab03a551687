"""Which devices take stages that have to go elsewhere: all of them find room, or the one that doesn't is named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardlift.cluster.devices import Device
from shardlift.cluster.moves import Need, Shortage, choose


def need(bytes_: int, kind: str = "cuda", what: str = "stage 0 of m") -> Need:
    return Need(what=what, kind=kind, bytes_=bytes_)


def gpu(node: str, index: int, bytes_: int) -> Device:
    return Device(node=node, name=f"cuda:{index}", kind="cuda", capacity_bytes=bytes_, slots=1)


def cpu(node: str, bytes_: int) -> Device:
    return Device(node=node, name="cpu", kind="cpu", capacity_bytes=bytes_)


def test_the_smallest_that_has_room() -> None:
    devices = [gpu("a", 0, 80), gpu("b", 0, 24), gpu("c", 0, 0), cpu("d", 500)]
    assert choose([need(20)], devices) == [devices[1]]
    assert choose([need(20), need(60)], devices) == [devices[1], devices[0]]


def test_a_gpu_takes_one_stage_and_a_node_several() -> None:
    shortage = choose([need(20), need(20)], [gpu("a", 0, 80), cpu("b", 500)])
    assert isinstance(shortage, Shortage)
    assert "20 bytes of a cuda device" in str(shortage)
    assert choose([need(20, "cpu"), need(20, "cpu")], [cpu("b", 45)]) is not None
    found = choose([need(20, "cpu"), need(20, "cpu")], [cpu("b", 45)])
    assert isinstance(found, list)
    assert [device.path for device in found] == ["b/cpu", "b/cpu"]
    assert isinstance(choose([need(20, "cpu")] * 3, [cpu("b", 45)]), Shortage)


def test_a_shortage_names_what_is_missing_and_what_there_is() -> None:
    shortage = choose([need(100, what="stage 2 of big")], [gpu("a", 0, 80), gpu("b", 1, 24)])
    assert str(shortage) == (
        "stage 2 of big needs 100 bytes of a cuda device, and of the others the roomiest, a/cuda:0, has 80"
    )
    assert str(choose([need(1)], [])).endswith("there is none")


@given(st.lists(st.integers(1, 50), max_size=6), st.lists(st.integers(0, 100), max_size=6))
def test_nobody_gets_more_than_there_is(needs: list[int], capacities: list[int]) -> None:
    devices = [cpu(f"n{index}", bytes_) for index, bytes_ in enumerate(capacities)]
    found = choose([need(bytes_, "cpu") for bytes_ in needs], devices)
    if isinstance(found, Shortage):
        assert found.most_bytes < found.need.bytes_
        return
    for device, capacity in zip(devices, capacities, strict=True):
        taken = sum(bytes_ for bytes_, chosen in zip(needs, found, strict=True) if chosen.node == device.node)
        assert taken <= capacity
