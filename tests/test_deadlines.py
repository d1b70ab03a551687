"""Generations that may not take for ever, on real stages behind a gateway: they end in time, and leave nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardlift
from shardlift.client.deadline import Deadline
from shardlift.client.patience import Patience
from shardlift.proto.v1 import errors
from tests.support import checkpoints
from tests.support.ring_gateway import NAME, Served, serving

IDS = torch.arange(5, 17)[None]
# Minutes of it.
LONG: dict[str, Any] = {"max_new_tokens": 80_000, "do_sample": False}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)
    with serving(folder, (2,)) as served:
        yield served


class Recorder:
    ended = 0

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}], ids=str)
def test_a_generation_ends_in_time(arguments: dict[str, Any], served: Served) -> None:
    streamer = None if "num_beams" in arguments else Recorder()
    with pytest.raises(errors.DeadlineExceededError, match=r"model model was not done in timeout_s=0\.5.*fewer tokens"):
        served.model.generate(IDS, timeout_s=0.5, streamer=streamer, **LONG, **arguments)
    served.call(served.ring.idle)
    assert streamer is None or streamer.ended == 1
    tokens = served.model.generate(IDS, timeout_s=60, max_new_tokens=3, do_sample=False, **arguments)
    assert torch.equal(tokens, served.model.generate(IDS, max_new_tokens=3, do_sample=False, **arguments))


def test_a_stream_ends_in_time(served: Served) -> None:
    running = served.model.stream(IDS, timeout_s=1, **LONG)
    assert next(running).token_ids
    with pytest.raises(errors.DeadlineExceededError, match="timeout_s=1,"):
        list(running)
    served.call(served.ring.idle)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=str)
async def test_so_they_do_with_asyncio(arguments: dict[str, Any], served: Served) -> None:
    async with await shardlift.connect_async(served.address) as client:
        model = await client.model(NAME)
        with pytest.raises(errors.DeadlineExceededError, match=r"timeout_s=0\.5"):
            await model.generate(IDS, timeout_s=0.5, **LONG, **arguments)
        await asyncio.to_thread(served.call, served.ring.idle)


def test_a_sessions_turn_ends_in_time(served: Served) -> None:
    with served.model.session() as session:
        first = session.generate(IDS, timeout_s=60, max_new_tokens=3, do_sample=False)
        with pytest.raises(errors.InvalidRequestError, match="timeout_s is"):
            session.generate(timeout_s=-1, max_new_tokens=1)
        assert session.length == first.shape[1]
        with pytest.raises(errors.DeadlineExceededError, match=r"timeout_s=0\.5"):
            session.generate(timeout_s=0.5, **LONG)
        assert session.closed
    with served.model.session() as session, pytest.raises(errors.DeadlineExceededError, match=r"timeout_s=0\.5"):
        list(session.stream(IDS, timeout_s=0.5, **LONG))
    served.call(served.ring.idle)


async def test_so_it_does_with_asyncio(served: Served) -> None:
    async with await shardlift.connect_async(served.address) as client:
        model = await client.model(NAME)
        async with model.session() as session:
            await session.generate(IDS, timeout_s=60, max_new_tokens=3, do_sample=False)
            with pytest.raises(errors.DeadlineExceededError, match=r"timeout_s=0\.5"):
                await session.generate(timeout_s=0.5, **LONG)
            assert session.closed
        async with model.session() as session:
            with pytest.raises(errors.DeadlineExceededError, match=r"timeout_s=0\.5"):
                async for _ in session.stream(IDS, timeout_s=0.5, **LONG):
                    pass
        await asyncio.to_thread(served.call, served.ring.idle)


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.inf, math.nan, "5", True])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=str)
def test_what_is_no_time(timeout_s: Any, arguments: dict[str, Any], served: Served) -> None:
    with pytest.raises(errors.InvalidRequestError, match="timeout_s is"):
        served.model.generate(IDS, timeout_s=timeout_s, max_new_tokens=1, **arguments)


def test_a_lost_gateway_is_waited_for_no_longer() -> None:
    now = 0.0
    deadline = Deadline(5, "tiny", lambda: now)
    patience = Patience(30, lambda: now)
    assert deadline.left_s == 5
    now = 3.0
    assert patience.within(deadline.left_s).left_s == 2
    assert patience.within(Deadline(None, "tiny").left_s).left_s == 30
    assert not deadline.passed
    now = 6.0
    assert (deadline.left_s, deadline.passed) == (0, True)
    assert patience.within(deadline.left_s).pause_s() is None
