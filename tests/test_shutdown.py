"""SIGTERM: no more work is taken, what runs has its grace, and the rest is told to ask elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

import shardlift
from shardlift.proto.v1 import errors
from tests.support.checkpoints import tiny
from tests.support.cluster import eventually

IDS = torch.arange(5, 17)[None]
GRACE_S = 10.0


@dataclass
class Local:
    """A gateway on a Ray of its own, and its process."""

    address: str
    process: subprocess.Popen[str]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    command = [sys.executable, "-m", "shardlift.cluster.up", "--port", "0", "--grace", str(GRACE_S), "--num-cpus", "2"]
    with (tmp_path / "up.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"SHARDLIFT_HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
        )
    assert process.stdout is not None
    with process.stdout:
        try:
            answer = json.loads(next(line for line in process.stdout if line.startswith("{")))
            assert answer["grace_s"] == GRACE_S
            yield Local(answer["address"], process)
        finally:
            process.terminate()
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_a_stop_has_grace_and_then_ends_the_rest(local: Local, tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "llama", max_position_embeddings=100_000)
    with shardlift.connect(local.address, retry_s=0) as client:
        model = client.load(str(folder), name="stopped", num_stages=2)
        expected = model.generate(IDS, max_new_tokens=12, do_sample=False)[0, IDS.shape[1] :].tolist()
        children = psutil.Process(local.process.pid).children(recursive=True)
        failures: list[BaseException] = []
        ends_s: list[float] = []
        began = threading.Event()

        def endless() -> None:
            try:
                for step in model.stream(IDS, max_new_tokens=50_000, do_sample=False):
                    began.set()
                    assert step.token_ids
            except errors.ShardliftError as error:
                failures.append(error)
            ends_s.append(time.monotonic())

        thread = threading.Thread(target=endless)
        thread.start()
        assert began.wait(60)
        tokens: list[int] = []
        with model.stream(IDS, max_new_tokens=12, do_sample=False) as running:
            for step in running:
                tokens += step.token_ids
                if len(tokens) == 5:
                    local.process.send_signal(signal.SIGTERM)
                    stopped_s = time.monotonic()
        # What could end within the grace has ended as if nothing were.
        assert tokens == expected
        eventually(lambda: not is_open(local.address), "new work is taken still", 30)
        thread.join(60)
        assert [type(failure) for failure in failures] == [errors.GatewayUnavailableError]
        assert "the gateway is stopping" in str(failures[0])
        assert ends_s[0] - stopped_s >= GRACE_S
    assert local.process.wait(90) == 0
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def is_open(address: str) -> bool:
    try:
        with shardlift.connect(address, timeout_s=1, retry_s=0) as client:
            client.infos()
    except errors.GatewayUnavailableError:
        return False
    return True
