"""Sessions on a ring of stages: many at once, continued, rolled back, bounded; their tokens those of one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from shardlift.proto.v1 import errors, inference_pb2
from shardlift.proto.v1.status import from_rpc_error
from shardlift.worker.spec import SessionLimits
from shardlift.worker.stage import ResidentStage
from shardlift.worker.tensors import to_message
from tests.support import checkpoints, ring
from tests.support.quantization import nf4
from tests.support.session import Session

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A checkpoint, and what transformers makes of it in one process; one family has sliding windows (of 16)."""
    folder = checkpoints.tiny(
        request.param, tmp_path_factory.mktemp(request.param), dtype="bfloat16", max_position_embeddings=100_000
    )
    return folder, AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4())


@pytest.fixture(scope="module")
def stages(case: tuple[Path, PreTrainedModel]) -> list[ResidentStage]:
    return ring.load(case[0], (1, 3), quantization=nf4().to_dict(), dtype="bfloat16")


@pytest.fixture
async def pipeline(stages: list[ResidentStage]) -> AsyncIterator[ring.Ring]:
    async with ring.serve(stages) as serving:
        yield serving
        await serving.idle()


@pytest.fixture
def whole(case: tuple[Path, PreTrainedModel]) -> PreTrainedModel:
    return case[1]


async def failure(awaitable: Any) -> Exception:
    """What a call ends with, or an action of a session is refused with."""
    with pytest.raises((grpc.aio.AioRpcError, errors.ShardliftError)) as caught:
        await awaitable
    error = caught.value
    return from_rpc_error(error, "the ring") if isinstance(error, grpc.RpcError) else error


# -- one session ------------------------------------------------------------------------------------------------------


async def test_turns_go_on_from_what_is_cached(pipeline: ring.Ring, whole: PreTrainedModel) -> None:
    session = Session(pipeline)
    cache = DynamicCache(config=whole.config)
    text = IDS
    for turn in range(4):
        expected = whole.generate(text, max_new_tokens=6, past_key_values=cache, do_sample=False)
        new = text if turn == 0 else text[:, session.length :]
        tokens = await session.generate(new, max_new_tokens=6)
        assert torch.equal(tokens, expected[:, text.shape[1] :]), turn
        assert session.length == expected.shape[1] - 1
        # The last token, which is not cached, and the user's next words.
        text = torch.cat([expected, torch.full((1, 5), 20 + turn)], dim=1)
    await session.close()


async def test_sampled_turns_and_penalties_see_the_whole_text(pipeline: ring.Ring, whole: PreTrainedModel) -> None:
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3}
    session = Session(pipeline)
    cache = DynamicCache(config=whole.config)
    torch.manual_seed(3)
    first = whole.generate(IDS, max_new_tokens=5, past_key_values=cache, **sampling)
    assert torch.equal(await session.generate(IDS, max_new_tokens=5, seed=3, **sampling), first[:, IDS.shape[1] :])
    text = torch.cat([first, IDS[:, :3]], dim=1)
    torch.manual_seed(4)
    second = whole.generate(text, max_new_tokens=5, past_key_values=cache, **sampling)
    tokens = await session.generate(text[:, session.length :], max_new_tokens=5, seed=4, **sampling)
    assert torch.equal(tokens, second[:, text.shape[1] :])
    await session.close()


async def test_a_padded_batch_goes_on(pipeline: ring.Ring, whole: PreTrainedModel) -> None:
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = DynamicCache(config=whole.config)
    session = Session(pipeline)
    first = whole.generate(ids, attention_mask=mask, max_new_tokens=4, past_key_values=cache, do_sample=False)
    assert torch.equal(await session.generate(ids, mask, max_new_tokens=4), first[:, 9:])
    text = torch.cat([first, torch.full((2, 3), 30)], dim=1)
    mask = torch.cat([mask, torch.ones(2, text.shape[1] - 9, dtype=torch.long)], dim=1)
    second = whole.generate(text, attention_mask=mask, max_new_tokens=4, past_key_values=cache, do_sample=False)
    tokens = await session.generate(text[:, session.length :], mask, max_new_tokens=4)
    assert torch.equal(tokens, second[:, text.shape[1] :])
    await session.close()


