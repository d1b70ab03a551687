"""Every bound of docs/security.md, overstepped: the right status, and a stream beside it that notices nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

import shardlift
from shardlift.cluster import gateway as gateway_module
from shardlift.cluster.checkpoint import CheckpointRequest, read_checkpoint
from shardlift.cluster.config_limits import MOST_LAYERS
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.cluster.planning import ModelOptions, outline_model
from shardlift.proto.v1 import (
    generator_state,
    inference_pb2,
    inference_pb2_grpc,
    limits,
    registry_pb2,
    registry_pb2_grpc,
    wire,
)
from shardlift.proto.v1.errors import (
    CorruptCheckpointError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from shardlift.proto.v1.status import from_rpc_error, sent_by_us, to_status
from shardlift.proto.v1.tensor_pb2 import Tensor
from shardlift.worker.headers import MAX_HEADER_BYTES
from shardlift.worker.links import MOST_GROUPED
from shardlift.worker.records import SourceSpec
from shardlift.worker.tensors import to_message
from shardlift.worker.tokenizer import load_tokenizer
from tests.support import checkpoints, gateway, ring

TOKEN = "the-gateways-token"
IDS = torch.arange(5, 17)[None]
INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def address(folder: Path, tmp_path: Path) -> AsyncIterator[str]:
    """A gateway that wants a token, before two stages."""
    (tmp_path / "token").write_text(TOKEN)
    specs = ring.specs(folder, (2,))
    options = GatewayOptions(token_file=str(tmp_path / "token"))
    async with ring.serve(ring.load(folder, (2,))) as stages, gateway.serve(options, stages, specs) as served:
        yield served


def generate(**generation: Any) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(model=gateway.NAME, input_ids=to_message(IDS))
    request.generation.update(generation)
    return request


def ids(*shape: int, dtype: str = "int64", data: int = 8) -> Tensor:
    return Tensor(shape=shape, dtype=dtype, data=bytes(data))


def deep(levels: int) -> Any:
    value: Any = 1.0
    for _ in range(levels):
        value = [value]
    return value


def load(**fields: Any) -> registry_pb2.LoadModelRequest:
    request = registry_pb2.LoadModelRequest(name=fields.pop("name", ""))
    for name, value in fields.items():
        part = request.source if name in request.source.DESCRIPTOR.fields_by_name else request.options
        if isinstance(value, dict):
            getattr(part, name).update(value)
        else:
            setattr(part, name, value)
    return request


Request = Callable[[], Any]
# What, its method, the request, the status, and a word of the answer.
EXCESSES: list[tuple[str, str, Request, grpc.StatusCode, str]] = [
    ("a message", "Generate", lambda: bytes(41 << 20), EXHAUSTED, "larger than max"),
    ("no message", "Generate", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("no message, unary", "ListModels", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("no message, of a load", "LoadModel", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("no message, of a session", "Session", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("no message, of passes", "Forward", lambda: b"\xff\xff", INVALID, "can't be read"),
    (
        "nesting that protobuf itself refuses",
        "Generate",
        lambda: generate(bad_words_ids=deep(300)),
        INVALID,
        "can't be read",
    ),
    ("nesting", "Generate", lambda: generate(bad_words_ids=deep(12)), INVALID, "nested over 8 deep"),
    ("values", "Generate", lambda: generate(suppress_tokens=[1.0] * 270_000), INVALID, "values in the generation's"),
    ("copies", "Generate", lambda: generate(num_return_sequences=1e9), INVALID, "at most 1024 copies"),
    ("beams", "Generate", lambda: generate(num_beams=1e300), INVALID, "at most 1024 copies"),
    ("copies that are no number", "Generate", lambda: generate(num_beams=float("nan")), INVALID, "copies"),
    ("stop strings", "Generate", lambda: generate(stop_strings=["x"] * 65), INVALID, "65 stop_strings"),
    ("a stop string", "Generate", lambda: generate(stop_strings=["x" * 1025]), INVALID, "a stop string has 1,025"),
    ("bad words", "Generate", lambda: generate(bad_words_ids=[[1.0]] * 8193), INVALID, "8,193 bad_words_ids"),
    (
        "a sequence bias",
        "Generate",
        lambda: generate(sequence_bias=[[[1.0], 0.5]] * 8193),
        INVALID,
        "8,193 sequence_bias",
    ),
    (
        "a generator's state",
        "Generate",
        lambda: inference_pb2.GenerateRequest(model=gateway.NAME, input_ids=to_message(IDS), generator_state=bytes(9)),
        INVALID,
        "generator_state has 9 bytes, not 5,016",
    ),
    (
        "two seeds",
        "Generate",
        lambda: inference_pb2.GenerateRequest(
            model=gateway.NAME, input_ids=to_message(IDS), seed=1, generator_state=bytes(9)
        ),
        INVALID,
        "send one of them",
    ),
    (
        "a prompt",
        "Generate",
        lambda: inference_pb2.GenerateRequest(model=gateway.NAME, prompt="x" * (limits.MOST_PROMPT_CHARACTERS + 1)),
        INVALID,
        "the prompt has 1,048,577 characters",
    ),
    (
        "messages",
        "Generate",
        lambda: inference_pb2.GenerateRequest(
            model=gateway.NAME,
            conversation=inference_pb2.Conversation(messages=[inference_pb2.ChatMessage(role="user")] * 4097),
        ),
        INVALID,
        "4,097 messages",
    ),
    (
        "their text",
        "Generate",
        lambda: inference_pb2.GenerateRequest(
            model=gateway.NAME,
            conversation=inference_pb2.Conversation(
                messages=[inference_pb2.ChatMessage(role="user", content="x" * 600_000)] * 2
            ),
        ),
        INVALID,
        "1,200,000 characters in the conversation",
    ),
    ("a name", "GetModel", lambda: registry_pb2.GetModelRequest(name="x" * 257), INVALID, "the model's name has 257"),
    (
        "ids of a rank",
        "Forward",
        lambda: inference_pb2.ForwardRequest(model=gateway.NAME, input_ids=ids(1, 1, 1)),
        INVALID,
        "[batch, length], not [1, 1, 1]",
    ),
    (
        "extents below none",
        "Forward",
        lambda: inference_pb2.ForwardRequest(model=gateway.NAME, input_ids=ids(1, -1)),
        INVALID,
        "[1, -1]",
    ),
    (
        "extents whose product overflows",
        "Forward",
        lambda: inference_pb2.ForwardRequest(model=gateway.NAME, input_ids=ids(1 << 62, 1 << 62)),
        INVALID,
        "at most 4,194,304 tokens",
    ),
    (
        "rows",
        "Forward",
        lambda: inference_pb2.ForwardRequest(model=gateway.NAME, input_ids=ids(4097, 1)),
        INVALID,
        "4,097 rows",
    ),
    (
        "a mask's dimensions",
        "Forward",
        lambda: inference_pb2.ForwardRequest(
            model=gateway.NAME, input_ids=to_message(IDS), attention_mask=ids(*[1] * 9), use_cache=True
        ),
        INVALID,
        "9 dimensions; at most 8",
    ),
    (
        "a mask without its bytes",
        "Forward",
        lambda: inference_pb2.ForwardRequest(
            model=gateway.NAME, input_ids=to_message(IDS), attention_mask=ids(1 << 14, 1 << 14), use_cache=True
        ),
        INVALID,
        "but 8 were sent",
    ),
    (
        "a mask over any limit",
        "Forward",
        lambda: inference_pb2.ForwardRequest(
            model=gateway.NAME, input_ids=to_message(IDS), attention_mask=ids(1 << 20, 1 << 20), use_cache=True
        ),
        INVALID,
        "over the limit of 4,294,967,296",
    ),
    (
        "rows of a session",
        "Session",
        lambda: inference_pb2.SessionRequest(model=gateway.NAME, rows=[0] * 4097),
        INVALID,
        "4,097 rows",
    ),
    (
        "a time that is none",
        "Session",
        lambda: inference_pb2.SessionRequest(model=gateway.NAME, idle_timeout_s=float("nan")),
        INVALID,
        "idle_timeout_s=nan",
    ),
    (
        "a time below none",
        "Session",
        lambda: inference_pb2.SessionRequest(model=gateway.NAME, idle_timeout_s=-1.0),
        INVALID,
        "idle_timeout_s=-1",
    ),
    *(
        (
            f"a time to wait, {seconds}",
            "DiagnoseCluster",
            partial(registry_pb2.DiagnoseClusterRequest, timeout_s=seconds),
            INVALID,
            f"timeout_s={seconds:g}: write a number of seconds from 0 to 86,400",
        )
        for seconds in (float("nan"), -1.0, float("inf"), 86_401.0)
    ),
    *(
        (
            f"a time between looks, {seconds}",
            "WatchCluster",
            partial(registry_pb2.WatchClusterRequest, interval_s=seconds),
            INVALID,
            f"interval_s={seconds:g}",
        )
        for seconds in (float("nan"), -1.0, float("inf"), 86_401.0)
    ),
    ("a shown name", "DescribeCluster", lambda: registry_pb2.DescribeClusterRequest(model="x" * 257), INVALID, "257"),
    ("a watched name", "WatchCluster", lambda: registry_pb2.WatchClusterRequest(model="x" * 257), INVALID, "257"),
    (
        "a node",
        "DrainNode",
        lambda: registry_pb2.DrainNodeRequest(node="x" * 1000),
        INVALID,
        "the node's name has 1,000",
    ),
    ("a node", "UndrainNode", lambda: registry_pb2.UndrainNodeRequest(node="x" * 257), INVALID, "the node's name"),
    ("no message, of a node", "DrainNode", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("no message, of a watch", "WatchCluster", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("no message, of a diagnosis", "DiagnoseCluster", lambda: b"\xff\xff", INVALID, "can't be read"),
    ("a path", "LoadModel", lambda: load(path="x" * 4097), INVALID, "the path has 4,097"),
    ("a revision", "LoadModel", lambda: load(path="x", revision="x" * 1025), INVALID, "revision has 1,025"),
    ("a config", "LoadModel", lambda: load(path="x", config_json="x" * (1 << 20 | 1)), INVALID, "config has 1,048,577"),
    (
        "a config's overrides, planned",
        "PlanModel",
        lambda: registry_pb2.PlanModelRequest(
            options=registry_pb2.LoadOptions(config_overrides_json=" " * (1 << 20 | 1))
        ),
        INVALID,
        "config_overrides has",
    ),
    (
        "a device map",
        "LoadModel",
        lambda: load(path="x", device_map_by_module={str(n): "0" for n in range(65_537)}),
        INVALID,
        "65,537 entries in device_map",
    ),
    (
        "a limit's text",
        "LoadModel",
        lambda: load(path="x", max_memory={"0": "1" * 1025}),
        INVALID,
        "a value in max_memory",
    ),
    ("stages", "LoadModel", lambda: load(path="x", num_stages=4097), INVALID, "4,097 num_stages"),
    ("sessions", "LoadModel", lambda: load(path="x", max_sessions=65_537), INVALID, "65,537 max_sessions"),
    ("reserved", "LoadModel", lambda: load(path="x", reserve_tokens=1 << 63), INVALID, "reserve_tokens"),
]
_REGISTRY = {method.name for method in registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"].methods}


async def failure(channel: grpc.aio.Channel, method: str, message: Any, **options: Any) -> grpc.aio.AioRpcError:
    service = "ModelRegistryService" if method in _REGISTRY else "InferenceService"
    data = message if isinstance(message, bytes) else message.SerializeToString()
    for _ in range(5):
        call = channel.stream_stream(f"/shardlift.v1.{service}/{method}")(
            iter([data]), **{"metadata": [("authorization", f"Bearer {TOKEN}")], "timeout": 60, **options}
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        # grpc.aio's client says so where it was refused before it had sent its message: nothing of what it was told.
        if caught.value.details() != "Internal error from Core":
            break
    return caught.value


async def test_excess_is_refused_and_others_go_on(address: str) -> None:
    client = await shardlift.connect_async(address, TOKEN)
    model = await client.model(gateway.NAME)
    expected = (await model.generate(IDS, max_new_tokens=100, eos_token_id=None)).tolist()
    got: list[int] = IDS[0].tolist()
    stream = generate(max_new_tokens=100, eos_token_id=None)
    raw = grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
    call = raw.unary_stream(
        "/shardlift.v1.InferenceService/Generate",
        request_serializer=inference_pb2.GenerateRequest.SerializeToString,
        response_deserializer=inference_pb2.GenerateResponse.FromString,
    )(stream, metadata=[("authorization", f"Bearer {TOKEN}")])
    async with raw, client:
        answers = aiter(call)

        async def one_more() -> bool:
            answer = await anext(answers, None)
            if answer is not None and answer.WhichOneof("event") == "step":
                got.extend(answer.step.token_ids)
            return answer is not None

        for what, method, request, code, said in EXCESSES:
            error = await failure(raw, method, request())
            assert error.code() is code, (what, error.details())
            assert said in str(error.details()), (what, error.details())
            assert code is EXHAUSTED or sent_by_us(error), what
            assert await one_more(), "the stream beside it has ended"
        # Headers: more of them than a call has need of.
        error = await failure(raw, "Generate", stream, metadata=[("x-much", "x" * (20 << 10))])
        assert error.code() is EXHAUSTED
        assert "metadata" in str(error.details())
        # Tokens: guessed at, again and again.
        for guess in range(200):
            error = await failure(raw, "ListModels", b"", metadata=[("authorization", f"Bearer {guess}")])
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        while await one_more():
            pass
    assert [got] == expected


async def test_what_is_at_the_limit_is_taken(address: str) -> None:
    """Not a word of limits, where something else is wrong with it or nothing."""
    for request in (
        generate(stop_strings=["x" * 1024] * 64, max_new_tokens=1),
        generate(bad_words_ids=[[250.0]] * 8192, max_new_tokens=1),
        generate(num_return_sequences=1024, do_sample=True, max_new_tokens=1),
    ):
        limits.check_generate(request)
    limits.check_generate(inference_pb2.GenerateRequest(prompt="x" * limits.MOST_PROMPT_CHARACTERS))
    limits.check_load(load(path="x" * 4096).source, load(config_json=" " * (1 << 20)).options, "x" * 256)
    limits.check_logits(1, 1, 1 << 30, 4)
    with pytest.raises(InvalidRequestError, match=r"take 4,294,967,300 bytes.*logits_to_keep"):
        limits.check_logits(1, 1, (1 << 30) + 1, 4)
    client = await shardlift.connect_async(address, TOKEN)
    async with client:
        model = await client.model(gateway.NAME)
        ids_ = await model.generate(IDS, max_new_tokens=2, bad_words_ids=[[250]] * 8192)
        assert ids_.shape[0] == 1


async def test_calls_beyond_a_servers_number_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown on a gateway of three: who is there stays, who comes is refused, and there is room when one has gone."""
    monkeypatch.setattr(gateway_module, "MAX_CALLS", 3)
    specs = ring.specs(folder, (2,))
    async with (
        ring.serve(ring.load(folder, (2,))) as stages,
        gateway.serve(GatewayOptions(), stages, specs) as served,
        grpc.aio.insecure_channel(served) as channel,
    ):
        inference = inference_pb2_grpc.InferenceServiceStub(channel)

        async def session() -> Any:
            """A session that has begun."""
            call = inference.Session()
            action = inference_pb2.ForwardRequest(input_ids=to_message(IDS))
            await call.write(inference_pb2.SessionRequest(model=gateway.NAME, forward=action))
            while (await call.read()).WhichOneof("event") != "done":
                pass
            return call

        sessions = [await session() for _ in range(3)]
        error = await failure(channel, "ListModels", b"")
        assert error.code() is EXHAUSTED
        await sessions[0].write(inference_pb2.SessionRequest(keep=3))
        assert (await sessions[0].read()).done.length == 3
        sessions[1].cancel()
        registry = registry_pb2_grpc.ModelRegistryServiceStub(channel)
        for _ in range(200):
            with contextlib.suppress(grpc.aio.AioRpcError):
                assert len((await registry.ListModels(registry_pb2.ListModelsRequest())).models) == 1
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("a call that has ended keeps its place")
        for call in (sessions[0], sessions[2]):
            call.cancel()
    assert dict(wire.SERVER_OPTIONS)["grpc.max_concurrent_streams"] < wire.MAX_CALLS, "one connection can't have all"


