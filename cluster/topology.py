"""The devices that Ray's nodes offer now. Asks Ray, and each GPU node's driver for its memory."""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .devices import Device

# Of a GPU's free memory: the rest is for the CUDA context, workspace and fragmentation.
_USABLE_PART = 0.9
_PROBE_TIMEOUT_S = 60.0


def discover() -> list[Device]:
    """Devices with what is free on them, ordered by node. A GPU that is held already has room for nothing, but stays
    in the list: names and indices don't depend on who came first, and a cluster with GPUs is never taken for one
    without.

    A node with GPUs offers those; where Ray was told of GPUs that aren't there, each is a slot for a CPU worker.
    A node without offers its memory to CPU workers, unless it was told to take no work (0 CPUs).
    """
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=_order)
    available = available_resources_per_node()
    addresses = Counter(node["NodeManagerAddress"] for node in nodes)
    gpus = _probe_gpus([node["NodeID"] for node in nodes if node["Resources"].get("GPU")])
    devices: list[Device] = []
    for node in nodes:
        node_id, total = node["NodeID"], node["Resources"]
        free = available.get(node_id, {})
        address = node["NodeManagerAddress"]
        # Several raylets on one machine share its address; their ids tell them apart.
        name = address if addresses[address] == 1 else f"{address}-{node_id[:6]}"
        memory = int(free.get("memory", 0))
        if total.get("GPU"):
            devices += _gpu_devices(name, node_id, int(total["GPU"]), int(free.get("GPU", 0)), gpus[node_id], memory)
        elif total.get("CPU") and memory:
            devices.append(Device(node=name, node_id=node_id, name="cpu", kind="cpu", capacity_bytes=memory))
    return devices


def _order(node: dict[str, Any]) -> tuple[list[tuple[int, str]], str]:
    parts = node["NodeManagerAddress"].split(".")
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], node["NodeID"]


def _gpu_devices(node: str, node_id: str, total: int, free: int, free_bytes: list[int], memory: int) -> list[Device]:
    if not free_bytes:
        share = memory // max(free, 1)
        capacities = [0] * (total - free) + [share] * free
        kind = "cpu"
    else:
        # Ray decides which of a node's GPUs a worker gets; the emptiest ones are those that nobody holds.
        emptiest = sorted(range(len(free_bytes)), key=lambda index: (-free_bytes[index], index))[:free]
        capacities = [
            int(size * _USABLE_PART) if index in emptiest else 0 for index, size in enumerate(free_bytes[:total])
        ]
        kind = "cuda"
    return [
        Device(node=node, node_id=node_id, name=f"{kind}:{index}", kind=kind, capacity_bytes=capacity, slots=1)
        for index, capacity in enumerate(capacities)
    ]


def _probe_gpus(node_ids: list[str]) -> dict[str, list[int]]:
    """Free bytes of each CUDA GPU of each node; an empty list where there is none."""
    probe = ray.remote(num_cpus=0, max_retries=0)(_free_gpu_bytes)
    references = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in node_ids
    ]
    return dict(zip(node_ids, ray.get(references, timeout=_PROBE_TIMEOUT_S), strict=True))


def _free_gpu_bytes() -> list[int]:
    # The driver's own tool: asking torch would open a context on every GPU, and Ray hides GPUs from this task.
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in output.split()]
