"""A hundred sessions at once for minutes: opened, cancelled, timed out, killed. Nothing leaks, no token is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
import torch

import shardlift
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
KILLED = (
    "import shardlift, sys\n"
    "model = shardlift.connect(sys.argv[1]).model('soaked')\n"
    "for step in model.stream([[5, 6, 7]], max_new_tokens=20_000):\n"
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
    for name in [*cluster.stage_workers(), "controller"]:
        actor = ray.get_actor(name, namespace="shardlift")
        tasks = ray.get(actor.__ray_call__.remote(_count_tasks))
        process = psutil.Process(cluster.pid(name))
        stage = ray.get(actor.sessions.remote()) if name != "controller" else (0, 0)
        found[name] = (process.num_fds(), process.num_threads(), tasks, *stage)
    return found


def _count_tasks(self: Any) -> int:
    return sum(len(asyncio.all_tasks(loop)) for loop in _loops())


def _loops() -> list[asyncio.AbstractEventLoop]:
    import gc

    return [each for each in gc.get_objects() if isinstance(each, asyncio.AbstractEventLoop) and each.is_running()]


def resident_bytes(cluster: RunningCluster) -> dict[str, int]:
    return {
        name: psutil.Process(cluster.pid(name)).memory_info().rss for name in [*cluster.stage_workers(), "controller"]
    }


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


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_a_hundred_sessions_for_minutes(model: RemoteModel, cluster: RunningCluster) -> None:
    expected = [model.generate(prompt(index), max_new_tokens=TOKENS, **arguments(index)) for index in range(PROMPTS)]
    # What is made once, such as threads of gRPC and of torch, is made here.
    asyncio.run(soak(cluster.gateway, expected, SECONDS / 5, seed=0))
    eventually(lambda: all(each[3:] == (0, 0) for each in held(cluster).values()), "keys and values are left", 10)
    before, memory_before = held(cluster), resident_bytes(cluster)

    killed = [
        subprocess.Popen([sys.executable, "-c", KILLED, cluster.gateway], stdout=subprocess.PIPE) for _ in range(3)
    ]
    for client in killed:
        assert client.stdout is not None
        client.stdout.readline()
    seen = asyncio.run(soak(cluster.gateway, expected, SECONDS, seed=1))
    for client in killed:
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=20)
    assert min(seen.values()) > 5, seen

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
    for name, size in resident_bytes(cluster).items():
        assert size < memory_before[name] * 1.15 + (48 << 20), (name, memory_before[name], size)
    assert torch.equal(model.generate(prompt(1), max_new_tokens=TOKENS, **arguments(1)), expected[1])
