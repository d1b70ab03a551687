"""Seconds and memory of a plan at scale: a DeepSeek-V3-like checkpoint of headers alone, over thousands of devices.

    python -m bench.plan [--devices 8 64 512 1024 4096] [--quantize-experts]

Writes 61 layers of 256 experts, some 45,000 tensors and 671B parameters, as sparse files: true headers, no data. From
opening them to the plan for NF4, for each number of unequal devices (8 a node). Prints one JSON object: seconds to the
outline (headers, names, sizes), seconds to lay it over the devices, peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import struct
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import Device
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, outline_model
from shardlift.proto.v1.errors import OutOfMemoryError

from .common import surroundings

SHARD_BYTES = 9_000_000_000
MEMORIES = (24 << 30, 40 << 30, 48 << 30, 80 << 30)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def write_headers(folder: Path) -> tuple[int, int]:
    """The checkpoint, without data. Gives its tensors and its parameters."""
    config = DeepseekV3Config(num_mtp_layers=0)
    config.architectures, config.dtype = ["DeepseekV3ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        base, _, merged = name.rpartition(".experts.")
        if merged == "gate_up_proj":
            count, doubled, hidden = tensor.shape
            for expert in range(count):
                shapes[f"{base}.experts.{expert}.gate_proj.weight"] = (doubled // 2, hidden)
                shapes[f"{base}.experts.{expert}.up_proj.weight"] = (doubled // 2, hidden)
        elif merged == "down_proj":
            shapes |= {
                f"{base}.experts.{each}.down_proj.weight": tuple(tensor.shape[1:]) for each in range(len(tensor))
            }
        else:
            shapes[name] = tuple(tensor.shape)
    weight_map: dict[str, str] = {}
    shard: dict[str, tuple[int, ...]] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        header, position = {}, 0
        for name, shape in shard.items():
            end = position + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            weight_map[name], position = file, end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + position)
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = shape
        if sum(2 * math.prod(each) for each in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(shapes), sum(math.prod(shape) for shape in shapes.values())


def unequal(count: int) -> list[Device]:
    """`count` devices of several sizes, eight a node."""
    sizes = random.Random(0)
    return [
        Device(
            node=f"node-{index // 8:04d}",
            name=f"cuda:{index % 8}",
            kind="cuda",
            capacity_bytes=sizes.choice(MEMORIES),
        )
        for index in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--quantize-experts", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardlift-bench-") as name:
        tensors, parameters = write_headers(Path(name))
        started = time.perf_counter()
        outlined = outline_model(
            CheckpointRequest(path=name),
            None,
            ModelOptions(quantization=NF4, quantize_experts=options.quantize_experts),
        )
        outline_s = time.perf_counter() - started
        curve = {}
        for count in options.devices:
            devices = unequal(count)
            started = time.perf_counter()
            try:
                stages = len(outlined.spread(PlanOptions(), devices).plan.stages)
            except OutOfMemoryError:
                stages = 0
            seconds = time.perf_counter() - started
            curve[count] = {
                "nodes": -(-count // 8),
                "stages": stages,  # 0: it doesn't fit, and the refusal is what took the time
                "spread_s": round(seconds, 4),
                "headers_to_plan_s": round(outline_s + seconds, 3),
            }
    print(
        json.dumps(
            {
                **surroundings("torch", "transformers", "numpy"),
                "tensors": tensors,
                "parameters": parameters,
                "quantize_experts": options.quantize_experts,
                "outline_s": round(outline_s, 3),
                "devices": curve,
                "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
