"""A Ray cluster of several nodes on this machine, with a gateway on it, all on loopback addresses."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv
from ray.util.placement_group import placement_group_table

from shardlift.cluster import cards

NODES = 3
# Ray takes 127.0.0.1 for "my address on the network"; these are taken as they are.
ADDRESSES = [f"127.0.0.{2 + index}" for index in range(NODES)]


@dataclass(frozen=True)
class RunningCluster:
    """`gateway`: "host:port"; `ray_address`: of the GCS; `hf_home`: where a worker would keep Hub files; `parts`: the
    nodes' cache of quantized parts."""

    gateway: str
    ray_address: str
    hf_home: Path
    session_dir: Path
    parts: Path

    def stage_workers(self) -> list[str]:
        """Names of the stage workers that Ray knows of."""
        named = ray.util.list_named_actors(all_namespaces=True)
        return sorted(actor["name"] for actor in named if actor["name"].startswith("stage:"))

    def pid(self, actor: str) -> int:
        """The process of a named actor."""
        handle = ray.get_actor(actor, namespace="shardlift")
        return int(ray.get(handle.__ray_call__.remote(lambda self: os.getpid())))

    def placement_groups(self) -> list[str]:
        """Names of the placement groups that exist."""
        return sorted(group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED")

    def cards(self) -> list[str]:
        """The loads whose cards Ray keeps."""
        # Where another Cluster of this process has ended, it took along what asks Ray for them.
        internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)
        return list(cards.find())

    def memory_set_aside(self) -> float:
        """Bytes of the nodes' memory that something has reserved."""
        return ray.cluster_resources()["memory"] - ray.available_resources().get("memory", 0)

    def assert_nothing_left(self) -> None:
        eventually(lambda: not self.stage_workers(), "stage workers are left")
        eventually(lambda: not self.placement_groups(), "placement groups are left")
        eventually(lambda: self.memory_set_aside() == 0, "memory stays reserved")


def eventually(holds: Callable[[], bool], otherwise: str, timeout_s: float = 20.0) -> None:
    """Returns once `holds()`; fails with `otherwise` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@contextlib.contextmanager
def running_cluster(home: Path, *, node_memory_bytes: int = 3 << 30) -> Iterator[RunningCluster]:
    """Three nodes of one CPU each, and a gateway on a free port of 127.0.0.1."""
    hf_home = home / "hf"
    # What the nodes' processes inherit: they must find a Hub only where a request names one.
    inherited = {
        "HF_HOME": str(hf_home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # What processes count arrives at their node's endpoint so often.
        "RAY_metrics_report_interval_ms": "1000",
        "SHARDLIFT_CACHE": str(home / "parts"),
    }
    with _environment(inherited):
        cluster = Cluster(
            initialize_head=True,
            head_node_args=_node(0, node_memory_bytes) | {"include_dashboard": False},
        )
        try:
            for index in range(1, NODES):
                cluster.add_node(**_node(index, node_memory_bytes))
            ray.init(address=cluster.address, namespace="shardlift", log_to_driver=False, logging_level="ERROR")
            cluster.wait_for_nodes()
            gateway = start_gateway(cluster.address, home)
            session_dir = Path(ray._private.worker._global_node.get_session_dir_path())
            yield RunningCluster(gateway, cluster.address, hf_home, session_dir, home / "parts")
        finally:
            ray.shutdown()
            cluster.shutdown()


def _node(index: int, memory_bytes: int) -> dict[str, Any]:
    return {
        "node_ip_address": ADDRESSES[index],
        "num_cpus": 1,
        "num_gpus": 0,
        "memory": memory_bytes,
        "object_store_memory": 80 << 20,
    }


def start_gateway(ray_address: str, home: Path, *arguments: str) -> str:
    """Starts the gateway of the cluster at `ray_address`; its address."""
    command = [sys.executable, "-m", "shardlift.cluster.up", "--ray-address", ray_address, "--port", "0", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"SHARDLIFT_HOME": str(home)},
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return str(json.loads(answers[-1])["address"])


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
