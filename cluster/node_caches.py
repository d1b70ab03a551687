"""The caches of quantized parts on Ray's nodes. Blocking: each node is asked by a task of its own."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import ModelUnavailableError, one_line
from ..worker.part_cache import PartCache
from ..worker.quantization import describe_quantization
from ..worker.spec import CachedPart

_TIMEOUT_S = 60.0


def list_parts() -> list[registry_pb2.CachedPart]:
    """What all nodes keep. Nodes that share a folder are one: the first of them is named."""
    seen: set[str] = set()
    parts = []
    for node, (folder, found) in _on_every_node(_entries).items():
        if folder in seen:
            continue
        seen.add(folder)
        parts += [
            registry_pb2.CachedPart(
                node=node,
                key=part.key,
                bytes=part.size_bytes,
                used_unix_s=part.used_s,
                about_json=json.dumps(dict(part.about)),
                quantization=describe_quantization(part.about.get("quantization")),
            )
            for part in found
        ]
    return parts


def clear() -> int:
    """Removes what all nodes keep. Gives the bytes freed."""
    return sum(_on_every_node(_clear).values())


def _entries() -> tuple[str, list[CachedPart]]:
    cache = PartCache.from_environment()
    return ("", []) if cache is None else (_identity(cache.folder), cache.entries())


def _clear() -> int:
    cache = PartCache.from_environment()
    return 0 if cache is None else cache.clear()


def _identity(folder: Path) -> str:
    """The same for raylets that share it; containers of one machine have their own."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = socket.gethostname()
    try:
        status = folder.stat()
    except OSError:
        return f"{machine}:{folder}"
    return f"{machine}:{status.st_dev}:{status.st_ino}"


def _on_every_node(function: Any) -> dict[str, Any]:
    """What `function` gives on each living node, by the node's address."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    references = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    try:
        answers = ray.get(references, timeout=_TIMEOUT_S)
    except RayError as error:
        raise ModelUnavailableError(f"not every node could be asked for its cache: {one_line(error, 200)}") from None
    return {node["NodeManagerAddress"]: answer for node, answer in zip(nodes, answers, strict=True)}
