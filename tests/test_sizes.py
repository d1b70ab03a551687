"""Predicted bytes against what bitsandbytes and torch really allocate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.cluster.sizes import ITEM_BYTES, Item, Storage, in_4bit, parameter_bytes, sum_up
from shardlift.worker.anatomy import Cut, Place

SHAPES = [(1, 1), (1, 3), (7, 9), (1, 64), (3, 43), (64, 64), (5, 127), (256, 129), (128, 512), (257, 64), (4, 64, 80)]


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, whatever it calls it."""
    if isinstance(value, torch.Tensor):
        yield value.detach()
    if hasattr(value, "__dict__") and id(value) not in seen:
        seen.add(id(value))
        for part in vars(value).values():
            # A parameter's module is reached from it: not part of it.
            if not isinstance(part, torch.nn.Module):
                yield from _tensors(part, seen)


def _allocated(value: Any) -> int:
    """Bytes of the storages that an object holds, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(value, set())}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_storage", ["uint8", "int8", "float16", "bfloat16", "float32"])
def test_4bit(quant_type: str, double: bool, quant_storage: str) -> None:
    item = ITEM_BYTES[quant_storage]
    for shape in SHAPES:
        if quant_storage != "uint8" and (prod(shape) < 4 or -(-prod(shape) // 2) % item):
            continue  # bitsandbytes itself can't view the packed bytes as that dtype
        weight = Params4bit(
            torch.randn(shape, dtype=torch.bfloat16),
            requires_grad=False,
            quant_type=quant_type,
            compress_statistics=double,
            quant_storage=getattr(torch, quant_storage),
        ).to("cpu")
        storage = Storage(kind="4bit", double=double, quant_storage=quant_storage)
        assert parameter_bytes(shape, storage) == _allocated(weight), shape


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), double=st.booleans())
def test_4bit_of_any_shape(rows: int, columns: int, double: bool) -> None:
    weight = Params4bit(
        torch.ones(rows, columns), requires_grad=False, quant_type="nf4", compress_statistics=double
    ).to("cpu")
    assert parameter_bytes((rows, columns), Storage(kind="4bit", double=double)) == _allocated(weight)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2])
def test_8bit(shape: tuple[int, int]) -> None:
    rows, columns = shape
    linear = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    linear.weight = Int8Params(torch.randn(shape, dtype=torch.float16), requires_grad=False, has_fp16_weights=False)
    linear.to("cpu")
    assert linear.weight.dtype is torch.int8
    assert parameter_bytes(shape, Storage(kind="8bit")) == _allocated(linear.weight)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_plain(dtype: str) -> None:
    for shape in [(), (0,), (3, 0, 2), (7,), (3, 5)]:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        assert parameter_bytes(shape, Storage(kind="plain", dtype=dtype)) == tensor.untyped_storage().nbytes()


@st.composite
def _items(draw: st.DrawFn) -> tuple[list[Item], int]:
    layers = draw(st.integers(1, 5))
    places = st.one_of(
        st.builds(lambda layer: Place(part="layer", layer=layer), st.integers(0, layers - 1)),
        st.builds(lambda part: Place(part=part), st.sampled_from(["embedding", "before", "after", "shared"])),
    )
    item = st.builds(
        lambda place, resident, fetch: Item(name="", place=place, resident_bytes=resident, fetch_bytes=fetch),
        places,
        st.integers(0, 1000),
        st.integers(0, 1000),
    )
    return draw(st.lists(item, max_size=20)), layers


@settings(max_examples=100, deadline=None)
@given(items=_items(), tied=st.booleans(), data=st.data())
def test_a_stage_weighs_what_its_items_weigh(items: tuple[list[Item], int], tied: bool, data: st.DataObject) -> None:
    parts, layers = items
    sizes = sum_up(parts, layers, tied=tied, kv_bytes_per_token=(0,) * layers)
    first = data.draw(st.integers(0, layers - 1))
    end = data.draw(st.integers(first + 1, layers))
    held = [item for item in parts if item.place.held_by(Cut(first=first, end=end, num_layers=layers), tied=tied)]
    assert sizes.stage(first, end) == (
        sum(item.resident_bytes for item in held),
        sum(item.fetch_bytes for item in held),
    )


def test_what_is_left_weighs_what_its_stages_weighed() -> None:
    sizes = replace(
        sum_up(
            [
                *(
                    Item(name="", place=Place(part="layer", layer=layer), resident_bytes=9 + layer, fetch_bytes=1)
                    for layer in range(5)
                ),
                Item(name="", place=Place(part="embedding"), resident_bytes=100, fetch_bytes=100),
                Item(name="", place=Place(part="after"), resident_bytes=3, fetch_bytes=3),
                Item(name="", place=Place(part="shared"), resident_bytes=1, fetch_bytes=0),
            ],
            5,
            tied=True,
            kv_bytes_per_token=(1, 2, 3, 4, 5),
        ),
        cuts=(True, False, True, True, False),
    )
    rest = sizes.from_layer(2)
    for first in range(3):
        for end in range(first + 1, 4):
            assert rest.stage(first, end) == sizes.stage(first + 2, end + 2)
            assert rest.kv_bytes(first, end, 7) == sizes.kv_bytes(first + 2, end + 2, 7)
    assert [rest.may_begin(layer) for layer in range(3)] == [True, True, False]


def test_in_4_bits_only_what_can_be_packed_is_lighter() -> None:
    plain = Item(name="norm", place=Place(part="after"), resident_bytes=128, fetch_bytes=128)
    weight = Item(
        name="up",
        place=Place(part="layer", layer=0),
        resident_bytes=16384,
        fetch_bytes=16384,
        packed_shapes=((64, 128),),
    )
    for double in (False, True):
        same, packed = in_4bit([plain, weight], double=double)
        assert same == plain
        assert packed.resident_bytes == parameter_bytes((64, 128), Storage(kind="4bit", double=double))
        assert packed.fetch_bytes == 16384
