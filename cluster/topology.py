"""The devices that Ray's nodes offer now. Asks Ray, and each GPU node's driver for its memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..worker import own_gpus
from . import gpu_ids
from . import nodes as cluster_nodes
from .devices import Device
from .gpu_speeds import bandwidth

# Of a GPU's free memory: the rest is for the CUDA context, workspace and fragmentation.
_USABLE_PART = 0.9
_PROBE_TIMEOUT_S = 60.0
_SETTLE_S = 2.0


def discover(held: Collection[str] = (), without: Collection[str] = ()) -> list[Device]:
    """Devices with what is free on them, ordered by node. A GPU that is held already has room for nothing, but stays
    in the list: names and indices don't depend on who came first, and a cluster with GPUs is never taken for one
    without.

    held: paths of devices ("node/cuda:0") that are known to be. Where Ray says that more are, the free ones of that
    node are held for a moment to learn which they are. without: ids of nodes that are not to be asked.

    A node with GPUs offers those; where Ray was told of GPUs that aren't there, each is a slot for a CPU worker.
    A node without offers its memory to CPU workers, unless it was told to take no work (0 CPUs).
    Of a drained node, GPUs have room for nothing, and its memory is not offered; one that Ray is ending is left out.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    drained, ending = cluster_nodes.drained_ids(), cluster_nodes.ending_ids()
    nodes = sorted((node for node in alive if node["NodeID"] not in {*without, *ending}), key=cluster_nodes.order)
    available = available_resources_per_node()
    node_names = cluster_nodes.names(alive)
    gpus = _probe_gpus([node["NodeID"] for node in nodes if node["Resources"].get("GPU")])
    devices: list[Device] = []
    names: dict[str, str] = {}
    for node in nodes:
        node_id, total, host = node["NodeID"], node["Resources"], str(node["NodeManagerHostname"])
        free = available.get(node_id, {})
        name = node_names[node_id]
        is_drained = node_id in drained
        memory = int(free.get("memory", 0))
        if total.get("GPU"):
            ids = set() if is_drained else _free_ids(name, node_id, int(total["GPU"]), int(free.get("GPU", 0)), held)
            found = gpus[node_id]
            on_node = _gpu_devices(name, node_id, int(total["GPU"]), ids, [gpu.free_bytes for gpu in found], memory)
            devices += [replace(device, host=host) for device in on_node]
            names |= {f"{name}/cuda:{index}": gpu.name for index, gpu in enumerate(found)}
        elif total.get("CPU") and memory and not is_drained:
            devices.append(Device(node=name, node_id=node_id, host=host, name="cpu", kind="cpu", capacity_bytes=memory))
    return with_speeds(devices, names)


def with_speeds(devices: Sequence[Device], names: Mapping[str, str]) -> list[Device]:
    """`devices` with the speed of each GPU, where that of all is known by its name (`names`: path -> name)."""
    known = {device.path: bandwidth(names.get(device.path, "")) for device in devices if device.kind == "cuda"}
    if not all(known.values()):
        return list(devices)
    return [replace(device, speed=known.get(device.path) or device.speed) for device in devices]


def _free_ids(node: str, node_id: str, total: int, free: int, held: Collection[str]) -> set[int]:
    """The GPUs that Ray may give, as the node counts them."""
    known = {int(path.rpartition(":")[2]) for path in held if path.startswith((f"{node}/cuda:", f"{node}/cpu:"))}
    # Ray's count lags behind what was just given back.
    deadline = time.monotonic() + _SETTLE_S
    while free < total - len(known) and time.monotonic() < deadline:
        time.sleep(0.1)
        free = int(available_resources_per_node().get(node_id, {}).get("GPU", 0))
    if free in (0, total):
        return set(range(free))
    if free == total - len(known):
        return set(range(total)) - known
    return gpu_ids.free_ids(node_id, total)


def _gpu_devices(
    node: str, node_id: str, total: int, free: set[int], free_bytes: list[int], memory: int
) -> list[Device]:
    kind = "cuda" if free_bytes else "cpu"
    share = memory // max(len(free), 1)
    capacities = [int(size * _USABLE_PART) for size in free_bytes] if free_bytes else [share] * total
    return [
        Device(
            node=node,
            node_id=node_id,
            name=f"{kind}:{index}",
            kind=kind,
            capacity_bytes=capacity if index in free else 0,
            slots=1,
        )
        for index, capacity in enumerate(capacities[:total])
    ]


@dataclass(frozen=True, slots=True)
class _Gpu:
    free_bytes: int
    name: str


def _probe_gpus(node_ids: list[str]) -> dict[str, list[_Gpu]]:
    """Each CUDA GPU of each node; an empty list where there is none."""
    probe = ray.remote(num_cpus=0, max_retries=0)(_own_gpus)
    references = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in node_ids
    ]
    return dict(zip(node_ids, ray.get(references, timeout=_PROBE_TIMEOUT_S), strict=True))


def _own_gpus() -> list[_Gpu]:
    # The driver's own tool: asking torch would open a context on every GPU, and Ray hides GPUs from this task.
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",", 3)] for line in output.splitlines() if line.count(",") >= 3]
    rows = own_gpus.among_visible(rows)
    # "[N/A]" where the driver doesn't tell: such a GPU can't be planned for.
    return [_Gpu(free_bytes=int(free) << 20 if free.isdecimal() else 0, name=name) for _, _, free, name in rows]