@pytest.mark.parametrize("chunks", [(12, 7, 5, 1, 1, 3), (1, 1, 1, 25, 1)])
async def test_chunks_give_what_one_pass_gives(
    pipeline: ring.Ring, whole: PreTrainedModel, chunks: tuple[int, ...]
) -> None:
    """As far as one process does: torch's attention kernel rounds a chunk otherwise than a whole prompt, there too."""
    text = torch.randint(3, 250, (1, sum(chunks)), generator=torch.Generator().manual_seed(7))
    one, several = Session(pipeline), Session(pipeline)
    logits = await one.forward(text)
    parts = [await several.forward(part) for part in text.split(chunks, dim=1)]
    cache = DynamicCache(config=whole.config)
    with torch.inference_mode():
        assert torch.equal(logits, whole(text).logits)
        expected = [whole(part, past_key_values=cache).logits for part in text.split(chunks, dim=1)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts, expected, strict=True))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=0.05, atol=0.2)
    assert several.length == one.length == text.shape[1]
    await one.close()
    await several.close()


async def test_chunks_equal_one_pass_to_the_bit_where_kernels_round_alike(case: tuple[Path, PreTrainedModel]) -> None:
    """With plain attention, whose matrix products give a row the same bits however many rows there are."""
    stages = ring.load(case[0], (2,), quantization=nf4().to_dict(), dtype="bfloat16", attn_implementation="eager")
    text = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(8))
    async with ring.serve(stages) as pipeline:
        one, several = Session(pipeline), Session(pipeline)
        parts = [await several.forward(part) for part in text.split((12, 7, 5, 2, 2, 12), dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), await one.forward(text))
        await one.close()
        await several.close()


async def test_rolled_back_it_is_as_if_it_had_not_been(pipeline: ring.Ring, whole: PreTrainedModel) -> None:
    """Also where a window has moved on meanwhile, and what stays has to be computed anew."""
    text = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(2))
    session = Session(pipeline)
    cache = DynamicCache(config=whole.config)
    window = getattr(whole.config, "sliding_window", None)
    for keep, end in ((0, 10), (10, 14), (8, 40), (25, 60), (3, 20), (20, 22)):
        past = cache.get_seq_length()
        with torch.inference_mode():
            if keep < past and window and past >= window:
                cache = DynamicCache(config=whole.config)
                whole(text[:, :keep], past_key_values=cache)
            elif keep < past:
                cache.crop(keep - past)
            expected = whole(text[:, keep:end], past_key_values=cache).logits
        assert torch.equal(await session.forward(text[:, keep:end], keep=keep), expected), (keep, end)
        assert session.length == end
    wrong = await failure(session.forward(text[:, :1], keep=23))
    assert isinstance(wrong, errors.InvalidRequestError)
    assert "23" in str(wrong)
    await session.close()


async def test_a_turn_that_is_refused_after_a_rollback_leaves_the_session(
    pipeline: ring.Ring, whole: PreTrainedModel
) -> None:
    """Also where what stays would have to be computed anew for it."""
    text = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(2))
    session = Session(pipeline)
    await session.forward(text)
    cache = DynamicCache(config=whole.config)
    with torch.inference_mode():
        whole(text[:, :8] if getattr(whole.config, "sliding_window", None) else text, past_key_values=cache)
        if cache.get_seq_length() > 8:
            cache.crop(8 - text.shape[1])
        expected = whole(text[:, 25:30], past_key_values=cache).logits
    unknown = torch.tensor([[9999]])
    for refused in (
        session.forward(unknown, keep=25),
        session.generate(unknown, keep=25, max_new_tokens=2),
        session.generate(text[:, :1], keep=25, max_new_tokens=2, do_sample=True, temperature=0.0),
    ):
        assert isinstance(await failure(refused), errors.InvalidRequestError)
    # Nor does a rollback alone compute anything: several, and rows, count together.
    await session.act(keep=30)
    await session.act(keep=20, rows=[0, 0])
    assert (session.length, session.rows) == (20, 2)
    await session.act(keep=8, rows=[1])
    assert torch.equal(await session.forward(text[:, 25:30]), expected)
    await session.close()


async def test_rows_are_reordered_repeated_and_dropped(pipeline: ring.Ring) -> None:
    text = torch.randint(3, 250, (3, 8), generator=torch.Generator().manual_seed(5))
    session = Session(pipeline)
    await session.forward(text)
    rows = [2, 0, 0, 1]
    more = torch.randint(3, 250, (4, 2), generator=torch.Generator().manual_seed(6))
    ours = await session.forward(more, rows=rows)
    straight = Session(pipeline)
    await straight.forward(text[rows])
    assert torch.equal(ours, await straight.forward(more))
    assert (session.length, session.rows) == (10, 4)
    # Twice without a pass between them, and back as well.
    await session.act(rows=[3, 2, 1, 0])
    last = await session.forward(more[:2], rows=[1, 1], keep=8)
    again = Session(pipeline)
    await again.forward(text[rows][[1, 1]])
    assert torch.equal(last, await again.forward(more[:2]))
    wrong = await failure(session.forward(more, rows=[0, 5]))
    assert isinstance(wrong, errors.InvalidRequestError)
    for open_one in (straight, again, session):
        await open_one.close()


