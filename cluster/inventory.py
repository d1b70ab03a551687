"""The nodes and devices that there are, with what is free on them, for those who look. Asks Ray, and GPU drivers.

Not what a plan may use (`cluster.topology`): nothing is held, and what models hold is told as it lies on the device.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..proto.v1 import registry_pb2
from ..worker import own_gpus
from . import nodes

_PROBE_TIMEOUT_S = 20.0
_PROBE_EVERY_S = 15.0
_HEAD_RESOURCE = "node:__internal_head__"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    name: str
    total_bytes: int
    free_bytes: int


class Inventory:
    """Blocking; for one thread at a time. Drivers are asked now and then, each by a task on its node."""

    def __init__(self) -> None:
        self._gpus: dict[str, list[GpuMemory]] = {}
        self._probed_s = float("-inf")

    def nodes(self) -> list[registry_pb2.NodeView]:
        """Every node that Ray counts, named as in plans; the dead without devices."""
        found = sorted(ray.nodes(), key=lambda node: (not node["Alive"], nodes.order(node)))
        alive = [node for node in found if node["Alive"]]
        self._probe([node["NodeID"] for node in alive if node["Resources"].get("GPU")])
        free = available_resources_per_node()
        names = nodes.names(alive)
        views = []
        for node in found:
            node_id = node["NodeID"]
            view = registry_pb2.NodeView(
                node=names.get(node_id, node["NodeManagerAddress"]),
                alive=node["Alive"],
                is_head=_HEAD_RESOURCE in node["Resources"],
            )
            if node["Alive"]:
                view.devices.extend(self._devices(node, free.get(node_id, {})))
            views.append(view)
        return views

    def _devices(self, node: dict[str, Any], free: dict[str, float]) -> list[registry_pb2.DeviceView]:
        total = int(node["Resources"].get("memory", 0))
        devices = []
        for index, gpu in enumerate(self._gpus.get(node["NodeID"], [])[: int(node["Resources"].get("GPU", 0))]):
            devices.append(
                registry_pb2.DeviceView(
                    device=f"cuda:{index}", total_bytes=gpu.total_bytes, free_bytes=gpu.free_bytes, name=gpu.name
                )
            )
        # Where Ray gives work to a node's processor: it takes stages, if there are no GPUs.
        if total and (node["Resources"].get("CPU") or node["Resources"].get("GPU")):
            free_bytes = min(total, int(free.get("memory", 0)))
            devices.append(registry_pb2.DeviceView(device="cpu", total_bytes=total, free_bytes=free_bytes))
        return devices

    def _probe(self, node_ids: list[str]) -> None:
        if not node_ids or time.monotonic() - self._probed_s < _PROBE_EVERY_S:
            return
        self._probed_s = time.monotonic()
        probe = ray.remote(num_cpus=0, max_retries=0)(probe_gpus)
        asked = {
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(): node_id
            for node_id in node_ids
        }
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_TIMEOUT_S)
        for reference in ready:
            try:
                self._gpus[asked[reference]] = ray.get(reference)
            except RayError:
                self._gpus.pop(asked[reference], None)  # the node has gone


def probe_gpus() -> list[GpuMemory]:
    """The CUDA GPUs of this node, in the raylet's order; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",", 4)] for line in output.splitlines() if line.count(",") >= 4]
    rows = own_gpus.among_visible(rows)
    return [
        GpuMemory(name=name, total_bytes=_mebibytes(total), free_bytes=_mebibytes(free))
        for _, _, total, free, name in rows
    ]


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdecimal() else 0
