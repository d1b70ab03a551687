"""How many threads a stage computes with: what the operator says, what Ray says, and what there is."""

from __future__ import annotations

import pytest

from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.worker.cores import settle_threads, usable_cores


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
def test_threads_without_work_sleep_unless_somebody_says_otherwise(said: dict[str, str]) -> None:
    environment = dict(said)
    settle_threads(environment)
    assert environment == (said or {"OMP_WAIT_POLICY": "passive"})


@pytest.mark.parametrize("given", ["0", "-1", "two", "4097", "²", " 2"])
def test_what_is_no_number_of_threads(given: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"SHARDLIFT_THREADS.*from 1 to 4096"):
        settle_threads({"SHARDLIFT_THREADS": given})
