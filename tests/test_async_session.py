"""Sessions for asyncio, on real stages behind a gateway, against transformers on the whole sequence each time."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

import shardlift
from shardlift.client.async_handle import AsyncRemoteModel
from shardlift.proto.v1 import errors
from tests.support import checkpoints
from tests.support.ring_gateway import NAME, Served, serving

FIRST = torch.tensor([[0, 0, 5, 9, 7], [11, 12, 13, 14, 15]])
MASK = (FIRST != 0).long()
SECOND = torch.tensor([[21, 22, 23], [24, 25, 26]])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Served]]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=10_000)
    with serving(folder, (1, 3)) as served:
        yield AutoModelForCausalLM.from_pretrained(folder), served


@pytest_asyncio.fixture
async def model(pair: tuple[Any, Served]) -> AsyncIterator[AsyncRemoteModel]:
    async with await shardlift.connect_async(pair[1].address) as client:
        yield await client.model(NAME)


@pytest.fixture
def local(pair: tuple[Any, Served]) -> Any:
    return pair[0]


async def freed(pair: tuple[Any, Served]) -> None:
    """Every stage is, within a few seconds."""
    await asyncio.to_thread(pair[1].call, pair[1].ring.idle)


def whole(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([MASK, torch.ones(2, ids.shape[1] - MASK.shape[1], dtype=torch.long)], dim=1)


async def test_turns(model: AsyncRemoteModel, local: Any, pair: tuple[Any, Served]) -> None:
    async with model.session(idle_timeout_s=30) as session:
        first = await session.generate(FIRST, attention_mask=MASK, max_new_tokens=5, do_sample=False)
        assert torch.equal(first, local.generate(FIRST, attention_mask=MASK, max_new_tokens=5, do_sample=False))
        assert torch.equal(session.tokens, first)
        assert session.length == 10
        ids = torch.cat([first, SECOND], dim=1)
        expected = local.generate(ids, attention_mask=whole(ids), max_new_tokens=4, do_sample=False)
        assert torch.equal(await session.generate(SECOND, max_new_tokens=4, do_sample=False), expected)
        await session.rollback(10)
        steps = [step.token_ids async for step in session.stream(SECOND, max_new_tokens=4, do_sample=False)]
        assert torch.tensor(steps).T.tolist() == expected[:, 13:].tolist()
        alone = await session.generate(None, {"max_new_tokens": 2, "do_sample": False})
        assert torch.equal(
            alone, local.generate(expected, attention_mask=whole(expected), max_new_tokens=2, do_sample=False)
        )
        with pytest.raises(errors.InvalidRequestError, match="can't go back to 99"):
            await session.rollback(99)
        assert repr(session) == f"AsyncRemoteSession('{NAME}': 2 rows of 19 tokens)"
    assert session.closed
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        await session.generate(SECOND)
    await freed(pair)


async def test_sampling_and_output(model: AsyncRemoteModel, local: Any) -> None:
    arguments = {"max_new_tokens": 4, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(3)
    expected = local.generate(FIRST, attention_mask=MASK, **arguments)
    after = torch.get_rng_state()
    async with model.session() as session:
        torch.manual_seed(3)
        actual: Any = await session.generate(FIRST, attention_mask=MASK, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == 4
    assert torch.equal(torch.get_rng_state(), after)


async def test_passes(model: AsyncRemoteModel, local: Any) -> None:
    async with model.session() as session:
        logits = [await session.forward(SECOND[:, :2]), await session(SECOND[:, 2:])]
        torch.testing.assert_close(torch.cat(logits, dim=1), local(SECOND).logits, rtol=1e-4, atol=1e-4)
        expected = local.generate(SECOND, max_new_tokens=3, do_sample=False)
        assert torch.equal(await session.generate(max_new_tokens=3, do_sample=False), expected)


async def test_turns_of_several_tasks_take_turns(model: AsyncRemoteModel, local: Any) -> None:
    async with model.session() as session:
        await session.generate(SECOND, max_new_tokens=1, do_sample=False)
        await asyncio.gather(*(session.generate(SECOND, max_new_tokens=2, do_sample=False) for _ in range(4)))
        assert session.length == 4 + 4 * 5
        expected = SECOND
        for count in (1, 2, 2, 2, 2):
            expected = local.generate(expected, max_new_tokens=count, do_sample=False)
            expected = torch.cat([expected, SECOND], dim=1)
        assert torch.equal(session.tokens, expected[:, :-3])


async def test_sessions_at_once(model: AsyncRemoteModel, local: Any) -> None:
    async def talk(number: int) -> torch.Tensor:
        async with model.session() as session:
            await session.generate(SECOND + number, max_new_tokens=3, do_sample=False)
            return await session.generate(FIRST + 1, max_new_tokens=3, do_sample=False)

    for number, tokens in enumerate(await asyncio.gather(*(talk(number) for number in range(5)))):
        first = local.generate(SECOND + number, max_new_tokens=3, do_sample=False)
        ids = torch.cat([first, FIRST + 1], dim=1)
        assert torch.equal(tokens, local.generate(ids, max_new_tokens=3, do_sample=False))


async def test_a_turn_within_a_stream_is_refused(model: AsyncRemoteModel) -> None:
    async with model.session() as session:
        async for _ in session.stream(SECOND, max_new_tokens=3):
            with pytest.raises(errors.InvalidRequestError, match="still being streamed"):
                await session.generate(SECOND)
        assert session.length == 6


@pytest.mark.parametrize("how", ["cancel", "break", "close", "forget"])
async def test_what_ends_a_session(how: str, model: AsyncRemoteModel, pair: tuple[Any, Served]) -> None:
    """The stages are free again, and nobody is told of a failure who has none."""
    session = model.session()
    long: dict[str, Any] = {"max_new_tokens": 5000, "do_sample": False, "eos_token_id": None}
    if how == "break":
        async for _ in session.stream(SECOND, **long):
            break
        gc.collect()
    elif how == "forget":
        await session.generate(SECOND, max_new_tokens=2)
        del session
        gc.collect()
    else:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in session.stream(SECOND, **long):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        if how == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await session.close()
            with pytest.raises(errors.InvalidRequestError, match="closed in the middle"):
                await task
        assert session.closed
    await freed(pair)


async def test_an_idle_one_expires(model: AsyncRemoteModel, pair: tuple[Any, Served]) -> None:
    session = model.session(idle_timeout_s=0.3)
    await session.generate(SECOND, max_new_tokens=2)
    await freed(pair)
    with pytest.raises(errors.SessionExpiredError):
        await session.generate(SECOND, max_new_tokens=2)
    assert session.closed


async def test_what_a_session_refuses(model: AsyncRemoteModel) -> None:
    async with model.session() as session:
        for arguments, message in (
            ({}, "no tokens yet"),
            ({"new_ids": SECOND, "num_beams": 2}, "model.generate"),
            ({"new_ids": SECOND, "adapter": "x"}, "adapter="),
        ):
            with pytest.raises(errors.InvalidRequestError, match=message):
                await session.generate(**arguments)
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="AsyncRemoteSession belongs to an open call"):
                copied(session)
        assert not session.closed
