"""Tokens drawn from torch's global generator: by real stages behind a gateway, and by transformers in one process."""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import shardlift
from shardlift.client.draws import Draws as ClientDraws
from shardlift.proto.v1 import errors, generator_state, inference_pb2
from shardlift.worker.draws import Draws, _seed_from
from shardlift.worker.tensors import to_message
from tests.support import checkpoints
from tests.support.ring_gateway import NAME, Served, serving

IDS = torch.arange(5, 17)[None]
PADDED = torch.cat([torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11, 12, 13, 14, 15]]), IDS])
MASK = (PADDED != 0).long()
NEW = 10


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Served]]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"))
    checkpoints.byte_tokenizer(folder)
    local = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder, (1, 3)) as served:
        yield local, served


@pytest.fixture(autouse=True)
def own_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def drawn(local: Any, ids: torch.Tensor = IDS, count: int = 1, **arguments: Any) -> list[torch.Tensor]:
    """What `count` generations of the local model draw, after what was drawn by now."""
    arguments = {"max_new_tokens": NEW, "do_sample": True, **arguments}
    return [local.generate(ids, **arguments) for _ in range(count)]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"inputs": PADDED, "attention_mask": MASK},
        {"num_return_sequences": 3},
        {"inputs": PADDED, "attention_mask": MASK, "num_return_sequences": 2, "top_k": 9},
        {"top_p": 0.7, "top_k": 0, "temperature": 0.6},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"eos_token_id": list(range(3, 60)), "inputs": PADDED, "attention_mask": MASK},
        {"use_cache": False},
    ],
    ids=str,
)
def test_manual_seed_gives_the_tokens_of_a_local_model(arguments: dict[str, Any], pair: tuple[Any, Served]) -> None:
    """And so do the second call, and whatever is drawn after it."""
    local, served = pair
    arguments = {"inputs": IDS, "max_new_tokens": NEW, "do_sample": True, **arguments}
    results = []
    for model in (local, served.model):
        torch.manual_seed(11)
        torch.randn(3)  # half of a pair of normal variates is left over
        tokens = [model.generate(**arguments) for _ in range(2)]
        results.append([*tokens, torch.randn(3), torch.rand(2)])
        assert torch.initial_seed() == 11
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][1])


def test_other_forms(pair: tuple[Any, Served]) -> None:
    local, served = pair
    torch.manual_seed(3)
    expected = drawn(local, count=4)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model = served.model
    arguments = {"max_new_tokens": NEW, "do_sample": True}
    steps = [step.token_ids[0] for step in model.stream(IDS, **arguments)]
    assert steps == expected[0][0, IDS.shape[1] :].tolist()
    with model.session() as session:
        assert torch.equal(session.generate(IDS, **arguments), expected[1])
        session.rollback(0)
        steps = [step.token_ids[0] for step in session.stream(IDS, **arguments)]
        assert steps == expected[2][0, IDS.shape[1] :].tolist()

    async def generate() -> torch.Tensor:
        async with await shardlift.connect_async(served.address) as client:
            return await (await client.model(NAME)).generate(IDS, **arguments)

    assert torch.equal(asyncio.run(generate()), expected[3])
    assert torch.equal(torch.get_rng_state(), after)


def test_a_models_own_config_is_sampled_by_a_handle_that_does_not_know_it_yet(tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path)
    config = GenerationConfig.from_pretrained(folder)
    config.do_sample = True
    config.save_pretrained(folder)
    local = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder, ()) as served:
        torch.manual_seed(3)
        expected = local.generate(IDS, max_new_tokens=NEW)[0, IDS.shape[1] :].tolist()
        torch.manual_seed(3)
        fresh = pickle.loads(pickle.dumps(served.client.model(NAME)))
        assert fresh._cached_info is None
        assert [step.token_ids[0] for step in fresh.stream(IDS, max_new_tokens=NEW)] == expected
        fresh._gateway.close()


