"""The words of a refusal for want of memory: each claim in them is true, and each remedy works."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.cluster.devices import Device
from shardlift.cluster.partition import fit, sequential, sparing_first
from shardlift.cluster.refusal import Circumstances, stage_does_not_fit
from shardlift.cluster.sizes import ModelSizes
from shardlift.proto.v1.errors import OutOfMemoryError

GIB = 1 << 30


def model(
    *layers: int, first: int = 0, last: int = 0, tied: bool = False, kv: int = 0, workspace: int = 0
) -> ModelSizes:
    return ModelSizes(
        layers=tuple((size, size) for size in layers),
        first=(first, first),
        last=(last, last),
        tied=(first, first) if tied else (0, 0),
        shared=(0, 0),
        kv_bytes_per_token=(kv,) * len(layers),
        workspace_bytes=workspace,
    )


def gpus(*capacities: int) -> list[Device]:
    return [
        Device(node="n", name=f"cuda:{index}", kind="cuda", capacity_bytes=size)
        for index, size in enumerate(capacities)
    ]


def refusal(sizes: ModelSizes, devices: list[Device], num_stages: int = 0, **circumstances: object) -> str:
    """What every strategy says, which must be the same."""
    known = Circumstances(**circumstances)  # type: ignore[arg-type]
    texts = set()
    for lay in (fit, sequential, sparing_first):
        with pytest.raises(OutOfMemoryError) as refused:
            lay(sizes, devices, num_stages=num_stages, circumstances=known)
        texts.add(str(refused.value))
    (text,) = texts
    assert "\n" not in text
    return text


def test_what_is_needed_what_is_there_what_is_left_over_and_what_to_do() -> None:
    sizes = model(3 * GIB, 5 * GIB, 3 * GIB, first=GIB, last=2 * GIB, tied=True)
    assert refusal(sizes, gpus(4 * GIB, 6 * GIB), is_limited=True) == (
        "the model needs 14.00 GiB resident, but 2 device(s) give 10.00 GiB, the largest (n/cuda:1) 6.00 GiB; "
        "the obstacle is layer 2 (3.00 GiB) with the head (3.00 GiB), 6.00 GiB, left over when the devices are full: "
        "quantize to 4 bits, raise max_memory or add 1 device(s) of 6.00 GiB"
    )


@pytest.mark.parametrize(
    ("sizes", "obstacle"),
    [
        (model(3, 9, 3), r"layer 1 \(9 B\), 9 B in one piece: .* or add devices of 9 B at least"),
        (model(3, 3, first=5), r"layer 0 \(3 B\) with the embedding \(5 B\), 8 B in one piece"),
        (model(3, 3, last=6), r"layer 1 \(3 B\) with the head \(6 B\), 9 B in one piece"),
        (model(1, 1, first=4, last=4, tied=True), r"layer 1 \(1 B\) with the head \(8 B\), 9 B in one piece"),
        (model(7, 7, workspace=1), r"layer 0 \(7 B\), 8 B in one piece"),
    ],
)
def test_the_module_that_is_too_large_by_itself(sizes: ModelSizes, obstacle: str) -> None:
    assert re.search(obstacle, refusal(sizes, gpus(7, 7, 7)))


def test_layers_that_must_stay_together_are_named_together() -> None:
    sizes = replace(model(3, 3, 3, 3), cuts=(True, False, False, True))
    assert "layers 0 to 2, 9 B in one piece" in refusal(sizes, gpus(8, 8))


def test_of_what_the_need_is_made() -> None:
    text = refusal(model(8, 8, kv=2, workspace=3), gpus(20), reserve_tokens=3)
    assert "needs 31 B (16 B resident, 12 B of keys and values for 3 tokens, 3 B of workspace)" in text


def test_fewer_tokens() -> None:
    sizes = model(8, 8, kv=2)
    assert "reserve 5 tokens at most" in refusal(sizes, gpus(36), reserve_tokens=1000)
    fit(sizes, gpus(36), circumstances=Circumstances(reserve_tokens=5))
    assert "reserve no tokens" in refusal(sizes, gpus(17), reserve_tokens=1)
    assert "tokens at most" not in refusal(sizes, gpus(15), reserve_tokens=1), "they are not what is too much"


def test_other_ways_to_load_with_their_bytes() -> None:
    lighter = (("load_in_4bit", model(4, 4)), ("bnb_4bit_use_double_quant", model(2, 2)))
    text = refusal(model(8, 8), gpus(6), lighter=lighter)
    assert "set load_in_4bit (8 B, still too much), set bnb_4bit_use_double_quant (4 B, fits)" in text


@pytest.mark.parametrize(
    ("quantization", "remedy"),
    [("none", "quantize to 4 bits"), ("int8", "quantize to 4 bits"), ("nf4", "set bnb_4bit_use_double_quant")],
)
def test_other_ways_of_which_nobody_has_told_the_bytes(quantization: str, remedy: str) -> None:
    assert remedy in refusal(model(8, 8), gpus(6), quantization=quantization)
    assert remedy not in refusal(model(8, 8), gpus(6), quantization="nf4+double")


def test_a_number_of_stages_that_cannot_be() -> None:
    text = refusal(model(8, 8), gpus(8, 8, 8), num_stages=1)
    assert "in exactly 1 stage(s): 3 device(s) give 24 B" in text
    assert text.endswith("leave num_stages out: in 2 it fits")


@settings(max_examples=100, deadline=None)
@given(
    layers=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    first=st.integers(0, 30),
    tied=st.booleans(),
    capacities=st.lists(st.integers(0, 60), min_size=1, max_size=3),
)
def test_as_many_devices_more_as_it_says_are_just_enough(
    layers: list[int], first: int, tied: bool, capacities: list[int]
) -> None:
    sizes, devices = model(*layers, first=first, tied=tied), gpus(*capacities)
    try:
        fit(sizes, devices)
        return
    except OutOfMemoryError as error:
        text = str(error)
    if more := re.search(r"add (\d+) device\(s\) of (\d+) B", text):
        count, size = int(more[1]), int(more[2])
        fit(sizes, gpus(*capacities, *[size] * count))
        with pytest.raises(OutOfMemoryError):
            fit(sizes, gpus(*capacities, *[size] * (count - 1)))
        return
    larger = re.search(r"add devices of (\d+) B at least", text)
    assert larger
    assert int(larger[1]) > max(capacities)
    with pytest.raises(OutOfMemoryError):
        fit(sizes, gpus(*[int(larger[1]) - 1] * 6))
    fit(sizes, gpus(*[int(larger[1])] * 6))


def test_a_stage_of_a_map() -> None:
    sizes = model(8, 8, 8, first=4)
    (device,) = gpus(15)
    lighter = (("load_in_4bit", model(2, 2, 2, first=4)),)
    text = str(stage_does_not_fit(sizes, device, (0, 3), Circumstances(lighter=lighter)))
    assert text == (
        "device_map puts 28 B (layers 0 to 2 with the embedding (4 B)) on n/cuda:0, of which 15 B may be used: "
        "end its stage with layer 0 or set load_in_4bit (10 B there)"
    )
    text = str(stage_does_not_fit(sizes, gpus(5)[0], (0, 2), Circumstances(is_limited=True)))
    assert text.endswith("5 B may be used: put modules elsewhere, quantize to 4 bits or raise max_memory")
