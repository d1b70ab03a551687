"""Every node of a Ray cluster, examined by an actor of its own; and what lies between them.

A node that hangs gets a verdict, and holds nobody up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...proto.v1 import registry_pb2
from ...proto.v1.errors import one_line
from ...worker import own_gpus
from .. import nodes as cluster_nodes
from ..nodes import Node
from . import verdicts
from .echo import Counter, Measured, measure
from .finding import Finding
from .machine import examine
from .seen import Facts

TIMEOUT_S = 60.0
_CLOCK_TRIES = 3


class Examiner:
    """Runs on the node that it examines, and takes nothing of it that is counted."""

    def __init__(self) -> None:
        self._counter: Counter | None = None

    def examine(self) -> tuple[list[Finding], Facts]:
        return examine(cuda_devices=own_gpus.visible())

    def clock(self) -> float:
        return time.time()

    def count(self) -> tuple[str, str]:
        """Address and secret of a `Counter` here."""
        self._counter = Counter(ray.util.get_node_ip_address())
        return self._counter.address, self._counter.secret

    def measure(self, address: str, secret: str, timeout_s: float) -> Measured:
        return measure(address, secret, timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Patient:
    node: Node
    gpus: int  # as Ray counts them
    examiner: Any
    facts: Facts | None = None


async def diagnose(
    timeout_s: float = 0.0, models: Sequence[registry_pb2.ModelInfo] = ()
) -> AsyncIterator[list[Finding]]:
    """Findings, as they come. timeout_s: for each node's answers; 0 means 60. models: what the registry holds, to tell
    whose memory is whose. Runs on an event loop of a process that is connected to Ray."""
    timeout_s = timeout_s or TIMEOUT_S
    alive = await asyncio.to_thread(cluster_nodes.nodes)
    resources = {node["NodeID"]: node["Resources"] for node in await asyncio.to_thread(ray.nodes)}
    ending = [node for node in alive if node.by_ray]
    if ending:
        # Ray starts nothing there any more.
        yield [_ending(node) for node in ending]
    patients = [
        _Patient(
            node=node,
            gpus=int(resources.get(node.node_id, {}).get("GPU", 0)),
            examiner=_examiner(node.node_id),
        )
        for node in alive
        if not node.by_ray
    ]
    try:
        well: list[_Patient] = []
        for coming in asyncio.as_completed([_examine(patient, timeout_s, models) for patient in patients]):
            findings, patient = await coming
            if patient is not None:
                well.append(patient)
            yield findings
        well.sort(key=lambda patient: [each.node_id for each in alive].index(patient.node.node_id))
        if well:
            yield [verdicts.skew({each.node.name: each.facts.versions for each in well if each.facts is not None})]
        for source, target in _neighbours(well):
            yield [await _link(source, target, timeout_s)]
    finally:
        for patient in patients:
            ray.kill(patient.examiner, no_restart=True)


def _examiner(node_id: str) -> Any:
    actor = ray.remote(Examiner).options(
        num_cpus=0,
        max_restarts=0,
        max_concurrency=4,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    return actor.remote()


def _ending(node: Node) -> Finding:
    return Finding(
        check="node",
        verdict="warn",
        finding="Ray is ending it: nothing can be examined there",
        remedy="wait until it has gone; a node that takes its place is examined then",
        node=node.name,
    )


async def _examine(
    patient: _Patient, timeout_s: float, models: Sequence[registry_pb2.ModelInfo]
) -> tuple[list[Finding], _Patient | None]:
    name = patient.node.name
    try:
        findings, facts = await asyncio.wait_for(_of(patient.examiner.examine.remote()), timeout_s)
        skew_s, uncertainty_s = await asyncio.wait_for(_clock(patient.examiner), timeout_s)
    except (asyncio.TimeoutError, TimeoutError):
        return [verdicts.silent(name, "it did not answer", timeout_s)], None
    except Exception as error:
        return [verdicts.silent(name, f"it could not be examined ({one_line(error, 200)})", timeout_s)], None
    gpus = tuple(replace(gpu, expected_bytes=_given(models, name, f"cuda:{gpu.index}")) for gpu in facts.gpus)
    findings = [
        *findings,
        verdicts.gpu_counts(patient.gpus, len(facts.gpus), facts.torch_gpus),
        *verdicts.strangers(gpus),
        verdicts.clock(skew_s, uncertainty_s),
    ]
    return [replace(finding, node=name) for finding in findings], replace(patient, facts=facts)


def _given(models: Sequence[registry_pb2.ModelInfo], node: str, device: str) -> int:
    """Bytes of a device that the plans of models have given to stages."""
    return sum(
        stage.resident_bytes + stage.workspace_bytes + stage.kv_budget_bytes
        for model in models
        for stage in model.plan.stages
        if (stage.node, stage.device) == (node, device)
    )


async def _of(reference: Any) -> Any:
    return await reference


async def _clock(examiner: Any) -> tuple[float, float]:
    """How far a node's clock is ahead, and how exactly that is known: the quickest of a few questions."""
    tries = []
    for _ in range(_CLOCK_TRIES):
        before_s = time.time()
        there_s = float(await examiner.clock.remote())
        after_s = time.time()
        tries.append(((after_s - before_s) / 2, there_s - (before_s + after_s) / 2))
    uncertainty_s, skew_s = min(tries)
    return skew_s, uncertainty_s


def _neighbours(patients: Sequence[_Patient]) -> list[tuple[_Patient, _Patient]]:
    """Each with the next, and the last with the first: as stages are."""
    if len(patients) < 2:
        return []
    return list(zip(patients, [*patients[1:], patients[0]], strict=True))


async def _link(source: _Patient, target: _Patient, timeout_s: float) -> Finding:
    measured = Measured(problem=f"no answer within {timeout_s:g} s")
    try:
        address, secret = await asyncio.wait_for(_of(target.examiner.count.remote()), timeout_s)
        measuring = _of(source.examiner.measure.remote(address, secret, timeout_s))
        measured = await asyncio.wait_for(measuring, timeout_s)
    except (asyncio.TimeoutError, TimeoutError):
        pass
    except Exception as error:
        measured = Measured(problem=one_line(error, 200))
    return verdicts.link(
        source.node.name, target.node.name, measured.bytes_per_s, measured.round_trip_s, measured.problem
    )
