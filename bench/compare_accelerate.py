"""This plan beside accelerate's, on models and devices where both apply: a table of markdown, on standard output.

Models are made on the meta device, so nothing is loaded. accelerate's map is made as transformers makes it:
`get_balanced_memory`, then, for 4 bits, half a byte a quantized weight and nine tenths of the memory, then
`infer_auto_device_map`. Both are then weighed alike, by the bytes that the tensors really take on a device.

    python -m bench.compare_accelerate
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import CustomDtype, get_balanced_memory
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shardlift.cluster.devices import Device, parse_devices
from shardlift.cluster.layout import Layout, lay_out
from shardlift.cluster.plan import PlanOptions, make_plan
from shardlift.proto.v1.errors import OutOfMemoryError
from shardlift.worker.byte_sizes import format_size
from shardlift.worker.records import TensorRecord

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "1B, tied": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "3B, tied": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
_SHARED = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """quantization: "none", "nf4" or "nf4+double"."""

    model: str
    devices: str
    quantization: str = "none"


CASES = (
    Case(model="1B, tied", devices="4x2GiB"),
    Case(model="3B, tied", devices="2x8GiB"),
    Case(model="3B, tied", devices="4x3GiB"),
    Case(model="8B", devices="2x16GiB"),
    Case(model="8B", devices="4x6GiB"),
    Case(model="8B", devices="8x3GiB"),
    Case(model="8B", devices="1x6GiB,1x8GiB,1x4GiB"),
    Case(model="8B", devices="1x24GiB,2x8GiB"),
    Case(model="70B", devices="2x80GiB"),
    Case(model="70B", devices="8x24GiB"),
    Case(model="70B", devices="1x80GiB,2x24GiB,1x16GiB"),
    Case(model="8B", devices="2x4GiB", quantization="nf4"),
    Case(model="70B", devices="2x24GiB", quantization="nf4"),
    Case(model="70B", devices="4x12GiB", quantization="nf4"),
    Case(model="70B", devices="4x11GiB", quantization="nf4+double"),
    Case(model="70B", devices="1x24GiB,2x12GiB", quantization="nf4+double"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """fullest_bytes: on the device that holds the most. problem: why it would not run as it is, "" where it would.

    cuts: how often a token moves on to another device, from the embedding to the head.
    """

    fullest_bytes: int
    cuts: int
    problem: str = ""


def quantization_config(name: str) -> dict[str, Any] | None:
    return None if name == "none" else {**NF4, "bnb_4bit_use_double_quant": name.endswith("+double")}


def empty_model(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **{**_SHARED, **SHAPES[name]}, dtype="bfloat16")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return model


def layout_of(model: PreTrainedModel, quantization: str) -> Layout:
    """What a checkpoint of this model becomes here."""
    tied = set(model.all_tied_weights_keys)
    records = {
        name: TensorRecord(key=name, file="model", dtype="BF16", shape=tuple(tensor.shape), start=0, end=tensor.nbytes)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    return lay_out(
        model.config.to_dict(),
        records,
        dtype="bfloat16",
        quantization=quantization_config(quantization),
        attn_implementation=None,
    )


def ours(layout: Layout, devices: Sequence[Device]) -> Outcome:
    try:
        plan = make_plan("llama", "", layout.outline, devices, PlanOptions())
    except OutOfMemoryError:
        return Outcome(fullest_bytes=0, cuts=0, problem="refused")
    return Outcome(
        fullest_bytes=max(stage.resident_bytes for stage in plan.stages),
        cuts=len(plan.stages) - 1,
    )


def accelerates(model: PreTrainedModel, layout: Layout, devices: Sequence[Device], quantization: str) -> Outcome:
    types: dict[str, Any] = {}
    if quantization != "none":
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        types = {f"{name}.weight": CustomDtype.INT4 for name in linear if name != "lm_head"}
    whole = model._no_split_modules
    memory = {index: device.capacity_bytes for index, device in enumerate(devices)}
    memory = get_balanced_memory(model, memory, no_split_module_classes=whole, special_dtypes=types)
    if quantization != "none":
        memory = {index: int(size * 0.9) for index, size in memory.items()}
    placed = infer_auto_device_map(
        model, memory, no_split_module_classes=whole, special_dtypes=types, clean_result=False
    )
    return weigh(layout, devices, placed)


def weigh(layout: Layout, devices: Sequence[Device], placed: Mapping[str, int | str]) -> Outcome:
    """What accelerate's map takes on each device; the last norm, some kilobytes, is counted where the head is."""
    sizes = layout.outline.sizes
    order: list[int | str] = []
    held: Counter[int | str] = Counter()
    for name, place in layout.outline.modules:
        # A map names a whole part of the model where all of it is on one device.
        device = next(placed[prefix] for prefix in prefixes(name) if prefix in placed)
        if place.part != "shared":
            order.append(device)
        if place.part == "layer":
            held[device] += sizes.layers[place.layer][0]
    first, last = order[0], order[-1]
    held[first] += sizes.first[0]
    held[last] += sizes.last[0] + (sizes.tied[0] if last != first else 0)
    moves = sum(device != after for device, after in pairwise(order))
    on_gpus = {device: size for device, size in held.items() if isinstance(device, int)}
    left = sum(not isinstance(device, int) for device in order)
    over = max(size - devices[index].capacity_bytes for index, size in on_gpus.items())
    problem = f"no: {format_size(over)} too much" if over > 0 else ""
    if left:
        problem = f"no: {left} of {len(order)} modules left to the disk"
    return Outcome(fullest_bytes=max(on_gpus.values()), cuts=moves, problem=problem)


def prefixes(name: str) -> Iterator[str]:
    """ "a.b", "a", ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def rows() -> Iterator[str]:
    yield "| model | weights | devices | accelerate: fullest | fits | cuts | shardlift: fullest | fits | cuts |"
    yield "|---|---|---|---:|---|---:|---:|---|---:|"
    models = {case.model: empty_model(case.model) for case in CASES}
    layouts = {
        key: layout_of(models[key[0]], key[1])
        for key in dict.fromkeys((case.model, case.quantization) for case in CASES)
    }
    for case in CASES:
        devices = parse_devices(case.devices)
        layout = layouts[case.model, case.quantization]
        cells = [case.model, {"none": "bfloat16"}.get(case.quantization, case.quantization), case.devices]
        for outcome in (
            accelerates(models[case.model], layout, devices, case.quantization),
            ours(layout, devices),
        ):
            cells += [format_size(outcome.fullest_bytes), outcome.problem or "yes", str(outcome.cuts)]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    # It looks for GPUs, and says of each that there is none.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    print(*rows(), sep="\n")