def test_a_refusal_fits_into_its_headers() -> None:
    """Whatever it quotes: else the caller would be told of the headers, and not of what was wrong."""
    for text in ("x" * 100_000, "ü" * 100_000, "\U0001f600" * 100_000):
        status = to_status(ModelNotFoundError(text))
        size = sum(len(key) + len(value) * 4 // 3 for key, value in status.trailing_metadata)
        assert size + 3 * len(status.details.encode()) < wire.MAX_METADATA_BYTES
        assert status.details.endswith("…")


async def test_a_client_reads_a_refusal_that_was_long(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        error = await failure(channel, "LoadModel", load(path="ü" * 4096, name="?"))
        ours = from_rpc_error(error, address)
        assert type(ours) is InvalidRequestError


# ---- what a checkpoint brings ----------------------------------------------------------------------------------------


def test_a_checkpoints_files_are_bounded(folder: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).symlink_to(file)
        return target

    def broken(name: str, file: str, text: str | int) -> Path:
        target = copied(name)
        (target / file).unlink(missing_ok=True)
        if isinstance(text, int):
            with (target / file).open("wb") as stream:
                stream.truncate(text)
        else:
            (target / file).write_text(text)
        return target

    config = json.loads((folder / "config.json").read_text())
    index = "model.safetensors.index.json"
    many = json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(20_001)}})
    for path, said in (
        (broken("config", "config.json", (16 << 20) + 1), r"config.json has 16,777,217 bytes"),
        (broken("index", index, (256 << 20) + 1), r"index.json has 268,435,457 bytes"),
        (broken("files", index, many), r"names 20,001 files; at most 20,000"),
        (broken("nesting", "config.json", "[" * 200_000), r"config.json is not JSON"),
    ):
        with pytest.raises(CorruptCheckpointError, match=said):
            read_checkpoint(CheckpointRequest(path=str(path)), None)
    assert (folder / index).exists()
    large = SourceSpec(kind="folder", location=str(broken("tokenizer", "tokenizer.json", (128 << 20) + 1)))
    with pytest.raises(CorruptCheckpointError, match=r"tokenizer.json has 134,217,729 bytes"):
        load_tokenizer(large, None)
    path = broken("layers", "config.json", json.dumps({**config, "num_hidden_layers": 1_000_000}))
    with pytest.raises(UnsupportedModelError, match=r"num_hidden_layers=1000000; at most 4096"):
        outline_model(CheckpointRequest(path=str(path)), None, ModelOptions())
    for overrides in ({"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 10**9}}):
        with pytest.raises(UnsupportedModelError, match="at most 4096"):
            outline_model(CheckpointRequest(path=str(folder)), None, ModelOptions(config_overrides=overrides))


# ---- by the thousand -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_make_a_check_fail_otherwise(data: bytes) -> None:
    for message, check in (
        (inference_pb2.GenerateRequest(), limits.check_generate),
        (inference_pb2.ForwardRequest(), limits.check_forward),
        (inference_pb2.SessionRequest(), limits.check_session),
    ):
        try:
            message.ParseFromString(data)
        except DecodeError:
            continue
        with contextlib.suppress(InvalidRequestError):
            check(message)  # type: ignore[operator]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_the_codes_numbers() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
    table = page.partition("## How much a request may ask for")[2].partition("\n## ")[0]
    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("| ")}

    def row(begins: str) -> str:
        (found,) = (text for what, text in rows.items() if what.startswith(begins))
        return found

    for begins, numbers in (
        ("calls at a time", [wire.MAX_STREAMS, wire.MAX_CALLS]),
        ("rows of a batch", [limits.MOST_ROWS]),
        ("tokens: rows", [limits.MOST_TOKENS]),
        ("copies of a row", [limits.MOST_COPIES]),
        ("a prompt", [limits.MOST_PROMPT_CHARACTERS]),
        ("messages of", [limits.MOST_CHAT_MESSAGES]),
        ("fields of", [limits.MOST_GENERATION_VALUES, limits.MOST_GENERATION_DEPTH]),
        ("`stop_strings`", [limits.MOST_STOP_STRINGS, limits.MOST_STOP_CHARACTERS]),
        ("`generator_state`", [generator_state.STATE_BYTES]),
        ("`bad_words_ids`", [limits.MOST_TOKEN_LISTS]),
        ("a model's name", [limits.MOST_NAME_CHARACTERS, limits.MOST_PATH_CHARACTERS, limits.MOST_WORD_CHARACTERS]),
        ("`timeout_s`", [int(limits.MOST_SECONDS)]),
        ("`config`", [limits.MOST_JSON_CHARACTERS]),
        ("entries of", [limits.MOST_MAP_ENTRIES]),
        ("`num_stages`", [limits.MOST_STAGES, limits.MOST_SESSIONS]),
        ("layers of", [MOST_LAYERS]),
        ("steps in a group", [MOST_GROUPED]),
        ("a safetensors header", [MAX_HEADER_BYTES]),
    ):
        assert [f"{number:,}" for number in numbers if f"{number:,}" not in row(begins)] == [], begins
    assert (wire.MAX_REQUEST_BYTES, wire.MAX_MESSAGE_BYTES) == (40 << 20, 4 << 20)
    # int64 ids and a mask of as many tokens as a request may have fit.
    assert wire.MAX_REQUEST_BYTES > 9 * limits.MOST_TOKENS
    assert wire.MAX_METADATA_BYTES == 16 << 10
    assert limits.MOST_RESERVED_TOKENS == 1 << 40
