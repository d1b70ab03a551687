"""Who is let in, and what nobody else feels of it: memory, places, and the room for computing a prompt."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LogitsProcessor, LogitsProcessorList

from shardlift.client.handle import RemoteModel
from shardlift.cluster.plan import room_bytes
from shardlift.proto.v1 import errors, inference_pb2
from shardlift.worker.admission import Admission, Room
from shardlift.worker.service import EPOCH_HEADER, SESSION_HEADER
from shardlift.worker.spec import SessionLimits
from shardlift.worker.stage import ResidentStage
from shardlift.worker.tensors import to_message
from shardlift.worker.workspace import Dimensions, Pass, least_bytes, pass_bytes
from tests.support import checkpoints, ring
from tests.support.ring_gateway import Served, serving
from tests.support.session import Session
from tests.test_sessions import failure

IDS = torch.arange(5, 17)[None]
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)


@pytest.fixture(scope="module")
def stages(folder: Path) -> list[ResidentStage]:
    return ring.load(folder, (2,))


# -- places -----------------------------------------------------------------------------------------------------------


async def test_idle_sessions_let_others_run_and_keep_what_they_hold(stages: list[ResidentStage]) -> None:
    limits = SessionLimits(max_sessions=2, max_waiting=1, idle_place_s=0.05, kv_tokens=200)
    async with ring.serve(stages, limits=limits) as pipeline:
        admission = pipeline.servers[-1].sessions.admission
        idle = [Session(pipeline) for _ in range(3)]
        logits = [await session.forward(IDS) for session in idle]
        assert len(admission.running) <= 2
        (tokens, _) = await pipeline.generate(IDS, max_new_tokens=5)
        assert tokens.shape == (1, 5)
        # All three are there still: with their tokens, and their keys and values.
        assert admission.reserved_tokens == 3 * IDS.shape[1]
        again = [await session.forward(IDS[:, :3], keep=0) for session in idle]
        assert all(torch.allclose(one, other[:, :3], atol=1e-5) for one, other in zip(again, logits, strict=True))
        for session in idle:
            await session.close()
        await pipeline.idle()
        assert not admission.running


async def test_whoever_waits_is_told_in_time(stages: list[ResidentStage]) -> None:
    limits = SessionLimits(max_sessions=1, wait_s=0.2, idle_place_s=60)
    async with ring.serve(stages, limits=limits) as pipeline:
        held = Session(pipeline)
        await held.forward(IDS)
        told = await failure(pipeline.generate(IDS, max_new_tokens=5))
        assert isinstance(told, errors.ModelBusyError)
        assert "0.2 s" in str(told)
        await held.close()
        await pipeline.generate(IDS, max_new_tokens=5)


async def test_a_session_that_finds_no_place_again_loses_nothing(stages: list[ResidentStage]) -> None:
    limits = SessionLimits(max_sessions=1, wait_s=0.2, idle_place_s=0.05)
    async with ring.serve(stages, limits=limits) as pipeline:
        first, second = Session(pipeline), Session(pipeline)
        straight = Session(pipeline)
        expected = await straight.forward(IDS)
        await straight.close()
        await first.forward(IDS[:, :8])
        await second.forward(IDS)
        busy = asyncio.create_task(second.generate(IDS[:, :1], max_new_tokens=2000))
        while not pipeline.servers[-1].sessions.numbers.generated_tokens:
            await asyncio.sleep(0.01)
        with pytest.raises(errors.ModelBusyError):
            await first.forward(IDS[:, 8:])
        second.call.cancel()
        await asyncio.gather(busy, return_exceptions=True)
        assert torch.allclose(await first.forward(IDS[:, 8:]), expected[:, 8:], atol=1e-5)
        await first.close()


async def test_places_are_handed_on() -> None:
    admission = Admission(max_sessions=1, max_waiting=2, kv_tokens=10)
    first = await admission.enter()
    first.reserve(6)
    waiting = [asyncio.create_task(admission.enter()) for _ in range(2)]
    await asyncio.sleep(0)
    first.rest()
    second = await waiting[0]
    with pytest.raises(errors.OutOfMemoryError, match="1 other sessions hold 6 of 10") as later:
        second.reserve(5)
    with pytest.raises(errors.OutOfMemoryError, match="room for 10") as never:
        second.reserve(11)
    assert (later.value.retry_s, never.value.retry_s) == (5.0, None)
    back = asyncio.create_task(first.resume())
    await asyncio.sleep(0)
    second.leave()
    third = await waiting[1]
    assert not back.done()
    back.cancel()
    await asyncio.gather(back, return_exceptions=True)
    third.leave()
    await first.resume()
    assert (len(admission.running), admission.waiting, admission.reserved_tokens) == (1, 0, 6)
    first.leave()
    first.leave()
    assert (len(admission.running), admission.reserved_tokens) == (0, 0)


# -- keys and values --------------------------------------------------------------------------------------------------


async def test_a_refused_action_leaves_a_session_as_it_was(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages, limits=SessionLimits(kv_tokens=100)) as pipeline:
        straight = Session(pipeline)
        expected = await straight.forward(IDS)
        await straight.close()
        session, other = Session(pipeline), Session(pipeline)
        await session.forward(IDS[:, :9])
        await other.forward(torch.full((1, 80), 7))
        for wrong, kind in (
            (session.forward(torch.full((1, 30), 7)), errors.OutOfMemoryError),
            (session.generate(IDS, max_new_tokens=50), errors.OutOfMemoryError),
            (
                session.generate(IDS[:, :1], temperature=0.0, do_sample=True, max_new_tokens=2),
                errors.InvalidRequestError,
            ),
            (session.generate(torch.tensor([[9999]]), max_new_tokens=2), errors.InvalidRequestError),
            (session.forward(torch.tensor([[9999]])), errors.InvalidRequestError),
            (session.forward(IDS, keep=4, rows=[0, 1]), errors.InvalidRequestError),
            (session.act(keep=50), errors.InvalidRequestError),
            (session.act(reserve_tokens=60), errors.OutOfMemoryError),
        ):
            with pytest.raises(kind):
                await wrong
        assert torch.allclose(await session.forward(IDS[:, 9:]), expected[:, 9:], atol=1e-5)
        assert session.length == IDS.shape[1]
        await other.close()
        await session.close()
        await pipeline.idle()


async def test_what_is_reserved_nobody_takes(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages, limits=SessionLimits(kv_tokens=100)) as pipeline:
        admission = pipeline.servers[-1].sessions.admission
        session, other = Session(pipeline), Session(pipeline)
        await session.forward(IDS, reserve_tokens=60)
        assert admission.reserved_tokens == 60
        with pytest.raises(errors.OutOfMemoryError, match="60 of 100"):
            await other.forward(torch.full((1, 41), 7))
        await session.generate(IDS[:, :1], max_new_tokens=20)
        await session.forward(IDS[:, :2], keep=0)
        assert admission.reserved_tokens == 60  # though it holds but two
        await session.act(reserve_tokens=0)
        assert admission.reserved_tokens == 2
        await other.forward(torch.full((1, 98), 7))
        await other.close()
        await session.close()


class Newcomers(LogitsProcessor):
    """At each step somebody else asks for all the room that is left."""

    def __init__(self, model: RemoteModel, tokens: int) -> None:
        self._model = model
        self._tokens = tokens
        self.refused = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with self._model.session() as session, pytest.raises(errors.OutOfMemoryError):
            session.forward([[7] * self._tokens])
        self.refused += 1
        return scores


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder, (2,)) as running:
        yield running


@pytest.fixture
def limited(served: Served) -> Iterator[RemoteModel]:
    admission = served.ring.servers[-1].sessions.admission
    admission.kv_tokens = 100
    yield served.model
    admission.kv_tokens, admission.rooms = 0, ()


@pytest.mark.parametrize("arguments", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_generation_by_steps_is_let_in_as_a_whole(limited: RemoteModel, arguments: dict[str, Any]) -> None:
    newcomers = Newcomers(limited, 100 - 2 * (4 + 20) + 1)
    ids = limited.generate(
        IDS[:, :4],
        max_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
        seed=1,
        logits_processor=LogitsProcessorList([newcomers]),
        **arguments,
    )
    assert ids.shape[1] == 24
    assert newcomers.refused == 20
    with pytest.raises(errors.OutOfMemoryError, match="room for 100"):
        limited.generate(IDS[:, :4], max_new_tokens=50, **{"num_beams": 2})


def test_a_conversation_outlives_a_turn_that_has_no_room(limited: RemoteModel) -> None:
    with limited.session() as session, limited.session(reserve_tokens=70) as other:
        first = session.generate(IDS, max_new_tokens=5, eos_token_id=None, do_sample=False)
        other.forward(IDS)
        for tokens, temperature, kind in ((60, 1.0, errors.OutOfMemoryError), (2, 0.0, errors.InvalidRequestError)):
            with pytest.raises(kind):
                session.generate([[9]], max_new_tokens=tokens, do_sample=True, temperature=temperature)
            assert not session.closed
            assert torch.equal(session.tokens, first)
        again = session.generate([[9]], max_new_tokens=3, eos_token_id=None, do_sample=False)
    expected = limited.generate(torch.cat([first, torch.tensor([[9]])], dim=1), max_new_tokens=3, do_sample=False)
    assert torch.equal(again, expected)
    with pytest.raises(errors.InvalidRequestError, match="reserve_tokens=-1"):
        limited.session(reserve_tokens=-1)


def test_a_cache_outlives_a_pass_that_has_no_room(limited: RemoteModel) -> None:
    output = limited(IDS, use_cache=True)
    with output.past_key_values as cache:
        with pytest.raises(errors.OutOfMemoryError):
            limited([[7] * 95], past_key_values=cache)
        assert not cache.closed
        more = limited([[7, 8]], past_key_values=cache).logits
    expected = limited(torch.cat([IDS, torch.tensor([[7, 8]])], dim=1)).logits[:, -2:]
    assert torch.allclose(more, expected, atol=1e-5)


# -- computing a prompt -----------------------------------------------------------------------------------------------


async def test_a_prompt_that_takes_too_much_is_refused_before_it_is_computed(stages: list[ResidentStage]) -> None:
    """With padding a mask is made of every pair of positions: 2,400 x 2,400 of them, six bytes each."""
    limits = SessionLimits(rooms=((24 * MIB, 0), (24 * MIB, 0)))
    long = torch.randint(3, 250, (1, 2400), generator=torch.Generator().manual_seed(3))
    padded = torch.ones_like(long)
    padded[0, :3] = 0
    async with ring.serve(stages, limits=limits) as pipeline:
        (expected, _) = await pipeline.generate(IDS, max_new_tokens=150)
        running = asyncio.create_task(pipeline.generate(IDS, max_new_tokens=150))
        computed = [0]
        hook = (
            pipeline.stages[0]
            .model.model.layers[0]
            .register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].shape[1]))
        )
        refused = await failure(pipeline.generate(long, padded, max_new_tokens=2))
        assert isinstance(refused, errors.OutOfMemoryError)
        assert "1 x 2,400 tokens at once, some of them padding" in str(refused)
        assert f"{24 * MIB:,}" in str(refused)
        session = Session(pipeline)
        with pytest.raises(errors.OutOfMemoryError, match="in chunks of 1,200"):
            await session.generate(long, padded, max_new_tokens=2)
        assert max(computed) <= IDS.shape[1]  # of the one that runs
        # In chunks of what it says; without padding; and what is just below.
        (chunked, _) = await pipeline.generate(long, padded, max_new_tokens=2, prefill_chunk_size=1200)
        assert max(computed) == 1200
        await pipeline.generate(long, max_new_tokens=2)
        await session.generate(long[:, :1800], padded[:, :1800], max_new_tokens=2)
        await session.close()
        hook.remove()
        assert torch.equal((await running)[0], expected)
        await pipeline.idle()
    async with ring.serve(stages) as pipeline:
        (whole, _) = await pipeline.generate(long, padded, max_new_tokens=2)
        assert torch.equal(chunked, whole)


async def test_what_was_let_in_is_computed_again_after_a_loss(stages: list[ResidentStage]) -> None:
    """Though others have taken the room meanwhile; what comes after it is asked about as ever."""
    limits = SessionLimits(rooms=((24 * MIB, 0), (24 * MIB, 0)))
    forward = inference_pb2.ForwardRequest(
        input_ids=to_message(torch.full((1, 9000), 7)), without_logits=True, use_cache=True
    )
    async with ring.serve(stages, limits=limits) as pipeline:
        for epoch, kind in (("0", errors.OutOfMemoryError), ("1", None)):
            session = Session(pipeline)
            metadata = [*pipeline.metadata, (SESSION_HEADER, f"s{epoch}"), (EPOCH_HEADER, epoch)]
            session.call = pipeline.stub.Session(metadata=metadata)
            if kind is not None:
                with pytest.raises(kind):
                    await session.act(forward=forward)
            else:
                await session.act(forward=forward)
                with pytest.raises(errors.OutOfMemoryError):
                    await session.forward(torch.full((1, 900), 7))
            await session.close()


async def test_passes_are_refused_likewise_and_go_through_in_pieces(stages: list[ResidentStage]) -> None:
    """Logits of all positions weigh more than anything else, and on the last stage alone."""
    limits = SessionLimits(rooms=((16 * MIB, 0), (20 * MIB, 0)))
    long = torch.randint(3, 250, (2, 6000), generator=torch.Generator().manual_seed(4))
    async with ring.serve(stages, limits=limits) as pipeline:
        call = ring.ForwardSession(pipeline)
        refused = await failure(call(long, use_cache=False))
        assert isinstance(refused, errors.OutOfMemoryError)
        session = Session(pipeline)
        with pytest.raises(errors.OutOfMemoryError) as told:
            await session.forward(long)
        found = re.search(r"in chunks of ([\d,]+)", str(told.value))
        assert found
        for part in long.split(int(found[1].replace(",", "")), dim=1):
            await session.forward(part)
        assert session.length == 6000
        await session.close()


async def test_what_others_have_reserved_is_not_there_for_a_prompt(stages: list[ResidentStage]) -> None:
    limits = SessionLimits(kv_tokens=1000, rooms=((40 * MIB, MIB // 32),) * 2)
    long = torch.full((1, 2000), 7)
    mask = torch.ones_like(long)
    mask[0, 0] = 0
    forward = inference_pb2.ForwardRequest(
        input_ids=to_message(long), attention_mask=to_message(mask), logits_to_keep=1
    )
    async with ring.serve(stages, limits=limits) as pipeline:

        async def once() -> None:
            call = pipeline.stub.Forward(metadata=pipeline.metadata)
            await call.write(forward)
            await call.done_writing()
            async for _ in call:
                pass

        await once()
        other = Session(pipeline)
        await other.act(reserve_tokens=600)
        assert isinstance(await failure(once()), errors.OutOfMemoryError)
        await other.close()
        await pipeline.idle()
        await once()


def test_estimates() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=1000
    )
    plain = Dimensions.of(config, 4)
    assert (plain.hidden, plain.inner, plain.window, plain.is_eager) == (64, 256, 0, False)
    asked = Pass(rows=2, new=1000)
    widest, logits = pass_bytes(plain, asked)
    assert widest == 2 * 1000 * (4 * 64 + 2 * 256) * 4
    assert logits == 2 * 1000 * 8
    pairs = 2 * 1000 * 1000
    # Nothing is made of pairs but where there is padding, a past, or a window.
    assert pass_bytes(plain, replace(asked, is_padded=True))[0] == widest + 6 * pairs
    assert pass_bytes(plain, replace(asked, past=500))[0] == widest + 9 * pairs
    assert pass_bytes(replace(plain, window=800), asked)[0] == widest + 6 * pairs
    assert pass_bytes(replace(plain, window=1200), asked)[0] == widest
    assert pass_bytes(replace(plain, is_eager=True), asked)[0] == widest + (6 + 4 * 12) * pairs
    assert pass_bytes(replace(plain, is_flash=True), replace(asked, is_padded=True))[0] == widest
    assert pass_bytes(plain, Pass(rows=8, new=1, past=10_000))[0] < least_bytes(plain)


def test_rooms() -> None:
    node = {"capacity_bytes": 1000, "resident_bytes": 100, "workspace_bytes": 50, "kv_budget_bytes": 250}
    assert room_bytes(is_gpu=True, **node) == 300
    assert room_bytes(is_gpu=False, **node) == 300 + 150
    assert room_bytes(is_gpu=False, **node | {"resident_bytes": 990}) == 300
    admission = Admission(
        max_sessions=1,
        max_waiting=0,
        kv_tokens=10,
        rooms=[Room(bytes_=100, token_bytes=3), Room(bytes_=50, token_bytes=0)],
    )
    assert admission.free_bytes == [100, 50]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
async def test_learned_positions_have_an_end_and_rotary_ones_have_none(family: str, tmp_path: Path) -> None:
    """As in transformers, which raises IndexError for the one, and goes on for the other."""
    folder = checkpoints.tiny(family, tmp_path, max_position_embeddings=32)
    async with ring.serve(ring.load(folder, (2,))) as pipeline:
        (tokens, _) = await pipeline.generate(torch.full((1, 20), 7), max_new_tokens=5)
        assert tokens.shape == (1, 5)
        long = pipeline.generate(torch.full((1, 40), 7), max_new_tokens=2)
        if family == "llama":
            assert (await long)[0].shape == (1, 2)
        else:
            refused = await failure(long)
            assert isinstance(refused, errors.InvalidRequestError)
            assert "positions" in str(refused)