def test_text(pair: tuple[Any, Served]) -> None:
    served = pair[1]
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(["".join(served.model.stream_text("Hello", max_new_tokens=20, do_sample=True)) for _ in "ab"])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_what_leaves_the_generator_alone(pair: tuple[Any, Served]) -> None:
    model = pair[1].model
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    model.generate(IDS, max_new_tokens=2, do_sample=True, seed=9)
    list(model.stream(IDS, max_new_tokens=2, do_sample=False))
    with pytest.raises(errors.InvalidRequestError, match="temperature"):
        model.generate(IDS, max_new_tokens=2, do_sample=True, temperature=-1.0)
    with pytest.raises(errors.InvalidRequestError, match="999"):
        model.generate([[999]], max_new_tokens=2, do_sample=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_generations_at_once_draw_each_their_own(pair: tuple[Any, Served]) -> None:
    """The first draws as it would alone; nobody draws what another does, before or after."""
    local, served = pair
    arguments = {"max_new_tokens": NEW, "do_sample": True}

    async def generate() -> list[torch.Tensor]:
        async with await shardlift.connect_async(served.address) as client:
            model = await client.model(NAME)
            return await asyncio.gather(*(model.generate(IDS, **arguments) for _ in range(6)))

    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([*asyncio.run(generate()), served.model.generate(IDS, **arguments)])
    torch.manual_seed(7)
    assert torch.equal(runs[0][0], drawn(local)[0])
    assert all(torch.equal(*each) for each in zip(*(run[:-1] for run in runs), strict=True))
    assert len({tuple(tokens[0].tolist()) for tokens in runs[0]}) == 7


def test_one_that_is_left_early_is_not_drawn_again(pair: tuple[Any, Served]) -> None:
    model = pair[1].model
    torch.manual_seed(7)
    with model.stream(IDS, max_new_tokens=50, do_sample=True) as running:
        first = [next(running).token_ids[0] for _ in range(5)]
    second = model.generate(IDS, max_new_tokens=5, do_sample=True)[0, IDS.shape[1] :].tolist()
    assert first != second


def test_an_interrupted_generation_is_gone_on_with(pair: tuple[Any, Served]) -> None:
    """The state that is left at its end is that of an undisturbed one, too."""
    ring = pair[1].ring
    torch.manual_seed(4)
    torch.rand(7)
    request = inference_pb2.GenerateRequest(
        input_ids=to_message(IDS), generator_state=generator_state.taken_from(torch.default_generator)
    )
    request.generation.update({"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 2})
    (expected,) = drawn(pair[0], max_new_tokens=9, num_return_sequences=2)
    left = generator_state.taken_from(torch.default_generator)
    tokens = expected[:, IDS.shape[1] :]

    async def rest(had: int) -> tuple[list[list[int]], bytes]:
        request.generated.CopyFrom(to_message(tokens[:, :had].contiguous()))
        steps: list[list[int]] = []
        state = b""
        async for response in ring.stub.Generate(request, metadata=ring.metadata):
            if response.HasField("step"):
                steps.append(list(response.step.token_ids))
            elif response.HasField("finished"):
                state = response.finished.generator_state
                assert list(response.finished.row_tokens) == [9, 9]
        return steps, state

    for had in (0, 1, 5, 9):
        steps, state = pair[1].call(lambda had=had: rest(had))
        assert steps == tokens[:, had:].T.tolist(), had
        assert state == left, had


def state(seed: int = 1, left: int = 1, seeded: int = 1, following: int = 0, words: int = 624) -> bytes:
    return struct.pack("<QiiQ", seed, left, seeded, following) + struct.pack("<Q", 77) * words


@pytest.mark.parametrize(
    "hostile",
    [
        state(words=623),
        state(words=625),
        state(seeded=0),
        state(left=0),
        state(left=-5, following=630),
        state(left=624, following=624),  # torch takes it, and reads beyond its words
        state(left=1, following=2**63),
        state(left=625),
        b"x",
    ],
    ids=["short", "long", "not seeded", "none left", "fewer than none", "beyond", "far beyond", "too many", "none"],
)
def test_states_that_no_generator_comes_to(hostile: bytes, pair: tuple[Any, Served]) -> None:
    request = inference_pb2.GenerateRequest(model=NAME, input_ids=to_message(IDS), generator_state=hostile)
    request.generation.update({"max_new_tokens": 2, "do_sample": True})
    with grpc.insecure_channel(pair[1].address) as channel:
        call = channel.unary_stream(
            "/shardlift.v1.InferenceService/Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "generator_state" in caught.value.details()
    # Nor does a client take it from a gateway.
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = ClientDraws(inference_pb2.GenerateRequest())
    with pytest.raises(errors.InternalError, match="no generator's state"):
        draws.over(hostile)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_state_that_torch_comes_to_is_taken() -> None:
    generator, other = torch.Generator().manual_seed(2**64 - 1), torch.Generator()
    for count in (0, 1, 1, 621, 1, 1, 623, 5000):
        torch.rand(count, generator=generator)
        generator_state.put_into(other, generator_state.taken_from(generator))
        assert torch.equal(other.get_state(), generator.get_state())
    assert generator_state.seed_of(generator_state.taken_from(generator)) == 2**64 - 1


def test_other_devices_are_seeded_from_the_clients_generator() -> None:
    """As torch.manual_seed seeds them all; and not alike in the next call."""
    client = torch.Generator().manual_seed(5)
    seeds = []
    for _ in range(3):
        seeds.append(_seed_from(client, generator_state.taken_from(client)))
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    again = torch.Generator().manual_seed(5)
    assert seeds == [_seed_from(again, generator_state.taken_from(again)) for _ in range(3)]
    other = torch.Generator().manual_seed(5)
    torch.rand(1, generator=other)
    assert _seed_from(other, generator_state.taken_from(other)) not in seeds[:1]


@pytest.mark.gpu
def test_on_a_gpu_it_is_seeded_from_the_clients_generator() -> None:
    device = torch.device("cuda")
    even = torch.ones(2, 1000, device=device)

    def tokens(client: torch.Generator) -> list[int]:
        draws = Draws(device, seed=None, state=generator_state.taken_from(client))
        chosen: list[int] = [token for _ in range(5) for token in draws.draw(even).tolist()]
        generator_state.put_into(client, draws.state)
        return chosen

    client = torch.Generator().manual_seed(5)
    first, second = tokens(client), tokens(client)
    assert first != second
    local = torch.Generator(device).manual_seed(5)
    assert first == [token for _ in range(5) for token in torch.multinomial(even, 1, generator=local)[:, 0].tolist()]
    again = torch.Generator().manual_seed(5)
    assert [tokens(again), tokens(again)] == [first, second]
