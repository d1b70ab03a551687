"""A hundred sessions at once for minutes: opened, cancelled, timed out, with clients and workers killed among them, at
random. Nothing leaks, no token is wrong. $SHARDLIFT_SOAK_RESULT names a file for what came of it, as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

import shardlift
from bench.common import surroundings
from shardlift import connect_async
from shardlift.client.handle import RemoteModel
from tests.support import checkpoints
from tests.support.cluster import RunningCluster, eventually

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("SHARDLIFT_SOAK_S", "150"))
SESSIONS = 100
STAGES = 3
PROMPTS = 12
TOKENS = 24
CLIENTS = 3  # processes that are killed
LOST_WORKERS = 3  # a request may see so many losses without a step between them
KILLED_IDS = [[5, 6, 7]]
KILLED = (
    "import shardlift, sys\n"
    "model = shardlift.connect(sys.argv[1]).model('soaked')\n"
    f"for step in model.stream({KILLED_IDS}, max_new_tokens=20_000, do_sample=False):\n"
    "    print(step.token_ids, flush=True)\n"
)


@pytest.fixture(scope="module")
def model(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteModel]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)
    with shardlift.connect(cluster.gateway) as client:
        yield client.load(str(folder), name="soaked", num_stages=STAGES, max_sessions=40, max_waiting=200)
        client.unload("soaked")
    cluster.assert_nothing_left()


def prompt(index: int) -> torch.Tensor:
    return torch.randint(3, 250, (1, 3 + 2 * index), generator=torch.Generator().manual_seed(index))


def arguments(index: int) -> dict[str, Any]:
    return {"do_sample": True, "top_k": 30, "seed": index} if index % 3 == 0 else {"do_sample": False}


def held(cluster: RunningCluster) -> dict[str, tuple[int, ...]]:
    """Of each process of ours: file descriptors, threads, asyncio tasks; of stages also sessions and bytes."""
    found: dict[str, tuple[int, ...]] = {}
    for role, name in roles(cluster).items():
        actor = ray.get_actor(name, namespace="shardlift")
        tasks = ray.get(actor.__ray_call__.remote(_count_tasks))
        process = psutil.Process(cluster.pid(name))
        stage = ray.get(actor.sessions.remote()) if name != "controller" else (0, 0)
        found[role] = (process.num_fds(), process.num_threads(), tasks, *stage)
    return found


def roles(cluster: RunningCluster) -> dict[str, str]:
    """The actors' names by what they are: a worker that takes another's place has another name."""
    stages = {name: name.rsplit(":", 1)[1].partition("~")[0] for name in cluster.stage_workers()}
    return {f"stage {stage}": name for name, stage in stages.items()} | {"controller": "controller"}


def _count_tasks(self: Any) -> int:
    return sum(len(asyncio.all_tasks(loop)) for loop in _loops())


def _loops() -> list[asyncio.AbstractEventLoop]:
    import gc

    return [each for each in gc.get_objects() if isinstance(each, asyncio.AbstractEventLoop) and each.is_running()]


def resident_bytes(cluster: RunningCluster) -> dict[str, int]:
    return {role: psutil.Process(cluster.pid(name)).memory_info().rss for role, name in roles(cluster).items()}


async def one(model: Any, expected: list[torch.Tensor], chance: random.Random, seen: Counter[str]) -> None:
    """What one user does, at random; whatever is not broken off must come out right."""
    index = chance.randrange(PROMPTS)
    ids, whole = prompt(index), expected[index]
    what = chance.choice(("whole", "whole", "left", "cancelled", "late", "passes"))
    seen[what] += 1
    if what == "whole":
        assert torch.equal(await model.generate(ids, max_new_tokens=TOKENS, **arguments(index)), whole)
    elif what == "left":
        tokens: list[int] = []
        async with model.stream(ids, max_new_tokens=TOKENS, **arguments(index)) as running:
            async for step in running:
                tokens += step.token_ids
                if len(tokens) > chance.randrange(TOKENS):
                    break
        assert tokens == whole[0, ids.shape[1] :][: len(tokens)].tolist()
    elif what == "cancelled":
        task = asyncio.create_task(model.generate(ids, max_new_tokens=TOKENS, **arguments(index)))
        await asyncio.sleep(chance.random())
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    elif what == "late":
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(
                model.generate(ids, max_new_tokens=5_000, do_sample=False), timeout=0.2 + chance.random()
            )
    else:
        output = await model(ids, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        with output.past_key_values as cache:
            again = await model(token, past_key_values=cache, use_cache=True)
            assert again.logits.shape[1] == 1


async def soak(address: str, expected: list[torch.Tensor], seconds: float, seed: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    async def user(number: int, model: Any) -> None:
        chance = random.Random(1000 * seed + number)
        while time.monotonic() < deadline:
            await one(model, expected, chance, seen)

    async with await connect_async(address) as client:
        model = await client.model("soaked")
        await asyncio.gather(*(user(number, model) for number in range(SESSIONS)))
    return seen


class Killer:
    """Kills clients, and now and then a worker, at times that `seed` decides. A context manager; its thread is seen to
    its end."""

    def __init__(self, cluster: RunningCluster, model: RemoteModel, seconds: float, seed: int) -> None:
        self.killed: Counter[str] = Counter()
        # What killed clients had got, as far as it is compared.
        self.streams: list[list[int]] = []
        self._cluster = cluster
        self._model = model
        self._over = threading.Event()
        self._failures: list[BaseException] = []
        chance = random.Random(seed)
        lost = sorted(chance.uniform(0.05, 0.8) * seconds for _ in range(LOST_WORKERS))
        clients = [chance.uniform(6, 14) for _ in range(int(seconds))]
        plan = [(when, "worker", chance.randrange(STAGES)) for when in lost]
        plan += [(sum(clients[: index + 1]), "client", chance.randrange(CLIENTS)) for index in range(len(clients))]
        self._plan = sorted(each for each in plan if each[0] < seconds)
        self._clients = [self._client() for _ in range(CLIENTS)]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Killer:
        for client in self._clients:
            assert client.stdout is not None
            client.stdout.readline()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for index in range(CLIENTS):
            self._kill_client(index)
        assert not self._failures, self._failures

    def _client(self) -> subprocess.Popen[bytes]:
        # Unbuffered: `communicate` would not give what a buffer has read beyond the first line.
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, self._cluster.gateway], stdout=subprocess.PIPE, bufsize=0
        )

    def _run(self) -> None:
        begun_s = time.monotonic()
        try:
            for when, what, which in self._plan:
                if self._over.wait(max(0.0, begun_s + when - time.monotonic())):
                    return
                if what == "client":
                    self._kill_client(which)
                    self._clients[which] = self._client()
                elif self._model.info().state == "ready":
                    os.kill(self._cluster.pid(roles(self._cluster)[f"stage {which}"]), signal.SIGKILL)
                    self.killed["workers"] += 1
        except BaseException as error:
            self._failures.append(error)

    def _kill_client(self, index: int) -> None:
        client = self._clients[index]
        client.send_signal(signal.SIGKILL)
        said, _ = client.communicate(timeout=20)
        lines = said.decode().splitlines(keepends=True)[:TOKENS]
        self.streams.append([json.loads(line)[0] for line in lines if line.endswith("]\n")])
        self.killed["clients"] += 1


@pytest.mark.timeout(SECONDS * 2 + 400)
def test_a_hundred_sessions_for_minutes(model: RemoteModel, cluster: RunningCluster) -> None:
    expected = [model.generate(prompt(index), max_new_tokens=TOKENS, **arguments(index)) for index in range(PROMPTS)]
    streamed = model.generate(KILLED_IDS, max_new_tokens=2 * TOKENS, do_sample=False)[0, 3:].tolist()
    # What is made once, such as threads of gRPC and of torch, is made here.
    asyncio.run(soak(cluster.gateway, expected, SECONDS / 5, seed=0))
    eventually(lambda: all(each[3:] == (0, 0) for each in held(cluster).values()), "keys and values are left", 10)
    before, memory_before = held(cluster), resident_bytes(cluster)

    began_s = time.monotonic()
    with Killer(cluster, model, SECONDS, seed=1) as killer:
        seen = asyncio.run(soak(cluster.gateway, expected, SECONDS, seed=1))
    took_s = time.monotonic() - began_s
    assert min(seen.values()) > 5, seen
    assert killer.killed["workers"], "no worker was killed"
    assert killer.killed["clients"] > CLIENTS, "clients were killed at the end alone"
    for stream in killer.streams:
        # The first line of a client's may have been read before.
        assert stream in (streamed[: len(stream)], streamed[1 : len(stream) + 1])
    assert model.info().recoveries == killer.killed["workers"]

    eventually(lambda: all(each[3:] == (0, 0) for each in held(cluster).values()), "keys and values are left", 10)
    for _ in range(20):
        after = held(cluster)
        grown = {
            name: (before[name], after[name])
            for name in before
            if any(
                now > then + slack
                for then, now, slack in zip(before[name][:3], after[name][:3], (8, 4, 4), strict=True)
            )
        }
        if not grown:
            break
        time.sleep(0.5)
    assert not grown, grown
    memory_after = resident_bytes(cluster)
    for name, size in memory_after.items():
        assert size < memory_before[name] * 1.15 + (48 << 20), (name, memory_before[name], size)
    assert torch.equal(model.generate(prompt(1), max_new_tokens=TOKENS, **arguments(1)), expected[1])
    if path := os.environ.get("SHARDLIFT_SOAK_RESULT"):
        numbers = ("file_descriptors", "threads", "tasks", "sessions", "kv_bytes")
        outcome = {
            **surroundings("torch", "transformers", "ray", "grpcio"),
            "sessions_at_once": SESSIONS,
            "stages": STAGES,
            "seconds": round(took_s, 1),
            "done": dict(seen),
            "killed": dict(killer.killed),
            "recoveries": model.info().recoveries,
            "wrong_tokens": 0,
            "before": {
                role: dict(zip(numbers, each, strict=True), rss_bytes=memory_before[role])
                for role, each in before.items()
            },
            "after": {
                role: dict(zip(numbers, each, strict=True), rss_bytes=memory_after[role])
                for role, each in after.items()
            },
        }
        Path(path).write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
