"""Whether a packed checkpoint can stay packed wherever it may be placed: asks transformers on each node. Asks Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import one_line
from ..worker import own_gpus
from ..worker.own_form import Answer, Question, fingerprint, needs_gpu, why_not_anywhere
from . import nodes as cluster_nodes
from .inventory import probe_gpus
from .planning import CanKeep

_ANSWER_TIMEOUT_S = 240.0  # a process that imports torch, and may fetch kernels


def can_keep(options: registry_pb2.LoadOptions) -> CanKeep:
    """What to plan with. options: whose device map may send stages to processors."""
    named = options.device_map_by_module.values()
    on_processors = options.device_map == "cpu" or any(device.rpartition("/")[2].startswith("cpu") for device in named)
    return lambda question: _why_not(question, on_processors=on_processors)


def _why_not(question: Question, *, on_processors: bool) -> str:
    if why := why_not_anywhere(question.config):
        return why
    nodes = _nodes()
    if needs_gpu(question.config) and (on_processors or not any(node["Resources"].get("GPU") for node in nodes)):
        return "that needs GPUs which compute in FP8"
    try:
        planned = fingerprint(question)
    except Exception as error:  # of any kind, as packages raise them
        return f"on the head: {one_line(error, 300)}"
    names = cluster_nodes.names(nodes)
    answers = {names[node_id]: found for node_id, found in _ask(question, nodes, on_processors=on_processors).items()}
    return verdict(planned, answers)


def verdict(planned: str, answers: Mapping[str, tuple[str, Answer]]) -> str:
    """Why not, by each node's device ("cpu" or "cuda") and answer; "" where all agree with what the head has `planned`.

    Of a cluster with GPUs, processors hold no stages unless a device map says so.
    """
    kinds = {device for device, _ in answers.values()}
    for node, (device, answer) in sorted(answers.items()):
        if device != "cuda" and "cuda" in kinds:
            continue
        if answer.why_not:
            return f"on {node}: {answer.why_not}"
        if answer.tensors != planned:
            return f"on {node} transformers' quantizer has other tensors than on the head: are its packages the same?"
    return "" if answers else "no node could be asked"


def _nodes() -> list[dict[str, Any]]:
    """Those that a plan may use."""
    left_out = {*cluster_nodes.drained_ids(), *cluster_nodes.ending_ids()}
    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in left_out
        and (node["Resources"].get("GPU") or node["Resources"].get("CPU"))
    ]


def _ask(
    question: Question, nodes: Sequence[Mapping[str, Any]], *, on_processors: bool
) -> dict[str, tuple[str, Answer]]:
    """Node's id -> device, answer. A node that doesn't answer can't keep it."""
    ask = ray.remote(num_cpus=0, max_retries=0)(ask_here)
    ids = [str(node["NodeID"]) for node in nodes]
    asked = {
        node_id: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            question, on_processors
        )
        for node_id in ids
    }
    found = {}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S + 30)
    for node_id, reference in asked.items():
        try:
            found[node_id] = ray.get(reference, timeout=0)
        except RayError as error:
            found[node_id] = ("cuda", Answer(why_not=f"the node didn't answer: {one_line(error, 200)}"))
    return found


def ask_here(question: Question, on_processors: bool) -> tuple[str, Answer]:
    """In a process of its own, which sees the node's GPUs (Ray hides them from this task), and frees them."""
    device = "cuda" if not on_processors and probe_gpus() else "cpu"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if (visible := own_gpus.visible()) is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # as for a stage on a processor
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "shardlift.worker.own_form"],
            input=json.dumps(asdict(replace(question, device=device))),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_ANSWER_TIMEOUT_S,
            check=True,
        )
        return device, Answer(**json.loads(ended.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        return device, Answer(why_not=f"asking transformers failed: {one_line(error, 200)}")