async def test_an_interrupted_generation_is_gone_on_with(pipeline: ring.Ring) -> None:
    for fields in ({}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}, {"use_cache": False}):
        request = inference_pb2.GenerateRequest(input_ids=to_message(IDS), seed=5)
        request.generation.update({"max_new_tokens": 9} | fields)
        tokens, _ = await pipeline.generate(IDS, seed=5, max_new_tokens=9, **fields)
        for had in (1, 4, 8, 9):
            request.generated.CopyFrom(to_message(tokens[:, :had].contiguous()))
            rest: list[list[int]] = []
            async for response in pipeline.stub.Generate(request, metadata=pipeline.metadata):
                if response.HasField("step"):
                    rest.append(list(response.step.token_ids))
            assert torch.equal(torch.tensor(rest, dtype=torch.long).reshape(-1, len(tokens)).T, tokens[:, had:]), had


async def test_it_is_gone_on_with_where_batches_round_otherwise(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages, batches=False) as pipeline:
        tokens, _ = await pipeline.generate(IDS, max_new_tokens=9)
        request = inference_pb2.GenerateRequest(input_ids=to_message(IDS))
        request.generation.update({"max_new_tokens": 9})
        request.generated.CopyFrom(to_message(tokens[:, :5].contiguous()))
        seen: list[int] = []
        first = pipeline.servers[0].pipeline
        compute = first._compute_step
        first._compute_step = lambda work: (seen.append(work.step.input.input.shape[1]), compute(work))[1]  # type: ignore[method-assign]
        rest = [
            list(response.step.token_ids)
            async for response in pipeline.stub.Generate(request, metadata=pipeline.metadata)
            if response.HasField("step")
        ]
        assert torch.equal(torch.tensor(rest).T, tokens[:, 5:])
        # As a whole from stage to stage, and in each by itself.
        assert seen == [12, 5, 1, 1, 1]


# -- many sessions ----------------------------------------------------------------------------------------------------


async def test_batches_of_sessions_give_what_each_gives_alone(pipeline: ring.Ring, whole: PreTrainedModel) -> None:
    """Sixteen, of unlike lengths, rows and padding, some sampled: to the bit, where kernels don't care for shapes."""
    assert all(stage.can_batch for stage in pipeline.stages)
    generator = torch.Generator().manual_seed(0)
    work = []
    for index in range(16):
        rows, length = 1 + index % 3, 3 + 5 * (index % 7)
        ids = torch.randint(3, 250, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : index % 3] = 0
        fields = {"do_sample": True, "temperature": 0.7} if index % 4 == 3 else {}
        work.append((ids, mask, {**fields, "seed": index}))
    results = await asyncio.gather(
        *(pipeline.generate(ids, mask, max_new_tokens=24, **fields) for ids, mask, fields in work)
    )
    for (ids, mask, fields), (tokens, _) in zip(work, results, strict=True):
        seed = fields.pop("seed")
        torch.manual_seed(seed)
        expected = whole.generate(ids, attention_mask=mask, max_new_tokens=24, **(fields or {"do_sample": False}))
        assert torch.equal(tokens, expected[:, ids.shape[1] :])
    batches = [server.pipeline.compute.batches for server in pipeline.servers]
    assert all(sum(count for size, count in sizes.items() if size > 1) > 0 for sizes in batches), batches


async def test_sessions_take_turns_with_a_long_prompt(pipeline: ring.Ring) -> None:
    """A stage computes running sessions' steps between two layers of somebody's prompt."""
    middle = pipeline.servers[1].pipeline
    long = torch.randint(3, 250, (4, 1000), generator=torch.Generator().manual_seed(1))
    batches: list[int] = []

    def note(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] == 1000:
            time.sleep(0.1)  # for the running session's next step to come round
            batches.append(sum(middle.compute.batches.values()))

    layers = middle.stage.model.model.layers
    hooks = [layers[1].register_forward_pre_hook(note), layers[2].register_forward_pre_hook(note)]
    try:
        (expected, _) = await pipeline.generate(IDS, max_new_tokens=300)
        await pipeline.idle()
        running = asyncio.create_task(pipeline.generate(IDS, max_new_tokens=300))
        while not middle.sessions:
            await asyncio.sleep(0.01)
        await pipeline.generate(long, max_new_tokens=1)
        assert not running.done()
        assert torch.equal((await running)[0], expected)
    finally:
        for hook in hooks:
            hook.remove()
    # The hooks of a layer run before those of the stage's own: between the two, one step was computed.
    before, after = batches
    assert after > before


