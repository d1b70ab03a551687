"""Strategies and device maps: where each module goes, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.cluster.devices import Device, parse_devices
from shardlift.cluster.plan import DEVICE_MAPS, ModelOutline, Plan, PlanOptions, make_plan
from shardlift.cluster.sizes import ModelSizes
from shardlift.proto.v1.errors import InvalidDeviceMapError, InvalidRequestError, OutOfMemoryError
from shardlift.worker.anatomy import FAMILIES, place_of

LAYERS, EMBEDDING, HEAD, LAYER = 6, 30, 31, 10


def outline(layers: int = LAYERS, *, family: str = "llama", tied: bool = False) -> ModelOutline:
    anatomy = FAMILIES[family]
    names = [anatomy.embedding, *anatomy.before, *(f"{anatomy.layers}.{index}" for index in range(layers))]
    names = [f"{anatomy.base}.{name}" for name in [*names, *anatomy.after, "rotary_emb"]] + [anatomy.head]
    return ModelOutline(
        sizes=ModelSizes(
            layers=((LAYER, LAYER),) * layers,
            first=(EMBEDDING, EMBEDDING),
            last=(HEAD - EMBEDDING if tied else HEAD, 0),
            tied=(EMBEDDING, EMBEDDING) if tied else (0, 0),
            shared=(1, 0),
            kv_bytes_per_token=tuple(range(1, layers + 1)),
        ),
        modules=tuple((name, place_of(name, anatomy)) for name in names),
        tied=tied,
        quantization="none",
        dtype="bfloat16",
    )


def gpu(index: int, capacity: int = 1000, node: str = "g") -> Device:
    return Device(node=node, name=f"cuda:{index}", kind="cuda", capacity_bytes=capacity, slots=1)


def slot(index: int, capacity: int = 1000) -> Device:
    return Device(node="s", name=f"cpu:{index}", kind="cpu", capacity_bytes=capacity, slots=1)


def cpu(node: str = "c", capacity: int = 1000) -> Device:
    return Device(node=node, name="cpu", kind="cpu", capacity_bytes=capacity)


def plan(devices: list[Device], model: ModelOutline | None = None, **options: Any) -> Plan:
    return make_plan("org/model", "c0ffee", model or outline(), devices, PlanOptions(**options))


def layers_of(made: Plan) -> list[tuple[str, int, int]]:
    return [(stage.device.path, stage.cut.first, stage.cut.end) for stage in made.stages]


def used(made: Plan) -> list[str]:
    return [stage.device.path for stage in made.stages]


# ---- strategies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_balanced_over_all_devices(device_map: str) -> None:
    assert layers_of(plan([gpu(0), gpu(1), gpu(2)], device_map=device_map)) == [
        ("g/cuda:0", 0, 1),
        ("g/cuda:1", 1, 5),
        ("g/cuda:2", 5, 6),
    ]


def test_sequential_names_the_devices_that_it_fills() -> None:
    devices = [gpu(0, 5), gpu(1, 62), gpu(2), gpu(3)]
    assert layers_of(plan(devices, device_map="sequential")) == [("g/cuda:1", 0, 3), ("g/cuda:2", 3, 6)]


def test_balanced_low_0_leaves_the_first_device_free_as_far_as_the_rest_suffices() -> None:
    assert used(plan([gpu(0), gpu(1), gpu(2)], device_map="balanced_low_0")) == ["g/cuda:1", "g/cuda:2"]
    assert used(plan([gpu(0), gpu(1)], device_map="balanced_low_0", num_stages=1)) == ["g/cuda:1"]
    assert used(plan([gpu(0), gpu(1)], device_map="balanced_low_0", num_stages=2)) == ["g/cuda:0", "g/cuda:1"]
    assert used(plan([gpu(0), gpu(1, 70)], device_map="balanced_low_0")) == ["g/cuda:0", "g/cuda:1"]
    assert used(plan([gpu(0)], device_map="balanced_low_0")) == ["g/cuda:0"]


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("num_stages", [0, 2])
def test_strategies_leave_a_cpu_beside_gpus_alone(device_map: str, num_stages: int) -> None:
    for gpus in ([gpu(0), gpu(1), gpu(2)], [slot(0), slot(1), slot(2)], [gpu(0), slot(0), slot(1)]):
        made = plan([cpu("a", 10**6), *gpus, cpu("b", 10**6)], device_map=device_map, num_stages=num_stages)
        assert set(used(made)) <= {device.path for device in gpus}


def test_too_little_gpu_memory_is_refused_not_eked_out_with_a_cpu() -> None:
    with pytest.raises(OutOfMemoryError, match=r"2 device\(s\)"):
        plan([gpu(0, 50), gpu(1, 50), cpu(capacity=10**9)])


def test_cpu_means_cpu_workers_alone() -> None:
    assert used(plan([gpu(0), cpu("a"), slot(0), cpu("b")], device_map="cpu")) == ["a/cpu", "s/cpu:0", "b/cpu"]
    with pytest.raises(InvalidDeviceMapError, match="no node offers a CPU worker"):
        plan([gpu(0)], device_map="cpu")


def test_without_gpus_cpus_are_used() -> None:
    assert used(plan([cpu("a"), cpu("b")])) == ["a/cpu", "b/cpu"]


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_cpu_workers_share_a_node_as_many_as_are_asked_for(num_stages: int) -> None:
    made = plan([cpu(capacity=1000)], num_stages=num_stages)
    assert len(made.stages) == num_stages
    assert sum(stage.device.capacity_bytes for stage in made.stages) <= 1000


def test_num_stages_takes_the_largest_devices_in_their_order() -> None:
    assert used(plan([gpu(0, 90), gpu(1, 100), gpu(2, 200), gpu(3, 95)], num_stages=2)) == ["g/cuda:1", "g/cuda:2"]


def test_num_stages_holds_for_every_strategy() -> None:
    devices = [gpu(0), gpu(1, 70), gpu(2), gpu(3)]
    assert layers_of(plan(devices, device_map="sequential", num_stages=3)) == [
        ("g/cuda:0", 0, 4),
        ("g/cuda:1", 4, 5),
        ("g/cuda:2", 5, 6),
    ]
    assert used(plan(devices, device_map="balanced_low_0", num_stages=3)) == ["g/cuda:1", "g/cuda:2", "g/cuda:3"]
    with pytest.raises(InvalidRequestError, match="num_stages=-1: write 1 or more"):
        plan(devices, num_stages=-1)


def test_low_0_puts_on_the_first_device_what_the_others_cannot_hold() -> None:
    assert layers_of(plan([gpu(0), gpu(1, 72)], device_map="balanced_low_0")) == [
        ("g/cuda:0", 0, 2),
        ("g/cuda:1", 2, 6),
    ]


def test_num_stages_that_cannot_be() -> None:
    with pytest.raises(InvalidRequestError, match="num_stages=7, but the model has 6 layers"):
        plan([gpu(index) for index in range(8)], num_stages=7)
    with pytest.raises(InvalidRequestError, match="num_stages=3, but there are 2 devices"):
        plan([gpu(0), gpu(1)], num_stages=3)
    with pytest.raises(InvalidRequestError, match="num_stages=3, but there are 2 devices"):
        plan([gpu(0), gpu(1), cpu()], num_stages=3)
    with pytest.raises(InvalidRequestError, match="num_stages=2, but max_memory leaves 1"):
        plan([gpu(0), gpu(1)], num_stages=2, max_memory={"1": "900"})
    with pytest.raises(OutOfMemoryError):
        plan([gpu(0, 80), gpu(1, 80), gpu(2, 80)], num_stages=1)


def test_max_memory() -> None:
    assert used(plan([gpu(0), gpu(1), gpu(2)], max_memory={"0": "1000", "2": "1000"})) == ["g/cuda:0", "g/cuda:2"]
    assert used(plan([gpu(0), gpu(1)], max_memory={"0": "0", "1": "1000"})) == ["g/cuda:1"]
    assert layers_of(plan([gpu(0), gpu(1)], max_memory={"0": "42", "1": "1000"})) == [
        ("g/cuda:0", 0, 1),
        ("g/cuda:1", 1, 6),
    ]
    # As written for accelerate, with what may be offloaded beside: nothing is.
    assert used(plan([gpu(0), cpu()], max_memory={"0": "1000", "cpu": "64GiB"})) == ["g/cuda:0"]
    with pytest.raises(InvalidDeviceMapError, match="leaves no device"):
        plan([gpu(0)], max_memory={"0": "0"})
    with pytest.raises(InvalidDeviceMapError, match="disk"):
        plan([gpu(0)], max_memory={"0": "1GiB", "disk": "1GiB"})
    with pytest.raises(InvalidDeviceMapError, match="leaves no device"):
        plan([gpu(0), gpu(1)], max_memory={"cpu": "64GiB"})


def test_unknown_strategy() -> None:
    with pytest.raises(InvalidDeviceMapError, match="'fastest' is none of auto, balanced"):
        plan([gpu(0)], device_map="fastest")


def test_too_large_a_model_is_refused_with_what_is_missing() -> None:
    with pytest.raises(OutOfMemoryError, match=r"122 B.*1 device\(s\) give 121 B.*\(g/cuda:0\)"):
        plan([gpu(0, 121)])


def test_reserved_tokens_and_workspace_need_room_too() -> None:
    model = outline()
    model = replace(model, sizes=replace(model.sizes, workspace_bytes=5))
    made = plan([gpu(0, 169), gpu(1, 20)], model, reserve_tokens=2)
    (stage,) = made.stages
    assert (stage.resident_bytes, stage.workspace_bytes, stage.kv_bytes) == (122, 5, 2 * (1 + 2 + 3 + 4 + 5 + 6))
    assert stage.kv_bytes_per_token == 21
    for device_map in ("auto", "balanced_low_0", "sequential"):
        with pytest.raises(OutOfMemoryError, match=r"169 B \(122 B resident, 42 B of keys and values for 2 tokens"):
            plan([gpu(0, 168)], model, reserve_tokens=2, device_map=device_map)
    with pytest.raises(OutOfMemoryError, match="puts 169 B"):
        plan([gpu(0, 168)], model, reserve_tokens=2, by_module={"": "0"})
    assert plan([gpu(0, 168)], model, reserve_tokens=1, by_module={"": "0"}).stages[0].kv_bytes == 21
    for tokens in (-1, 1 << 41):
        with pytest.raises(InvalidRequestError, match=f"reserve_tokens={tokens}"):
            plan([gpu(0)], reserve_tokens=tokens)


def test_the_circumstances_are_told_to_every_refusal() -> None:
    model = replace(outline(), lighter=(("load_in_4bit", replace(outline().sizes, layers=((1, 1),) * LAYERS)),))
    for asked in ({}, {"device_map": "sequential"}, {"device_map": "balanced_low_0"}, {"by_module": {"": "0"}}):
        with pytest.raises(OutOfMemoryError, match=r"set load_in_4bit \(68 B.*raise max_memory"):
            plan([gpu(0, 121)], model, max_memory={"0": "110"}, **asked)


# ---- dicts -----------------------------------------------------------------------------------------------------------


def test_the_longest_prefix_wins() -> None:
    by_module = {"": "0", "model.layers.3": "1", "model.layers.4": "1", "model.layers.5": "1", "lm_head": "1"}
    made = plan([gpu(0), gpu(1)], by_module=by_module | {"model.norm": "1"})
    assert layers_of(made) == [("g/cuda:0", 0, 3), ("g/cuda:1", 3, 6)]


def test_a_prefix_ends_at_a_dot() -> None:
    """ "model.layers.1" is not "model.layers.10"."""
    by_module = {"": "1", "model.embed_tokens": "0", "model.layers.0": "0", "model.layers.1": "0"}
    made = plan([gpu(0), gpu(1)], outline(12), by_module=by_module)
    assert layers_of(made) == [("g/cuda:0", 0, 2), ("g/cuda:1", 2, 12)]


def test_a_dict_may_name_any_device_by_any_name() -> None:
    by_module = {"": "cpu", "model.embed_tokens": "cuda:0", "model.layers.0": "0", "model.layers.1": "g/cuda:0"}
    assert layers_of(plan([cpu(), gpu(0)], by_module=by_module)) == [("g/cuda:0", 0, 2), ("c/cpu", 2, 6)]


def test_the_order_of_stages_is_that_of_the_layers_not_of_the_devices() -> None:
    by_module = {"": "0", "model.embed_tokens": "1", "model.layers.0": "1"}
    assert used(plan([gpu(0), gpu(1)], by_module=by_module)) == ["g/cuda:1", "g/cuda:0"]


def test_cpus_of_one_node_by_number() -> None:
    by_module = {"": "cpu:0", "model.layers.5": "cpu:1", "model.norm": "cpu:1", "lm_head": "cpu:1"}
    assert layers_of(plan([cpu()], by_module=by_module)) == [("c/cpu:0", 0, 5), ("c/cpu:1", 5, 6)]


def test_cpus_by_index_and_beside_gpus() -> None:
    ends = {"model.layers.5": "1", "model.norm": "1", "lm_head": "1"}
    assert used(plan([cpu()], by_module={"": "0"} | ends)) == ["c/cpu:0", "c/cpu:1"]
    ends = dict.fromkeys(ends, "cpu:1")
    by_module = {"": "cpu:0", "model.embed_tokens": "cuda:0", "model.layers.0": "cuda:0"} | ends
    assert used(plan([cpu(), gpu(0)], by_module=by_module)) == ["g/cuda:0", "c/cpu:0", "c/cpu:1"]


def test_inner_modules_may_be_named_where_they_stay_with_their_layer() -> None:
    by_module = {"": "0", "model.layers.3.mlp": "cuda:0", "model.layers.3.mlp.up_proj": "g/cuda:0"}
    assert layers_of(plan([gpu(0), gpu(1)], by_module=by_module)) == [("g/cuda:0", 0, 6)]


def test_gpt2_by_its_own_names() -> None:
    by_module = {"transformer": "0", "transformer.h.5": "1", "transformer.ln_f": "1", "lm_head": "1"}
    made = plan([gpu(0), gpu(1)], outline(family="gpt2", tied=True), by_module=by_module)
    assert layers_of(made) == [("g/cuda:0", 0, 5), ("g/cuda:1", 5, 6)]


@pytest.mark.parametrize(
    ("by_module", "problem"),
    [
        ({"model.layers": "0", "lm_head": "0"}, "no device for model.embed_tokens"),
        ({"": "0", "model.layers.6": "0"}, "'model.layers.6', which is no module"),
        ({"": "0", "transformer": "0"}, "'transformer', which is no module"),
        ({"": "2"}, "'2' is no device"),
        ({"": "disk"}, "'disk' is no device"),
        ({"": "0", "model.layers.2": "1"}, "returns to g/cuda:0 at model.layers.3"),
        ({"": "0", "model.layers.2.mlp": "1"}, "model.layers.2.mlp on g/cuda:1 and the rest of model.layers.2"),
        ({"": "0", "model.layers.5": "1", "model.norm": "1"}, "puts lm_head on g/cuda:0, .* the last layer"),
        ({"": "0", "model.embed_tokens": "1"}, "puts model.embed_tokens on g/cuda:1, .* the first layer"),
        ({"": "0", "model.norm": "1"}, "puts model.norm on g/cuda:1"),
        ({"": "0", "model.layers.": "0"}, "'model.layers.', which is no module"),
        ({"": "0", "9" * 5000: "0"}, "which is no module"),
        ({"": "9" * 5000}, "is no device"),
        ({"": "cuda:0", "model": "0", "lm_head": "g/cuda:0", "model.norm": "1"}, "puts model.norm on g/cuda:1"),
        (
            {"": "0", "model.layers": "1", **{f"model.layers.{layer}": "0" for layer in range(LAYERS)}},
            "puts model.layers on g/cuda:1, but longer prefixes put each module of it elsewhere",
        ),
    ],
)
def test_a_map_that_cannot_be_met(by_module: Mapping[str, str], problem: str) -> None:
    with pytest.raises(InvalidDeviceMapError, match=problem):
        plan([gpu(0), gpu(1)], by_module=by_module)


def test_a_map_over_a_devices_memory() -> None:
    with pytest.raises(OutOfMemoryError, match=r"122 B \(layers 0 to 5 with .*\) on g/cuda:0, of which 100 B"):
        plan([gpu(0, 100), gpu(1)], by_module={"": "0"})
    with pytest.raises(OutOfMemoryError, match="of which 50 B"):
        plan([gpu(0), gpu(1)], by_module={"": "0"}, max_memory={"0": "50", "1": "1000"})


def test_a_map_that_says_the_same_twice_is_a_map() -> None:
    by_module = {"": "0", "model": "cuda:0", **{f"model.layers.{layer}": "g/cuda:0" for layer in range(LAYERS)}}
    assert layers_of(plan([gpu(0), gpu(1)], by_module=by_module)) == [("g/cuda:0", 0, 6)]


def test_no_strategy_and_no_map_cuts_where_none_may() -> None:
    model = outline()
    model = replace(model, sizes=replace(model.sizes, cuts=(True, False, True, False, False, True)))
    for asked in DEVICE_MAPS[:4]:
        assert {first for _, first, _ in layers_of(plan([gpu(0), gpu(1), gpu(2)], model, device_map=asked))} <= {
            0,
            2,
            5,
        }
    with pytest.raises(InvalidRequestError, match="num_stages=4, but this model's layers can be cut into 3 stages"):
        plan([gpu(index) for index in range(4)], model, num_stages=4)
    ends = {"model.norm": "1", "lm_head": "1"}
    by_module = {"": "0", **{f"model.layers.{layer}": "1" for layer in (3, 4, 5)}} | ends
    with pytest.raises(InvalidDeviceMapError, match=r"cuts between model.layers.2 and model.layers.3, which must"):
        plan([gpu(0), gpu(1)], model, by_module=by_module)
    by_module["model.layers.2"] = "1"
    assert layers_of(plan([gpu(0), gpu(1)], model, by_module=by_module)) == [("g/cuda:0", 0, 2), ("g/cuda:1", 2, 6)]


def test_max_memory_does_not_renumber_the_devices_of_a_map() -> None:
    with pytest.raises(InvalidDeviceMapError, match="g/cuda:0, which max_memory leaves out"):
        plan([gpu(0), gpu(1)], by_module={"": "0"}, max_memory={"1": "1000"})
    assert used(plan([gpu(0), gpu(1)], by_module={"": "1"}, max_memory={"1": "1000"})) == ["g/cuda:1"]


def test_num_stages_beside_a_map() -> None:
    assert len(plan([gpu(0), gpu(1)], by_module={"": "0"}, num_stages=1).stages) == 1
    with pytest.raises(InvalidDeviceMapError, match="num_stages=2, but device_map makes 1"):
        plan([gpu(0), gpu(1)], by_module={"": "0"}, num_stages=2)


# ---- what a plan says ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 8),
    devices=st.integers(1, 8),
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    device_map=st.sampled_from(["auto", "sequential", "balanced_low_0"]),
)
def test_every_module_is_named_exactly_once(
    layers: int, devices: int, family: str, tied: bool, device_map: str
) -> None:
    model = outline(layers, family=family, tied=tied)
    message = plan([gpu(index, 102) for index in range(devices)] + [gpu(99)], model, device_map=device_map).to_message()
    named = [module for stage in message.stages for module in stage.modules]
    assert sorted(named) == sorted(name for name, _ in model.modules)
    ends = [(stage.first_layer, stage.last_layer) for stage in message.stages]
    assert [index for first, last in ends for index in range(first, last + 1)] == list(range(layers))
    for stage in message.stages:
        inner = {
            f"{FAMILIES[family].base}.{FAMILIES[family].layers}.{index}"
            for index in range(stage.first_layer, stage.last_layer + 1)
        }
        assert inner <= set(stage.modules)
        assert stage.resident_bytes <= stage.capacity_bytes


def test_the_message() -> None:
    message = plan([gpu(0), gpu(1)], outline(tied=True)).to_message()
    assert (message.model, message.commit, message.quantization, message.dtype) == (
        "org/model",
        "c0ffee",
        "none",
        "bfloat16",
    )
    first, last = message.stages
    assert (first.index, first.node, first.device, first.first_layer, first.last_layer) == (0, "g", "cuda:0", 0, 2)
    assert (first.resident_bytes, first.fetch_bytes, first.capacity_bytes) == (61, 60, 1000)
    # The last stage holds the embedding again, for the head that is tied to it.
    assert (last.resident_bytes, last.fetch_bytes) == (62, 60)
    assert (first.kv_bytes_per_token, last.kv_bytes_per_token) == (1 + 2 + 3, 4 + 5 + 6)
    assert message.total_resident_bytes == 123
    assert message.total_fetch_bytes == 120


def test_named_devices_are_as_good_as_ray_ones() -> None:
    assert used(plan(parse_devices("1x1KiB,1x1KiB"))) == ["node-0/cuda:0", "node-1/cuda:0"]
