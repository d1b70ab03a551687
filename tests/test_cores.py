"""How many threads a stage computes with: what the operator says, what Ray says, and what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import Device
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.worker.cores import settle_threads, usable_cores
from tests.support import checkpoints


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),  # a process that isn't Ray's: OpenMP's own choice
        ({"OMP_NUM_THREADS": "1"}, str(usable_cores())),
        ({"OMP_NUM_THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "1", "SHARDLIFT_THREADS": "1"}, "1"),
        ({"OMP_NUM_THREADS": "3", "SHARDLIFT_THREADS": "2"}, "2"),
        ({"OMP_NUM_THREADS": "3", "SHARDLIFT_THREADS": ""}, "3"),
    ],
)
def test_threads(environment: dict[str, str], threads: str | None) -> None:
    settle_threads(environment)
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "1000"}, {"OMP_WAIT_POLICY": "active"}])
def test_threads_without_work_sleep_where_others_could_use_their_cores(said: dict[str, str]) -> None:
    environment = dict(said)
    settle_threads(environment)
    assert environment == said
    settle_threads(environment, shares_cores=True)
    assert environment == (said or {"OMP_WAIT_POLICY": "passive"})


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([("a", "one", "cpu"), ("b", "one", "cpu"), ("c", "two", "cpu")], [True, True, False]),
        ([("a", "one", "cpu:0"), ("a", "one", "cpu:1")], [True, True]),
        ([("a", "", "cpu"), ("b", "", "cpu")], [False, False]),
        ([("a", "one", "cuda:0"), ("a", "one", "cuda:1")], [False, False]),
    ],
)
def test_which_stages_share_cores(devices: list[tuple[str, str, str]], expected: list[bool], tmp_path: Path) -> None:
    plan = plan_model(
        CheckpointRequest(path=str(checkpoints.tiny("llama", tmp_path))),
        None,
        ModelOptions(),
        PlanOptions(num_stages=len(devices)),
        [
            Device(node=node, host=host, name=name, kind=name.partition(":")[0], capacity_bytes=1 << 30, slots=1)
            for node, host, name in devices
        ],
    )
    assert [spec.shares_cores for spec in plan.specs("m", "l", "s")] == expected


@pytest.mark.parametrize("given", ["0", "-1", "two", "4097", "²", " 2"])
def test_what_is_no_number_of_threads(given: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"SHARDLIFT_THREADS.*from 1 to 4096"):
        settle_threads({"SHARDLIFT_THREADS": given})