async def test_more_sessions_than_may_run_wait_and_then_are_refused(stages: list[ResidentStage]) -> None:
    limits = SessionLimits(max_sessions=2, max_waiting=1)
    async with ring.serve(stages, limits=limits) as pipeline:
        (expected, _) = await pipeline.generate(IDS, max_new_tokens=5)
        held = [Session(pipeline), Session(pipeline)]
        for session in held:
            await session.forward(IDS)
        waiting = asyncio.create_task(pipeline.generate(IDS, max_new_tokens=5))
        while not pipeline.servers[-1].sessions.admission.waiting:
            await asyncio.sleep(0.01)
        refused = await failure(Session(pipeline).forward(IDS))
        assert isinstance(refused, errors.ModelBusyError)
        assert "2 sessions" in str(refused)
        assert "1 waiting" in str(refused)
        assert not waiting.done()
        await held[0].close()
        assert torch.equal((await waiting)[0], expected)
        # One that gives up waiting leaves no hole.
        await Session(pipeline).forward(IDS)
        given_up = asyncio.create_task(pipeline.generate(IDS, max_new_tokens=5))
        await asyncio.sleep(0.1)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        await held[1].close()
        assert torch.equal((await pipeline.generate(IDS, max_new_tokens=5))[0], expected)


async def test_memory_for_keys_and_values_is_refused_to_the_newcomer_alone(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages, limits=SessionLimits(kv_tokens=100)) as pipeline:
        (expected, _) = await pipeline.generate(IDS, max_new_tokens=60)
        running = asyncio.create_task(pipeline.generate(IDS, max_new_tokens=60))
        await asyncio.sleep(0.05)
        refused = await failure(pipeline.generate(IDS, max_new_tokens=30))
        assert isinstance(refused, errors.OutOfMemoryError)
        assert "42 tokens" in str(refused)
        assert "72 of 100" in str(refused)
        never = await failure(pipeline.generate(IDS, max_new_tokens=500))
        assert isinstance(never, errors.OutOfMemoryError)
        assert "reserve_tokens" in str(never)
        assert torch.equal((await running)[0], expected)
        # A session that grows is refused the pass, and those who ran before it go on.
        small = Session(pipeline)
        await small.forward(torch.full((2, 20), 7))
        other = Session(pipeline)
        await other.forward(torch.full((1, 50), 7))
        assert isinstance(await failure(small.forward(torch.full((2, 10), 7))), errors.OutOfMemoryError)
        await small.forward(torch.full((2, 5), 7))
        await small.close()
        await other.forward(torch.full((1, 30), 7))
        await other.close()
        await pipeline.idle()


async def test_a_session_that_nothing_comes_for_expires(pipeline: ring.Ring) -> None:
    session = Session(pipeline)
    await session.act(idle_timeout_s=0.3, forward=inference_pb2.ForwardRequest(input_ids=to_message(IDS)))
    assert pipeline.kv_bytes[0] > 0
    ended = await failure(session.call.read())
    assert isinstance(ended, errors.SessionExpiredError)
    assert "0.3 s" in str(ended)
    await pipeline.idle()


async def test_a_cancelled_prompt_is_given_up_between_two_layers(stages: list[ResidentStage]) -> None:
    """The first layer of a stage takes long; the second is not begun."""
    async with ring.serve(stages) as pipeline:
        seen: list[str] = []
        first = pipeline.servers[1].pipeline.stage.model.model.layers[1]
        second = pipeline.servers[1].pipeline.stage.model.model.layers[2]
        hooks = [
            first.register_forward_pre_hook(lambda *_: (seen.append("first"), time.sleep(0.5))[0]),
            second.register_forward_hook(lambda *_: seen.append("second")),
        ]
        try:
            session = Session(pipeline)
            pending = asyncio.create_task(session.forward(IDS))
            while not seen:
                await asyncio.sleep(0.01)
            session.call.cancel()
            await asyncio.gather(pending, return_exceptions=True)
            await asyncio.sleep(0.7)
            assert seen == ["first"]
        finally:
            for hook in hooks:
                hook.remove()
        await pipeline.idle()


async def test_whatever_a_computation_raises_reaches_who_waits(pipeline: ring.Ring) -> None:
    """StopIteration as well, which no future takes."""
    for error in (StopIteration(), KeyError("x"), ValueError("y")):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises((RuntimeError, KeyError, ValueError)):
            await asyncio.wait_for(pipeline.servers[0].pipeline.run("some", fail), 10)
    assert await pipeline.servers[0].pipeline.run("some", lambda: 7) == 7
