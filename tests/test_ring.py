"""The ring of stages under use and misuse: several sessions at once, bad input, a neighbour that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
import torch

from shardlift.proto.v1 import errors, inference_pb2, stage_pb2, stage_pb2_grpc
from shardlift.proto.v1.status import from_rpc_error
from shardlift.proto.v1.tensor_pb2 import Tensor
from shardlift.worker.stage import ResidentStage
from shardlift.worker.tensors import to_message
from tests.support import checkpoints, ring

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[ResidentStage]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)
    return ring.load(folder, (1, 3))


@pytest.fixture
async def pipeline(stages: list[ResidentStage]) -> AsyncIterator[ring.Ring]:
    async with ring.serve(stages) as serving:
        yield serving


async def failure(call: Any) -> Exception:
    """What a call that must fail raises, as a client would see it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value, "the ring")


async def refusal(pipeline: ring.Ring, **fields: Any) -> str:
    """The line that `generate` refuses `fields` with."""
    request = inference_pb2.GenerateRequest(input_ids=to_message(IDS))
    request.generation.update({"max_new_tokens": 4} | fields)
    error = await failure(pipeline.stub.Generate(request, metadata=pipeline.metadata))
    assert isinstance(error, errors.InvalidRequestError), error
    assert "\n" not in str(error)
    return str(error)


async def test_sessions_at_once_get_what_they_get_alone(pipeline: ring.Ring) -> None:
    prompts = [torch.randint(3, 250, (1 + index % 2, 5 + index)) for index in range(6)]
    alone = [(await pipeline.generate(ids, max_new_tokens=20))[0] for ids in prompts]
    together = await asyncio.gather(*(pipeline.generate(ids, max_new_tokens=20) for ids in prompts))
    assert all(torch.equal(tokens, expected) for (tokens, _), expected in zip(together, alone, strict=True))
    await pipeline.idle()


async def test_cancelled_sessions_leave_the_others_alone_and_nothing_behind(pipeline: ring.Ring) -> None:
    (expected, _) = await pipeline.generate(IDS, max_new_tokens=40)

    async def give_up(after: int) -> None:
        request = inference_pb2.GenerateRequest(input_ids=to_message(IDS))
        request.generation.update({"max_new_tokens": 10_000})
        call = pipeline.stub.Generate(request, metadata=pipeline.metadata)
        async for _ in call:
            after -= 1
            if after < 0:
                break
        call.cancel()

    results = await asyncio.gather(
        pipeline.generate(IDS, max_new_tokens=40), *(give_up(after) for after in (0, 1, 2, 5, 9))
    )
    assert torch.equal(results[0][0], expected)
    await pipeline.idle()


@pytest.mark.parametrize(
    ("fields", "mentioned"),
    [
        ({"num_beams": 3}, "beam"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"warp": 9}, "warp"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "static"),
        ({"streamer": 3}, "streamer"),
        ({"do_sample": True, "temperature": 1e-42}, "temperature"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_generation_refuses_what_it_cannot_do(
    pipeline: ring.Ring, fields: dict[str, Any], mentioned: str
) -> None:
    assert mentioned in await refusal(pipeline, **fields)
    tokens, _ = await pipeline.generate(IDS, max_new_tokens=2)
    assert tokens.shape == (1, 2)
    await pipeline.idle()


@pytest.mark.parametrize(
    ("input_ids", "mentioned"),
    [
        (torch.tensor([[1, 999]]), "999"),
        (torch.tensor([[-3, 1]]), "-3"),
        (torch.tensor([1, 2]), "[batch, length]"),
        (torch.tensor([[1.0, 2.0]]), "integer"),
        (torch.empty(1, 0, dtype=torch.long), "non-empty"),
    ],
)
async def test_ids_that_no_row_is_for_are_refused(pipeline: ring.Ring, input_ids: torch.Tensor, mentioned: str) -> None:
    request = inference_pb2.GenerateRequest(input_ids=to_message(input_ids))
    request.generation.update({"max_new_tokens": 2})
    error = await failure(pipeline.stub.Generate(request, metadata=pipeline.metadata))
    assert isinstance(error, errors.InvalidRequestError)
    assert mentioned in str(error)
    await pipeline.idle()


async def test_tensors_that_lie_are_refused(pipeline: ring.Ring) -> None:
    for lie in (
        Tensor(shape=[1, 2], dtype="int64", data=bytes(8)),
        Tensor(shape=[1, 2], dtype="int64", data=bytes(32)),
        Tensor(shape=[1 << 40, 1 << 40], dtype="int64"),
        Tensor(shape=[1, -1], dtype="int64"),
        Tensor(shape=[1, 1], dtype="qubit"),
    ):
        request = inference_pb2.GenerateRequest(input_ids=lie)
        request.generation.update({"max_new_tokens": 2})
        error = await failure(pipeline.stub.Generate(request, metadata=pipeline.metadata))
        assert isinstance(error, errors.InvalidRequestError)


async def test_forward_keeps_to_its_session(pipeline: ring.Ring) -> None:
    session = pipeline.session()
    whole = await session(IDS, use_cache=False)
    # A pass without a cache leaves none, and one with a cache may follow. (Passes of another length round differently.)
    torch.testing.assert_close(await session(IDS[:, :7]), whole[:, :7])
    torch.testing.assert_close(await session(IDS[:, 7:]), whole[:, 7:])
    with pytest.raises(grpc.aio.AioRpcError, match="12 tokens of 1 rows"):
        await session(IDS.repeat(2, 1))
    await pipeline.idle()
    for mask in (torch.ones(1, 5), torch.ones(2, 12, dtype=torch.long)):
        with pytest.raises(grpc.aio.AioRpcError, match="attention_mask"):
            await pipeline.session()(IDS, mask)


async def test_only_the_models_own_stages_get_in(pipeline: ring.Ring) -> None:
    request = inference_pb2.GenerateRequest(input_ids=to_message(IDS))
    for metadata in ([], [("x-shardlift-stage-secret", "another model's")]):
        error = await failure(pipeline.stub.Generate(request, metadata=metadata))
        assert isinstance(error, errors.AuthenticationError)
    step = stage_pb2.StepRequest(more=b"x")

    async def frames() -> AsyncIterator[stage_pb2.StepRequest]:
        yield step

    stub = stage_pb2_grpc.StageServiceStub(pipeline.channel)
    assert isinstance(await failure(stub.Step(frames())), errors.AuthenticationError)
    # With the secret, a frame out of place ends its own stream and nothing else.
    error = await failure(stub.Step(frames(), metadata=pipeline.metadata))
    assert "belong to no step" in str(error)
    tokens, _ = await pipeline.generate(IDS, max_new_tokens=2)
    assert tokens.shape == (1, 2)


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_lost_stage_fails_every_session_and_frees_the_rest(stages: list[ResidentStage], lost: int) -> None:
    async with ring.serve(stages) as pipeline:
        calls = [asyncio.create_task(pipeline.generate(IDS, max_new_tokens=50_000)) for _ in range(3)]
        while any(not server.pipeline.sessions for server in pipeline.servers):
            await asyncio.sleep(0.01)
        await pipeline.servers[lost].stop(grace_s=0)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call, 10)
            assert isinstance(from_rpc_error(caught.value, "the ring"), errors.ModelUnavailableError)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(pipeline.generate(IDS, max_new_tokens=2), 10)
        assert isinstance(from_rpc_error(caught.value, "the ring"), errors.ModelUnavailableError)
        await pipeline.idle()
