"""The asyncio client: the same answers as the blocking one, cancellation that arrives, and no thread in between."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
import transformers

import shardlift
from shardlift.client.async_forward import AsyncRemoteCache
from shardlift.client.async_handle import AsyncRemoteModel
from shardlift.client.values import LoadStarted, ModelInfo, Plan
from shardlift.proto.v1 import errors, inference_pb2, registry_pb2
from tests.support.model_gateway import ModelGateway, tiny_llama
from tests.support.scripted_gateway import ScriptedGateway

IDS = torch.tensor([[1, 5, 9, 7], [1, 11, 12, 13]])
PADDED = torch.tensor([[0, 0, 1, 5], [1, 11, 12, 13]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def serving() -> Iterator[ModelGateway]:
    with ModelGateway(tiny_llama()) as gateway:
        yield gateway


@pytest_asyncio.fixture
async def model(serving: ModelGateway) -> AsyncIterator[AsyncRemoteModel]:
    serving.calls.clear()
    serving.before_step = lambda index: None
    async with await shardlift.connect_async(serving.address) as client:
        yield await client.model("tiny")


@pytest.fixture
def scripted() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as gateway:
        yield gateway


async def until(condition: Any) -> bool:
    for _ in range(200):
        if condition():
            return True
        await asyncio.sleep(0.05)
    return False


# Reaching a gateway


async def test_what_a_client_tells(serving: ModelGateway) -> None:
    async with await shardlift.connect_async(serving.address) as client:
        assert client.address == serving.address
        assert repr(client) == f"AsyncClient('{serving.address}')"
        (info,) = await client.infos()
        assert isinstance(info, ModelInfo)
        (model,) = await client.models()
        assert model.name == "tiny"
        assert repr(model) == f"AsyncRemoteModel('tiny' at {serving.address}: org/tiny, , 1 stage, ready)"
        assert isinstance(model.config, transformers.LlamaConfig)
        assert model.generation_config.eos_token_id == 2
        assert model.dtype is torch.float32
        assert model.hf_device_map == {"model": "here/cpu"}
        assert (await model.info()).state == "ready"
        assert model.eval() is model
        with pytest.raises(errors.ModelNotFoundError):
            await client.model("other")
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        await client.infos()
    await client.close()


async def test_a_dead_address_fails_soon() -> None:
    with pytest.raises(errors.GatewayUnavailableError, match=r"127\.0\.0\.1:1 .*shardlift up"):
        await shardlift.connect_async("127.0.0.1:1", timeout_s=0.3)
    with pytest.raises(errors.GatewayUnavailableError, match="SHARDLIFT_ADDRESS"):
        await shardlift.connect_async()


async def test_address_from_the_environment(serving: ModelGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIFT_ADDRESS", serving.address)
    async with await shardlift.connect_async() as client:
        assert client.address == serving.address


async def test_the_token_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway(token="secret") as gateway:
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        async with await shardlift.connect_async(gateway.address, token="secret") as client:
            assert await client.models() == []
            packed = pickle.dumps(client)
        assert b"secret" not in packed
        async with await shardlift.connect_async(gateway.address, token="guess") as client:
            with pytest.raises(errors.AuthenticationError) as caught:
                await client.models()
            assert "guess" not in str(caught.value)
        with pytest.raises(errors.AuthenticationError):
            await shardlift.connect_async(gateway.address, token="se\ncret")
        monkeypatch.setenv("SHARDLIFT_TOKEN", "secret")
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        async with pickle.loads(packed) as restored:
            assert await restored.models() == []


async def test_handles_are_copied_and_pickled(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    expected = await model.generate(IDS, max_new_tokens=2)
    model.generation_config.max_new_tokens = 2
    twin = copy.deepcopy(model)
    assert torch.equal(await twin.generate(IDS), expected)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(await restored.generate(IDS), expected)
    await restored._gateway.close()
    fresh = AsyncRemoteModel(model._gateway, "tiny")
    with pytest.raises(errors.InvalidRequestError, match=r"await model\.info"):
        _ = fresh.config


# Generating


@pytest.mark.parametrize("kind", ["tensor", "numpy", "list", "kwarg"])
async def test_generate(kind: str, serving: ModelGateway, model: AsyncRemoteModel) -> None:
    expected = serving.model.generate(PADDED, attention_mask=MASK, max_new_tokens=6)
    given: Any = {"numpy": PADDED.numpy(), "list": PADDED.tolist()}.get(kind, PADDED)
    name = "input_ids" if kind == "kwarg" else "inputs"
    actual = await model.generate(**{name: given}, attention_mask=MASK, max_new_tokens=6)
    assert torch.equal(actual, expected)


async def test_sampling_and_output(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    arguments = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    torch.manual_seed(3)
    expected = serving.model.generate(IDS, output_logits=True, **arguments)
    actual = await model.generate(IDS, seed=3, output_logits=True, **arguments)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual.logits, expected.logits, strict=True))


class Words:
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"w{token} " for token in ids)


async def test_streamers(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    expected = serving.model.generate(IDS[:1], max_new_tokens=4)[0, 4:].tolist()
    streamer = transformers.AsyncTextIteratorStreamer(Words(), skip_prompt=True, timeout=10)
    generating = asyncio.create_task(model.generate(IDS[:1], max_new_tokens=4, streamer=streamer))
    assert "".join([piece async for piece in streamer]) == Words().decode(expected)
    assert (await generating)[0, 4:].tolist() == expected


async def test_stream(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    expected = serving.model.generate(IDS, max_new_tokens=4)[:, 4:].T.tolist()
    running = model.stream(IDS, max_new_tokens=4)
    assert [step.token_ids async for step in running] == expected
    assert (running.batch, running.prompt_tokens, running.new_tokens) == (2, 4, 4)
    assert running.finish_reason == "length"
    assert [step async for step in running] == []


async def test_stream_text(scripted: ScriptedGateway) -> None:
    reply = inference_pb2.GenerateResponse
    scripted.answer(
        "Generate",
        reply(accepted=inference_pb2.PromptAccepted(batch=1, prompt_tokens=2, prompt_ids=[1, 2])),
        *(reply(step=inference_pb2.GeneratedStep(token_ids=[9], text=text)) for text in ("Hel", "", "lo")),
        reply(finished=inference_pb2.GenerationFinished(new_tokens=3, reason="stop")),
    )
    async with await shardlift.connect_async(scripted.address) as client:
        model = AsyncRemoteModel(client._gateway, "tiny")
        messages = [{"role": "user", "content": "Say it"}]
        assert [piece async for piece in model.stream_text(messages, temperature=0.5)] == ["Hel", "lo"]
    assert scripted.calls[-1].request.conversation.messages[0].content == "Say it"
    with pytest.raises(errors.InvalidRequestError, match="one of ids"):
        model.stream()


async def test_many_at_once(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    before = threading.active_count()
    prompts = [torch.tensor([[1, 3 + number, 4]]) for number in range(6)]
    answers = await asyncio.gather(*(model.generate(prompt, max_new_tokens=5) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert torch.equal(answer, serving.model.generate(prompt, max_new_tokens=5))
    # The server's own eight apart.
    assert threading.active_count() <= before + 8


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 3}, {"num_beams": 2, "attention_mask": MASK}, {"guidance_scale": 1.5}, {"num_beams": 2, "seed": 5}],
)
async def test_what_is_driven_from_here(
    arguments: dict[str, Any], serving: ModelGateway, model: AsyncRemoteModel
) -> None:
    ids = PADDED if "attention_mask" in arguments else IDS
    expected = serving.model.generate(
        ids, max_new_tokens=5, **{key: value for key, value in arguments.items() if key != "seed"}
    )
    assert torch.equal(await model.generate(ids, max_new_tokens=5, **arguments), expected)
    assert await until(lambda: not serving.open_sessions)


# Cancelling


def forever(*replies: Any) -> Any:
    def play(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from replies
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)

    return play


ACCEPTED = inference_pb2.GenerateResponse(accepted=inference_pb2.PromptAccepted(batch=1, prompt_tokens=2))
STEP = inference_pb2.GenerateResponse(step=inference_pb2.GeneratedStep(token_ids=[3]))


@pytest.mark.parametrize("how", ["generate", "stream", "break", "forget"])
async def test_a_cancelled_task_cancels_the_call(how: str, scripted: ScriptedGateway) -> None:
    scripted.expect("Generate", forever(ACCEPTED, STEP))
    with ModelGateway(tiny_llama()) as real:
        info = ModelInfo.from_proto(real.info())
    async with await shardlift.connect_async(scripted.address) as client:
        model = AsyncRemoteModel(client._gateway, "tiny", info)
        seen = asyncio.Event()

        async def read() -> None:
            async for _ in model.stream([[1, 2]]):
                seen.set()

        if how == "break":
            async with model.stream([[1, 2]]) as running:
                async for _ in running:
                    break
        elif how == "forget":
            async for _ in model.stream([[1, 2]]):
                break
            gc.collect()
        else:
            task = asyncio.create_task(read() if how == "stream" else model.generate([[1, 2]]))
            if how == "stream":
                await seen.wait()
            else:
                await until(lambda: scripted.calls)
                await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await until(lambda: scripted.calls and scripted.calls[-1].over.is_set())
        assert scripted.calls[-1].cancelled


async def test_cancelling_what_is_driven_from_here(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    passes = threading.Event()

    def slowly(batch: int, ids: torch.Tensor) -> list[int]:
        passes.set()
        threading.Event().wait(0.05)
        return list(range(4, 64))

    task = asyncio.create_task(model.generate(IDS, max_new_tokens=500, prefix_allowed_tokens_fn=slowly))
    await asyncio.to_thread(passes.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await until(lambda: not serving.open_sessions)


async def test_a_failure_ends_the_streamer(scripted: ScriptedGateway) -> None:
    scripted.answer("Generate", ACCEPTED, STEP, error=errors.ModelUnavailableError("stage 1 is gone"))
    with ModelGateway(tiny_llama()) as real:
        info = ModelInfo.from_proto(real.info())

    class Recorder(transformers.generation.streamers.BaseStreamer):
        said: list[Any] = []  # noqa: RUF012

        def put(self, value: torch.Tensor) -> None:
            self.said.append(value.tolist())

        def end(self) -> None:
            self.said.append("end")

    async with await shardlift.connect_async(scripted.address) as client:
        with pytest.raises(errors.ModelUnavailableError):
            await AsyncRemoteModel(client._gateway, "tiny", info).generate([[1, 2]], streamer=Recorder())
    assert Recorder.said == [[[1, 2]], [3], "end"]


# Passes


async def test_forward(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    output: Any = await model(IDS, attention_mask=MASK, logits_to_keep=2)
    positions = torch.arange(4)[None]
    expected = serving.model(IDS, attention_mask=MASK, position_ids=positions, logits_to_keep=2)
    assert torch.equal(output.logits, expected.logits)
    assert output.past_key_values is None
    assert isinstance(await model.forward(IDS, return_dict=False), tuple)
    with pytest.raises(errors.InvalidRequestError, match="DynamicCache"):
        await model(IDS, past_key_values=transformers.DynamicCache())


async def test_a_cache(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    local = transformers.DynamicCache(config=serving.model.config)
    output: Any = await model(IDS, use_cache=True)
    serving.model(IDS, past_key_values=local)
    cache = output.past_key_values
    assert isinstance(cache, AsyncRemoteCache)
    for one in (cache, local):
        one.crop(-1)
        one.reorder_cache(torch.tensor([1, 0]))
    following = torch.tensor([[21, 22], [23, 24]])
    output = await model(following, past_key_values=cache, use_cache=True)
    expected = serving.model(following, past_key_values=local, position_ids=torch.tensor([[3, 4]]))
    assert torch.equal(output.logits, expected.logits)
    assert cache.get_seq_length() == 5
    with pytest.raises(TypeError, match="open call"):
        pickle.dumps(cache)
    cache.close()
    assert await until(lambda: not serving.open_sessions)
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        await model(following, past_key_values=cache)
    output = await model(IDS, use_cache=True)
    assert serving.open_sessions
    del output
    gc.collect()
    assert await until(lambda: not serving.open_sessions)


# Losing the gateway


async def test_a_stream_goes_on_after_a_restart(serving: ModelGateway, model: AsyncRemoteModel) -> None:
    expected = serving.model.generate(IDS, max_new_tokens=6)[:, 4:].T.tolist()
    due = serving.restart_at(2, 4)
    assert [step.token_ids async for step in model.stream(IDS, max_new_tokens=6)] == expected
    assert not due
    assert len(serving.called("Generate")) == 3
    assert serving.called("Generate")[-1].HasField("generated")


async def test_questions_are_asked_again_and_changes_are_not(scripted: ScriptedGateway) -> None:
    def unavailable(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")

    async with await shardlift.connect_async(scripted.address, retry_s=5) as client:
        scripted.expect("ListModels", unavailable)
        scripted.answer("ListModels", registry_pb2.ListModelsResponse())
        assert await client.models() == []
        scripted.expect("UnloadModel", unavailable)
        with pytest.raises(errors.GatewayUnavailableError):
            await client.unload("tiny")


# Loading


async def test_load_plan_and_unload(scripted: ScriptedGateway, tmp_path: Any) -> None:
    reply = registry_pb2.LoadModelResponse
    plan = registry_pb2.Plan(model="org/tiny", kv_tokens=9)
    async with await shardlift.connect_async(scripted.address) as client:
        scripted.answer("PlanModel", registry_pb2.PlanModelResponse(plan=plan))
        planned = await client.plan("org/tiny", num_stages=2)
        assert planned.kv_tokens == 9
        scripted.answer(
            "LoadModel",
            reply(started=registry_pb2.LoadStarted(name="tiny")),
            reply(planned=plan),
            reply(trace=registry_pb2.LoadTrace(json=b"[]", last=True)),
            reply(ready=registry_pb2.ModelInfo(name="tiny")),
        )
        events: list[Any] = []
        model = await client.load("org/tiny", name="tiny", on_event=events.append, trace=tmp_path / "trace.json")
        assert [type(event) for event in events] == [LoadStarted, Plan, ModelInfo]
        assert model.name == "tiny"
        assert (tmp_path / "trace.json").exists()
        scripted.answer("UnloadModel", registry_pb2.UnloadModelResponse())
        await model.unload()
        scripted.answer("ClearCachedParts", registry_pb2.ClearCachedPartsResponse(bytes=7))
        assert await client.clear_cached_parts() == 7
        scripted.answer("ListCachedParts", registry_pb2.ListCachedPartsResponse())
        assert await client.cached_parts() == []


async def test_a_cancelled_load_is_cancelled(scripted: ScriptedGateway) -> None:
    started = registry_pb2.LoadModelResponse(started=registry_pb2.LoadStarted(name="tiny"))
    scripted.expect("LoadModel", forever(started))
    async with await shardlift.connect_async(scripted.address) as client:
        seen = asyncio.Event()
        task = asyncio.create_task(client.load("org/tiny", on_event=lambda event: seen.set()))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await until(scripted.calls[-1].over.is_set)
        assert scripted.calls[-1].cancelled
