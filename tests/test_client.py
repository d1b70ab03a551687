"""The client against a real gRPC server that plays scripted answers and takes no call that was not expected."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import pickle
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers

import shardlift
from shardlift.client import channel, hub_token, instance, jsonable, options, pushing
from shardlift.client.handle import RemoteCache, RemoteModel
from shardlift.client.values import LoadStarted, LoadWarning, ModelInfo, Plan, StagePlaced, StageProgress
from shardlift.proto.v1 import errors, generator_state, inference_pb2, limits, registry_pb2, status, wire
from shardlift.proto.v1.tensor_pb2 import Tensor
from tests.support.scripted_gateway import ScriptedGateway

CONFIG = transformers.LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=4, num_attention_heads=2)
DEFAULTS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "max_length": 20}

PLAN = registry_pb2.Plan(
    model="org/tiny",
    quantization="nf4+double",
    total_resident_bytes=300,
    total_fetch_bytes=1200,
    dtype="bfloat16",
    commit="abc123",
    stages=[
        registry_pb2.StagePlan(
            index=index,
            node="10.0.0.7",
            device=f"cuda:{index}",
            first_layer=2 * index,
            last_layer=2 * index + 1,
            resident_bytes=150,
            fetch_bytes=600,
            kv_bytes_per_token=64,
            capacity_bytes=1 << 30,
            modules=modules,
        )
        for index, modules in enumerate(
            [["model.embed_tokens", "model.layers.0", "model.layers.1"], ["model.layers.2", "lm_head"]]
        )
    ],
)


def model_info(generation: dict[str, Any] | None = None) -> registry_pb2.ModelInfo:
    return registry_pb2.ModelInfo(
        name="tiny",
        state=registry_pb2.MODEL_STATE_READY,
        plan=PLAN,
        residency=[
            registry_pb2.StageResidency(
                stage=index,
                measured_bytes=150 + index,
                fetched_bytes=600,
                modules=[
                    registry_pb2.ModuleResidency(
                        module=f"model.layers.{2 * index}.mlp.up_proj", dtype="nf4", bytes=70, device=f"cuda:{index}"
                    )
                ],
            )
            for index in range(2)
        ],
        config_json=json.dumps(CONFIG.to_dict()),
        generation_config_json=json.dumps(DEFAULTS if generation is None else generation),
        path="org/tiny",
        load_seconds=1.5,
    )


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDLIFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    for name in ("SHARDLIFT_ADDRESS", "SHARDLIFT_TOKEN", "RAY_ADDRESS", "RAY_JOB_ID", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as gateway:
        yield gateway


@pytest.fixture
def client(gateway: ScriptedGateway) -> Iterator[shardlift.Client]:
    # What is scripted to fail shall fail, not be waited for.
    with shardlift.connect(gateway.address, retry_s=0) as client:
        yield client


@pytest.fixture
def model(gateway: ScriptedGateway, client: shardlift.Client) -> RemoteModel:
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=model_info()))
    return client.model("tiny")


# Reaching a gateway


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", "host:50051"),
        ("host:7", "host:7"),
        (" 10.0.0.1 ", "10.0.0.1:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]:9", "[::1]:9"),
        ("[::1]", "[::1]:50051"),
        ("unix:/tmp/x", "unix:/tmp/x"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert channel.normalize(text) == address


@pytest.mark.parametrize("text", ["", "  ", "http://host", "host:", "host:no", "host:0", "host:65536", ":50051", "a b"])
def test_bad_addresses(text: str) -> None:
    if text == "host:":
        assert channel.normalize(text) == "host:50051"
        return
    with pytest.raises(errors.InvalidRequestError, match="host:port"):
        channel.normalize(text)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/x", True),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
        ("gateway:1", False),
    ],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert channel.is_loopback(address) is loopback


def test_a_dead_address_fails_soon_with_one_line() -> None:
    before = time.monotonic()
    with pytest.raises(errors.GatewayUnavailableError, match=r"127\.0\.0\.1:1 .*shardlift up") as caught:
        shardlift.connect("127.0.0.1:1", timeout_s=0.3)
    assert time.monotonic() - before < 5
    assert "\n" not in str(caught.value)


def test_no_address_and_no_instance() -> None:
    with pytest.raises(errors.GatewayUnavailableError, match="SHARDLIFT_ADDRESS"):
        shardlift.connect()


def test_address_from_the_environment(gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIFT_ADDRESS", gateway.address)
    gateway.answer("ListModels", registry_pb2.ListModelsResponse())
    with shardlift.connect() as client:
        assert client.address == gateway.address
        assert client.models() == []


def test_a_closed_client_says_so(gateway: ScriptedGateway) -> None:
    client = shardlift.connect(gateway.address)
    client.close()
    client.close()
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        client.models()


def test_a_gateway_that_went_away_is_found_again() -> None:
    with ScriptedGateway() as gateway:
        client = shardlift.connect(gateway.address, timeout_s=0.5, retry_s=0.5)
    with pytest.raises(errors.GatewayUnavailableError):
        client.models()
    with pytest.raises(errors.GatewayUnavailableError):
        client.models()
    client.close()


# The token


def test_token_travels_with_every_kind_of_call() -> None:
    with ScriptedGateway(token="secret") as gateway, shardlift.connect(gateway.address, token="secret") as client:
        gateway.answer("GetModel", registry_pb2.GetModelResponse(model=model_info()))
        model = client.model("tiny")
        gateway.answer("Generate", *answer([[7]]))
        model.generate([[1, 2]])
        gateway.answer(
            "Forward", inference_pb2.ForwardResponse(logits=wire.first_frame([0], "float32", memoryview(b"")))
        )
        model([[1, 2]])
        assert [call.metadata["authorization"] for call in gateway.calls] == ["Bearer secret"] * 3


def test_a_wrong_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIFT_TOKEN", "guess")
    with ScriptedGateway(token="secret") as gateway, shardlift.connect(gateway.address) as client:
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        with pytest.raises(errors.AuthenticationError) as caught:
            client.models()
        assert "guess" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_token_that_no_header_can_carry() -> None:
    with pytest.raises(errors.AuthenticationError) as caught:
        shardlift.connect("127.0.0.1:1", token="se\ncret")
    assert "cret" not in str(caught.value)


def test_a_token_of_the_environment_may_have_its_files_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Secret has that was made from a file; the gateway reads its own without."""
    monkeypatch.setenv("SHARDLIFT_TOKEN", "secret\n")
    with ScriptedGateway(token="secret") as gateway, shardlift.connect(gateway.address) as client:
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        assert client.models() == []


def test_address_and_token_of_the_local_instance(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    with ScriptedGateway(token="secret") as gateway:
        record_instance(gateway.address, token_file=str(tmp_path / "token"))
        gateway.answer("ListModels", registry_pb2.ListModelsResponse())
        with shardlift.connect() as client:
            assert client.models() == []


# Errors

ERRORS = sorted(status._CODES, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", ERRORS)
def test_errors_come_back_as_they_were(
    cls: type[errors.ShardliftError], gateway: ScriptedGateway, model: RemoteModel
) -> None:
    gateway.answer("GetModel", error=cls("what, how much, what to do"))
    with pytest.raises(errors.ShardliftError) as caught:
        model.info()
    assert type(caught.value) is cls
    assert str(caught.value) == "what, how much, what to do"
    gateway.answer("Generate", error=cls("in a stream"))
    with pytest.raises(cls, match="in a stream") as caught:
        model.generate([[1]])
    assert type(caught.value) is cls
    gateway.answer("Forward", error=cls("in two streams"))
    with pytest.raises(cls, match="in two streams") as caught:
        model([[1]])
    assert type(caught.value) is cls


def test_every_exception_of_the_tree_is_mapped() -> None:
    def below(cls: type[errors.ShardliftError]) -> Iterator[type[errors.ShardliftError]]:
        for sub in cls.__subclasses__():
            if sub.__module__ == errors.__name__:
                yield sub
                yield from below(sub)

    assert set(below(errors.ShardliftError)) == set(status._CODES)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.AuthenticationError),
        (grpc.StatusCode.UNAVAILABLE, errors.GatewayUnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.InvalidRequestError),
        (grpc.StatusCode.INTERNAL, errors.InternalError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_statuses_without_a_reason(
    code: grpc.StatusCode, cls: type[errors.ShardliftError], gateway: ScriptedGateway, client: shardlift.Client
) -> None:
    gateway.expect("ListModels", lambda request, context: context.abort(code, "some\nproxy"))
    with pytest.raises(cls) as caught:
        client.models()
    assert "\n" not in str(caught.value)


# The registry


def test_models(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    loading = registry_pb2.ModelInfo(name="next", state=registry_pb2.MODEL_STATE_LOADING)
    gateway.answer("ListModels", registry_pb2.ListModelsResponse(models=[model_info(), loading]))
    tiny, following = client.models()
    assert (tiny.name, following.name) == ("tiny", "next")
    assert repr(tiny) == f"RemoteModel('tiny' at {gateway.address}: org/tiny, nf4+double, 2 stages, ready)"


def test_what_a_handle_tells(gateway: ScriptedGateway, model: RemoteModel) -> None:
    assert gateway.calls[0].request == registry_pb2.GetModelRequest(name="tiny")
    assert model.name == "tiny"
    assert model.address == gateway.address
    assert model.dtype is torch.bfloat16
    assert model.device == torch.device("cpu")
    assert model.hf_device_map == {
        "model.embed_tokens": "10.0.0.7/cuda:0",
        "model.layers.0": "10.0.0.7/cuda:0",
        "model.layers.1": "10.0.0.7/cuda:0",
        "model.layers.2": "10.0.0.7/cuda:1",
        "lm_head": "10.0.0.7/cuda:1",
    }
    assert model.get_memory_footprint() == 301
    assert isinstance(model.config, transformers.LlamaConfig)
    # As from_pretrained leaves it: with the dtype that it was loaded in.
    assert model.config.to_dict() == CONFIG.to_dict() | {"dtype": "bfloat16"}
    assert isinstance(model.generation_config, transformers.GenerationConfig)
    assert model.generation_config.eos_token_id == 2
    assert model.eval() is model
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=model_info()))
    first, _ = model.residency()
    assert first.measured_bytes == 150
    assert first.modules["model.layers.0.mlp.up_proj"].to_dict() == {"dtype": "nf4", "bytes": 70, "device": "cuda:0"}


def test_an_unknown_architecture_keeps_its_values(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    info = model_info()
    info.config_json = json.dumps({"model_type": "of-tomorrow", "hidden_size": 8})
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=info))
    config = client.model("tiny").config
    assert type(config) is transformers.PreTrainedConfig
    assert config.hidden_size == 8


def test_unload(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("UnloadModel", registry_pb2.UnloadModelResponse())
    model.unload()
    assert gateway.calls[-1].request == registry_pb2.UnloadModelRequest(name="tiny")


def test_plan_has_the_contract_form(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    gateway.answer("PlanModel", registry_pb2.PlanModelResponse(plan=PLAN))
    plan = client.plan("org/tiny", num_stages=2, dtype=torch.bfloat16, revision="v1")
    assert plan.to_dict() == {
        "model": "org/tiny",
        "quantization": "nf4+double",
        "total_resident_bytes": 300,
        "total_fetch_bytes": 1200,
        "stages": [
            {
                "index": index,
                "node": "10.0.0.7",
                "device": f"cuda:{index}",
                "layers": [2 * index, 2 * index + 1],
                "resident_bytes": 150,
                "fetch_bytes": 600,
                "kv_bytes_per_token": 64,
                "capacity_bytes": 1 << 30,
                "workspace_bytes": 0,
                "kv_bytes": 0,
                "kv_budget_bytes": 0,
                "predicted_load_seconds": None,
            }
            for index in range(2)
        ],
        "kv_tokens": 0,
        "notes": [],
        "predicted_load_seconds": None,
        "load_bottleneck": None,
        "link_bytes_per_second": None,
    }
    asked = gateway.calls[0].request
    assert asked.source == registry_pb2.ModelSource(path="org/tiny", revision="v1")
    assert asked.options.num_stages == 2
    assert asked.options.dtype == "bfloat16"


def load_script() -> list[registry_pb2.LoadModelResponse]:
    reply = registry_pb2.LoadModelResponse
    return [
        reply(started=registry_pb2.LoadStarted(name="tiny", commit="abc123")),
        reply(planned=PLAN),
        reply(warning="the checkpoint's own quantization won"),
        reply(placed=registry_pb2.StagePlaced(stage=0, node="10.0.0.7", device="cuda:0")),
        reply(progress=registry_pb2.StageProgress(stage=0, fetched_bytes=600, fetch_bytes=600, tensors=3, done=True)),
        reply(),
        reply(ready=model_info()),
    ]


def test_load_tells_what_happens(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    gateway.answer("LoadModel", *load_script())
    events: list[Any] = []
    model = client.load("org/tiny", name="tiny", on_event=events.append)
    assert [type(event) for event in events] == [
        LoadStarted,
        Plan,
        LoadWarning,
        StagePlaced,
        StageProgress,
        ModelInfo,
    ]
    assert gateway.calls[0].request.name == "tiny"
    assert model.get_memory_footprint() == 301
    assert model.name == "tiny"


def test_a_load_that_fails(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    gateway.answer("LoadModel", load_script()[0], error=errors.OutOfMemoryError("cuda:0 has 1 GiB, 2 GiB are needed"))
    with pytest.raises(errors.OutOfMemoryError, match="2 GiB"):
        client.load("org/tiny")
    gateway.answer("LoadModel", load_script()[0])
    with pytest.raises(errors.InternalError, match="stopped before its end"):
        client.load("org/tiny")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_leaving_a_load_cancels_it(
    stop: type[BaseException], gateway: ScriptedGateway, client: shardlift.Client
) -> None:
    gateway.expect("LoadModel", forever(load_script()[0]))

    def on_event(event: Any) -> None:
        raise stop

    with pytest.raises(stop):
        client.load("org/tiny", on_event=on_event)
    assert gateway.calls[0].over.wait(10)
    assert gateway.calls[0].cancelled


# from_pretrained


def test_from_pretrained_sends_its_arguments(
    gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.answer("LoadModel", *[reply for reply in load_script() if not reply.warning])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    quantization = shardlift.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = shardlift.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        config=CONFIG,
        quantization_config=quantization,
        device_map={"model.layers.0": 0, "": torch.device("cpu"), "lm_head": "10.0.0.7/cuda:1"},
        max_memory={0: "20GiB", "cpu": 10**9},
        num_stages=3,
        dtype=torch.float16,
        subfolder="sub",
        variant="fp16",
        token="hf_explicit",
        trust_remote_code=True,
        attn_implementation="eager",
        quantize_experts=True,
        name="mine",
        address=gateway.address,
        low_cpu_mem_usage=True,
        use_safetensors=True,
        gguf_file=None,
        use_cache=False,
    )
    assert model.name == "tiny"
    asked = gateway.calls[0].request
    assert asked.name == "mine"
    assert asked.source == registry_pb2.ModelSource(
        path=str(tmp_path.resolve()),
        revision="main",
        subfolder="sub",
        variant="fp16",
        token="hf_explicit",
        hub_endpoint="http://127.0.0.1:9",
        trust_remote_code=True,
    )
    sent = asked.options
    assert dict(sent.device_map_by_module) == {"model.layers.0": "0", "": "cpu", "lm_head": "10.0.0.7/cuda:1"}
    assert dict(sent.max_memory) == {"0": "20GiB", "cpu": "1000000000"}
    assert (sent.num_stages, sent.dtype, sent.attn_implementation, sent.device_map) == (3, "float16", "eager", "")
    assert sent.quantize_experts
    assert json.loads(sent.config_overrides_json) == {"use_cache": False}
    assert json.loads(sent.config_json)["model_type"] == "llama"
    assert json.loads(sent.config_json)["hidden_size"] == 8
    assert json.loads(sent.quantization_config_json)["quant_method"] == "bitsandbytes"
    assert json.loads(sent.quantization_config_json)["bnb_4bit_compute_dtype"] == "bfloat16"
    model._gateway.close()


def test_from_pretrained_warns_as_the_gateway_does(gateway: ScriptedGateway) -> None:
    gateway.answer("LoadModel", *load_script())
    with pytest.warns(UserWarning, match="own quantization won") as caught:
        model = shardlift.AutoModelForCausalLM.from_pretrained("org/tiny", address=gateway.address)
    assert caught[0].filename == __file__
    model._gateway.close()


def test_from_pretrained_can_show_progress(gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answer("LoadModel", *load_script())
    model = shardlift.AutoModelForCausalLM.from_pretrained("org/tiny", address=gateway.address, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "stage 0 on 10.0.0.7/cuda:0: 600 B of 600 B" in err
    model._gateway.close()


def test_torch_dtype_is_deprecated() -> None:
    with pytest.warns(FutureWarning, match="`dtype`") as caught:
        assert options.load_options(torch_dtype=torch.bfloat16).dtype == "bfloat16"
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [("auto", "auto"), (None, ""), ("bfloat16", "bfloat16"), ("torch.float16", "float16"), (torch.float32, "float32")],
)
def test_dtypes(dtype: Any, sent: str) -> None:
    assert options.load_options(dtype=dtype).dtype == sent


@pytest.mark.parametrize("name", options.DEVICE_MAPS)
def test_device_map_names(name: str) -> None:
    sent = options.load_options(device_map=name)
    assert sent.device_map == name
    assert not sent.device_map_by_module


@pytest.mark.parametrize("device", ["cuda:1", 1, torch.device("cuda", 1)])
def test_device_map_of_one_device(device: Any) -> None:
    assert dict(options.load_options(device_map=device).device_map_by_module) == {"": str(device)}


@pytest.mark.parametrize(("chosen", "sent"), [(None, (False, False)), (True, (True, False)), (False, (False, True))])
def test_experts_are_quantized_left_or_decided_upon(chosen: bool | None, sent: tuple[bool, bool]) -> None:
    found = options.load_options(quantize_experts=chosen)
    assert (found.quantize_experts, found.without_quantized_experts) == sent
    assert not found.requantize
    assert not found.dequantize
    assert options.load_options(requantize=True).requantize
    assert options.load_options(dequantize=True).dequantize


def test_old_quantization_arguments() -> None:
    sent = options.load_options(load_in_4bit=True, bnb_4bit_quant_type="nf4", load_in_8bit=False)
    assert json.loads(sent.quantization_config_json) == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    assert not options.load_options(load_in_4bit=False).quantization_config_json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_4bit": True, "quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "not both"),
        ({"num_stages": 0}, "num_stages"),
        ({"num_stages": True}, "num_stages"),
        ({"dtype": 3}, "dtype"),
        ({"device_map": {"": 1.5}}, "device 1.5"),
        ({"device_map": True}, "device True"),
        ({"max_memory": {0: 1.5}}, "max_memory"),
        ({"max_memory": "20GiB"}, "max_memory"),
        ({"config": "./nowhere/config.json"}, "config './nowhere/config.json' can't be read"),
        ({"config": 3}, "config is a int"),
        ({"quantization_config": "nf4"}, "quantization_config is a str"),
        ({"use_safetensors": False}, "use_safetensors"),
        ({"gguf_file": "x.gguf"}, "gguf_file"),
        ({"state_dict": {"x": 1}}, "state_dict"),
        ({"adapter_kwargs": {"proxies": {"https": "x"}}}, "adapter_kwargs proxies"),
        ({"hidden_act": torch.nn.functional.gelu}, "hidden_act"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message):
        options.load_options(**arguments)


def test_adapter_kwargs_say_where_the_adapter_is() -> None:
    sent = options.load_options(adapter_kwargs={"revision": "v2", "subfolder": "lora", "token": "t", "proxies": None})
    assert (sent.adapter.revision, sent.adapter.subfolder, sent.adapter.token) == ("v2", "lora", "t")
    assert not options.load_options(adapter_kwargs={}).HasField("adapter")


def test_a_local_folder_is_sent_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert options.source("org/name").path == str(tmp_path / "org" / "name")
    assert options.source("org/other").path == "org/other"
    assert options.source("s3://bucket/prefix").path == "s3://bucket/prefix"
    with pytest.raises(errors.InvalidRequestError, match="empty"):
        options.source("")


def test_jsonable() -> None:
    struct = jsonable.to_struct(
        {"a": (1, 2.5), "b": {1: None}, "c": np.int64(3), "d": torch.float16, "e": torch.arange(2)}, "x"
    )
    assert struct["d"] == "float16"
    assert list(struct["a"]) == [1, 2.5]
    assert struct["b"]["1"] is None
    assert struct["c"] == 3
    assert list(struct["e"]) == [0, 1]
    with pytest.raises(errors.InvalidRequestError, match=r"x\['a'\] is a Tensor"):
        jsonable.to_struct({"a": torch.zeros(2)}, "x")


# The Hub token


@pytest.mark.filterwarnings("ignore:the Hub token goes to 10.0.0.1")
@pytest.mark.parametrize(
    ("token", "address", "sent"),
    [
        ("hf_mine", "10.0.0.1:1", "hf_mine"),
        ("hf_mine", "127.0.0.1:1", "hf_mine"),
        (None, "10.0.0.1:1", None),
        (None, "127.0.0.1:1", "hf_ambient"),
        (True, "127.0.0.1:1", "hf_ambient"),
        (False, "127.0.0.1:1", None),
        # As it was read from a file.
        ("hf_mine\n", "127.0.0.1:1", "hf_mine"),
        (" \n", "127.0.0.1:1", None),
    ],
)
def test_hub_token(token: Any, address: str, sent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    assert hub_token.hub_token(token, address) == sent


@pytest.mark.parametrize("token", ["hf_my\nsecret", "hf_mysecr\u200bet"])
def test_a_hub_token_that_no_header_can_carry_is_told_nowhere(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.InvalidRequestError, match="characters that a header can't carry") as caught:
        hub_token.hub_token(token, "127.0.0.1:1")
    assert "hf_my" not in str(caught.value)
    # Whoever speaks to the gateway otherwise is refused there.
    with pytest.raises(errors.InvalidRequestError, match="characters that a header can't carry") as caught:
        limits.check_source(registry_pb2.ModelSource(path="org/name", token=token))
    assert "hf_my" not in str(caught.value)
    with pytest.raises(errors.InvalidRequestError, match="characters that a header can't carry"):
        pushing.push_folder("folder", [], "org/name", older=[], token=token)


def test_hub_token_never_travels_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    with pytest.raises(errors.InvalidRequestError) as caught:
        hub_token.hub_token(True, "10.0.0.1:1")
    assert "hf_ambient" not in str(caught.value)


# Generate


def answer(
    rows: list[list[int]], batch: int | None = None, prompt_tokens: int = 2, reason: str = "stop"
) -> list[inference_pb2.GenerateResponse]:
    """The answer that gives each row of `rows` its tokens, a step at a time."""
    reply = inference_pb2.GenerateResponse
    steps = list(zip(*rows, strict=True))
    return [
        reply(accepted=inference_pb2.PromptAccepted(batch=batch or len(rows), prompt_tokens=prompt_tokens)),
        *(reply(step=inference_pb2.GeneratedStep(token_ids=step)) for step in steps),
        reply(finished=inference_pb2.GenerationFinished(new_tokens=len(steps), reason=reason)),
    ]


def forever(*replies: Any) -> Any:
    def play(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from replies
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)

    return play


@pytest.mark.parametrize("kind", ["tensor", "numpy", "list", "int32", "kwarg"])
def test_generate(kind: str, gateway: ScriptedGateway, model: RemoteModel) -> None:
    ids = [[0, 5, 6], [7, 8, 9]]
    mask = [[0, 1, 1], [1, 1, 1]]
    given: Any = {
        "tensor": torch.tensor(ids),
        "kwarg": torch.tensor(ids),
        "numpy": np.array(ids),
        "list": ids,
        "int32": torch.tensor(ids, dtype=torch.int32),
    }[kind]
    gateway.answer("Generate", *answer([[11, 12], [13, 0]]))
    arguments = {"attention_mask": torch.tensor(mask), "max_new_tokens": 2, "token_type_ids": torch.zeros(2, 3)}
    sequences = model.generate(**{"input_ids" if kind == "kwarg" else "inputs": given}, **arguments)
    assert isinstance(sequences, torch.Tensor)
    assert sequences.dtype is torch.long
    assert sequences.tolist() == [[0, 5, 6, 11, 12], [7, 8, 9, 13, 0]]
    asked = gateway.calls[-1].request
    assert asked.model == "tiny"
    assert asked.input_ids == Tensor(shape=[2, 3], dtype="int64", data=torch.tensor(ids).numpy().tobytes())
    assert asked.attention_mask == Tensor(shape=[2, 3], dtype="bool", data=bytes([0, 1, 1, 1, 1, 1]))
    assert dict(asked.generation) == {"max_new_tokens": 2}
    assert not asked.HasField("seed")
    assert not asked.output_logits


def test_num_return_sequences_repeat_the_prompt(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3], [4], [5], [6]]))
    sequences = model.generate([[1, 2], [7, 8]], num_return_sequences=2, do_sample=True, seed=1)
    assert sequences.tolist() == [[1, 2, 3], [1, 2, 4], [7, 8, 5], [7, 8, 6]]


def test_no_new_tokens(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[]]))
    assert model.generate([[1, 2]]).tolist() == [[1, 2]]


def test_no_ids_start_from_bos(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[5]], prompt_tokens=1))
    assert model.generate().tolist() == [[1, 5]]


def test_torchs_generator_goes_there_and_back(gateway: ScriptedGateway, model: RemoteModel) -> None:
    left = torch.Generator().manual_seed(6)
    torch.rand(3, generator=left)
    torch.manual_seed(5)
    before = generator_state.taken_from(torch.default_generator)
    *told, finished = answer([[3]])
    finished.finished.generator_state = generator_state.taken_from(left)
    gateway.answer("Generate", *told, finished)
    model.generate([[1, 2]], do_sample=True)
    assert gateway.calls[-1].request.generator_state == before
    assert not gateway.calls[-1].request.HasField("seed")
    assert torch.equal(torch.get_rng_state(), left.get_state())
    # Where the answer breaks off behind a token, what was drawn is not drawn once more.
    gateway.answer("Generate", *told, error=errors.ModelUnavailableError("stage 1 is gone"))
    with pytest.raises(errors.ModelUnavailableError):
        model.generate([[1, 2]], do_sample=True)
    assert not torch.equal(torch.get_rng_state(), left.get_state())


def test_greedy_leaves_torchs_generator_alone(gateway: ScriptedGateway, model: RemoteModel) -> None:
    before = torch.get_rng_state()
    gateway.answer("Generate", *answer([[3]]))
    model.generate([[1, 2]])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_explicit_seed_is_sent(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3]]))
    model.generate([[1, 2]], seed=2**64 - 1)
    assert gateway.calls[-1].request.seed == 2**64 - 1
    with pytest.raises(errors.InvalidRequestError, match="seed"):
        model.generate([[1, 2]], seed=-1)


def test_sampling_by_the_models_own_config_is_seeded(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    info = model_info({**DEFAULTS, "do_sample": True})
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=info))
    gateway.answer("Generate", *answer([[3]]))
    client.model("tiny").generate([[1, 2]])
    assert gateway.calls[-1].request.generator_state


def test_generation_config_argument_and_changes(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3]]))
    given = transformers.GenerationConfig(max_new_tokens=4, temperature=0.5, do_sample=False)
    model.generate([[1, 2]], given, max_new_tokens=1)
    assert dict(gateway.calls[-1].request.generation) == {"max_new_tokens": 1, "temperature": 0.5, "do_sample": False}
    model.generation_config.pad_token_id = 9
    model.generation_config.max_length = None
    gateway.answer("Generate", *answer([[3]]))
    model.generate([[1, 2]], max_new_tokens=1)
    assert dict(gateway.calls[-1].request.generation) == {"max_new_tokens": 1, "pad_token_id": 9, "max_length": None}


def test_sequence_bias_goes_in_its_json_form(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3]]))
    model.generate([[1, 2]], sequence_bias={(4, 5): -10.0})
    ((ids, bias),) = gateway.calls[-1].request.generation["sequence_bias"]
    assert (list(ids), bias) == ([4, 5], -10.0)


def test_stop_strings_are_the_workers_to_find(gateway: ScriptedGateway, model: RemoteModel) -> None:
    """They have the checkpoint's tokenizer, so the one that transformers wants to be given stays here."""
    gateway.answer("Generate", *answer([[3]]))
    model.generate([[1, 2]], stop_strings=["Human:"], tokenizer=Words())
    assert list(gateway.calls[-1].request.generation["stop_strings"]) == ["Human:"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 8)}, "inputs_embeds"),
        ({"labels": [[1, 2]]}, "labels"),
        ({"past_key_values": transformers.DynamicCache()}, "DynamicCache"),
        ({"bad_words_ids": torch.zeros(1, 2)}, "bad_words_ids is a Tensor"),
        ({"max_new_token": 3}, "max_new_token"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"attention_mask": [[1]]}, "attention_mask has shape"),
        ({"input_ids": [[1]]}, "same thing"),
    ],
)
def test_generate_refuses(arguments: dict[str, Any], message: str, model: RemoteModel) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message):
        model.generate([[1, 2]], **arguments)


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        [],
        [[1], [2, 3]],
        [[1.5]],
        [["a"]],
        [[2**63]],
        "text",
        torch.tensor([1, 2]),
        torch.tensor([[1.0]]),
        torch.ones(1, 2, dtype=torch.bfloat16),
        np.ones((1, 2)),
        object(),
    ],
)
def test_generate_refuses_ids(ids: Any, model: RemoteModel) -> None:
    with pytest.raises(errors.InvalidRequestError, match="input_ids"):
        model.generate(ids)


def test_a_prompt_too_large_for_a_message_is_refused_here(model: RemoteModel) -> None:
    with pytest.raises(errors.InvalidRequestError, match="over the limit"):
        model.generate(torch.ones(640, 10_000, dtype=torch.long))


def test_logits_and_scores_larger_than_a_message(gateway: ScriptedGateway, model: RemoteModel) -> None:
    vocabulary = 700_000  # 2.8 MB in float32: three frames
    logits_bv = torch.randn(2, vocabulary)
    scores_bv = torch.randn(2, vocabulary)

    def play(request: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        accepted, _, finished = answer([[3], [4]])
        heads, rest = [], []
        for tensor in (logits_bv, scores_bv):
            data = memoryview(tensor.numpy()).cast("B")
            heads.append(wire.first_frame([2, vocabulary], "float32", data))
            rest += map(bytes, wire.later_frames(data))
        yield accepted
        step = inference_pb2.GeneratedStep(token_ids=[3, 4], logits=heads[0], scores=heads[1])
        yield inference_pb2.GenerateResponse(step=step)
        for more in rest:
            yield inference_pb2.GenerateResponse(more=more)
        yield finished

    gateway.expect("Generate", play)
    output = model.generate(
        [[1, 2], [1, 2]], return_dict_in_generate=True, output_logits=True, output_scores=True, max_new_tokens=1
    )
    assert isinstance(output, transformers.generation.utils.GenerateDecoderOnlyOutput)
    assert output.sequences.tolist() == [[1, 2, 3], [1, 2, 4]]
    assert torch.equal(output.logits[0], logits_bv)
    assert torch.equal(output.scores[0], scores_bv)
    asked = gateway.calls[-1].request
    assert asked.output_logits
    assert asked.output_scores
    assert dict(asked.generation) == {"max_new_tokens": 1}


def test_return_dict_without_logits(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3]]))
    output = model.generate([[1, 2]], return_dict_in_generate=True)
    assert output.sequences.tolist() == [[1, 2, 3]]
    assert output.logits is None
    assert output.scores is None
    gateway.answer("Generate", *answer([[3]]))
    assert isinstance(model.generate([[1, 2]], output_logits=True), torch.Tensor)
    assert not gateway.calls[-1].request.output_logits


@pytest.mark.parametrize(
    "replies",
    [
        [],
        answer([[3]])[1:],
        answer([[3]])[:-1],
        [*answer([[3]]), answer([[3]])[1]],
        [answer([[3]])[0], inference_pb2.GenerateResponse(more=b"1")],
        [
            answer([[3]])[0],
            inference_pb2.GenerateResponse(
                step=inference_pb2.GeneratedStep(
                    token_ids=[3], logits=Tensor(shape=[1, 2], dtype="float32", data=b"1234")
                )
            ),
        ],
    ],
    ids=["nothing", "no start", "no end", "after the end", "stray frame", "missing frame"],
)
def test_answers_that_break_the_protocol(replies: Any, gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *replies)
    with pytest.raises(errors.InternalError, match="the gateway"):
        model.generate([[1, 2]])


class Recorder:
    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_what_transformers_gives_it(gateway: ScriptedGateway, model: RemoteModel) -> None:
    """transformers' own generate is the oracle: the same calls, in shape, dtype and order."""
    local = transformers.LlamaForCausalLM(CONFIG).eval()
    ids = torch.tensor([[1, 5]])
    oracle, ours = Recorder(), Recorder()
    expected = local.generate(
        ids, max_new_tokens=3, do_sample=False, streamer=oracle, eos_token_id=None, pad_token_id=0
    )
    gateway.answer("Generate", *answer(expected[:, 2:].tolist()))
    actual = model.generate(ids, max_new_tokens=3, streamer=ours)
    assert torch.equal(actual, expected)
    assert [(put.dtype, put.shape, put.tolist()) for put in ours.puts] == [
        (put.dtype, put.shape, put.tolist()) for put in oracle.puts
    ]
    assert (ours.ended, oracle.ended) == (1, 1)


class Words:
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"w{token} " for token in ids)


def test_text_streamers(gateway: ScriptedGateway, model: RemoteModel, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answer("Generate", *answer([[11, 12]]))
    model.generate([[1, 2]], streamer=transformers.TextStreamer(Words()))
    assert capsys.readouterr().out == "w1 w2 w11 w12 \n"
    gateway.answer("Generate", *answer([[11, 12]]))
    streamer = transformers.TextIteratorStreamer(Words(), skip_prompt=True, timeout=10)
    thread = threading.Thread(target=model.generate, args=([[1, 2]],), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == "w11 w12 "
    thread.join()


def test_a_failure_ends_the_streamer(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3]])[:2], error=errors.ModelUnavailableError("stage 1 is gone"))
    streamer = Recorder()
    with pytest.raises(errors.ModelUnavailableError):
        model.generate([[1, 2]], streamer=streamer)
    assert streamer.ended == 1
    assert len(streamer.puts) == 2


def test_text_streamer_refuses_a_batch(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.expect("Generate", forever(*answer([[3], [4]])[:1]))
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate([[1, 2], [1, 2]], streamer=transformers.TextStreamer(Words()))
    assert gateway.calls[-1].over.wait(10)
    assert gateway.calls[-1].cancelled


def test_an_interrupt_cancels_the_call(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.expect("Generate", forever(*answer([[3, 4]])[:2]))

    class Interrupting(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.puts) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([[1, 2]], streamer=Interrupting())
    assert gateway.calls[-1].over.wait(10)
    assert gateway.calls[-1].cancelled


def test_stream(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *answer([[3, 4], [5, 0]], reason="length"))
    with model.stream([[1, 2], [1, 2]], max_new_tokens=2) as running:
        assert [step.token_ids for step in running] == [[3, 5], [4, 0]]
    assert (running.batch, running.prompt_tokens, running.new_tokens) == (2, 2, 2)
    assert running.finish_reason == "length"
    assert list(running) == []


def test_leaving_a_stream_cancels_it(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.expect("Generate", forever(*answer([[3, 4]])[:2]))
    for step in model.stream([[1, 2]]):
        assert step.token_ids == [3]
        break
    assert gateway.calls[-1].over.wait(10)
    assert gateway.calls[-1].cancelled


def text_answer(*pieces: str) -> list[inference_pb2.GenerateResponse]:
    reply = inference_pb2.GenerateResponse
    return [
        reply(accepted=inference_pb2.PromptAccepted(batch=1, prompt_tokens=2, prompt_ids=[1, 2])),
        *(reply(step=inference_pb2.GeneratedStep(token_ids=[9], text=piece)) for piece in pieces),
        reply(finished=inference_pb2.GenerationFinished(new_tokens=len(pieces), reason="stop")),
    ]


def test_stream_text(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Generate", *text_answer("Hel", "", "lo"))
    assert list(model.stream_text("Say it", temperature=0.5)) == ["Hel", "lo"]
    assert gateway.calls[-1].request.prompt == "Say it"
    assert dict(gateway.calls[-1].request.generation) == {"temperature": 0.5}
    gateway.answer("Generate", *text_answer("Hi"))
    assert list(model.stream_text([{"role": "user", "content": "Hello"}])) == ["Hi"]
    assert gateway.calls[-1].request.conversation == inference_pb2.Conversation(
        messages=[inference_pb2.ChatMessage(role="user", content="Hello")]
    )
    with pytest.raises(errors.InvalidRequestError, match="role and content"):
        list(model.stream_text([{"text": "Hello"}]))


# Forward


def forward_reply(tensor: torch.Tensor) -> Iterator[inference_pb2.ForwardResponse]:
    data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    dtype = str(tensor.dtype).removeprefix("torch.")
    yield inference_pb2.ForwardResponse(logits=wire.first_frame(list(tensor.shape), dtype, data))
    for more in wire.later_frames(data):
        yield inference_pb2.ForwardResponse(more=bytes(more))


def test_forward_is_exact_to_the_bit(gateway: ScriptedGateway, model: RemoteModel) -> None:
    # Every bit pattern of bfloat16, NaNs and all, in three frames and a bit.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    logits_btv = patterns.repeat(25)[: 1 * 3 * 500_000].view(torch.bfloat16).reshape(1, 3, 500_000)
    asked: list[inference_pb2.ForwardRequest] = []

    def play(requests: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.ForwardResponse]:
        asked.extend(requests)  # ends: a pass without a cache leaves no session
        yield from forward_reply(logits_btv)

    gateway.expect("Forward", play)
    output = model(
        torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1]]), position_ids=[[0, 0, 1]], logits_to_keep=3
    )
    assert isinstance(output, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert output.logits.dtype is torch.bfloat16
    assert torch.equal(output.logits.view(torch.int16), logits_btv.view(torch.int16))
    assert output.past_key_values is None
    (request,) = asked
    assert (request.model, request.logits_to_keep, request.use_cache) == ("tiny", 3, False)
    assert request.attention_mask.data == bytes([0, 1, 1])
    assert list(request.position_ids.shape) == [1, 3]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "bool"])
def test_forward_dtypes(dtype: str, gateway: ScriptedGateway, model: RemoteModel) -> None:
    logits = torch.tensor([[[1, 0, 1]]]).to(getattr(torch, dtype))
    gateway.answer("Forward", *forward_reply(logits))
    output = model.forward([[1]], return_dict=False)
    assert torch.equal(output[0], logits)


def test_forward_of_nothing(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Forward", *forward_reply(torch.zeros(1, 0, 32)))
    assert model(torch.zeros(1, 0, dtype=torch.long)).logits.shape == (1, 0, 32)


def session_reply(
    tensor: torch.Tensor, length: int, rows: int | None = None
) -> Iterator[inference_pb2.SessionResponse]:
    """The answer to a pass after which the session holds `length` positions."""
    for part in forward_reply(tensor):
        yield inference_pb2.SessionResponse(forward=part)
    yield inference_pb2.SessionResponse(
        done=inference_pb2.SessionState(length=length, rows=len(tensor) if rows is None else rows)
    )


def test_a_cache_is_one_call(gateway: ScriptedGateway, model: RemoteModel) -> None:
    asked: list[inference_pb2.SessionRequest] = []

    def play(requests: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.SessionResponse]:
        length = 0
        for request in requests:
            asked.append(request)
            new = request.forward.input_ids.shape[1]
            length += new
            yield from session_reply(torch.full((1, new, 4), float(len(asked))), length)

    gateway.expect("Session", play)
    first = model([[1, 2, 3]], use_cache=True)
    cache = first.past_key_values
    assert isinstance(cache, RemoteCache)
    assert cache.get_seq_length() == 3
    second = model([[4]], attention_mask=[[1, 1, 1, 1]], past_key_values=cache, use_cache=True)
    assert second.past_key_values is cache
    assert cache.get_seq_length() == 4
    assert second.logits.tolist() == [[[2.0] * 4]]
    third = model([[5]], past_key_values=cache, use_cache=False)
    assert third.past_key_values is None
    assert cache.get_seq_length() == 5
    assert [request.model for request in asked] == ["tiny", "", ""]
    assert not any(request.HasField("keep") or request.rows for request in asked)
    assert len(gateway.calls) == 2
    cache.close()
    cache.close()
    assert gateway.calls[-1].over.wait(10)
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        model([[6]], past_key_values=cache)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(cache)


def test_a_forgotten_cache_is_freed(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.expect("Session", forever(*session_reply(torch.zeros(1, 1, 4), 1)))
    output = model([[1]], use_cache=True)
    assert not gateway.calls[-1].over.is_set()
    del output
    gc.collect()
    assert gateway.calls[-1].over.wait(10)


def test_a_failed_pass_closes_its_cache(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Session", *session_reply(torch.zeros(1, 1, 4), 1), error=errors.ModelUnavailableError("gone"))
    cache = model([[1]], use_cache=True).past_key_values
    with pytest.raises(errors.ModelUnavailableError):
        model([[2]], past_key_values=cache)
    assert cache.closed


def pass_recorder(asked: list[tuple[int | None, list[int]]]) -> Any:
    """Answers passes, and takes down what each was to do before."""

    def play(requests: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.SessionResponse]:
        length = 0
        for request in requests:
            asked.append((request.keep if request.HasField("keep") else None, list(request.rows)))
            rows, new = request.forward.input_ids.shape
            length = (request.keep if request.HasField("keep") else length) + new
            yield from session_reply(torch.zeros(rows, new, 4), length)

    return play


def test_what_is_done_to_a_cache_is_done_before_the_next_pass(gateway: ScriptedGateway, model: RemoteModel) -> None:
    asked: list[tuple[int | None, list[int]]] = []
    gateway.expect("Session", pass_recorder(asked))
    cache = RemoteCache(model._gateway, "tiny")
    assert (cache.get_seq_length(), cache.get_max_length(), cache.batch_size) == (0, -1, -1)
    assert not cache.is_compileable
    cache.reorder_cache(torch.tensor([1, 0]))  # of an empty cache, as transformers': nothing
    cache.activate_past_recording()
    model([[1, 2, 3], [4, 5, 6]], past_key_values=cache)
    assert (cache.get_seq_length(), cache.batch_size) == (3, 2)
    cache.crop(0)
    cache.crop(-1)
    cache.crop(5)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)  # 1 1 0 0
    cache.batch_select_indices(torch.tensor([0, 2, 3]))  # 1 0 0
    assert (cache.get_seq_length(), cache.batch_size) == (2, 3)
    with pytest.raises(errors.InvalidRequestError, match="3 rows"):
        model([[7]], past_key_values=cache)
    model([[7], [8], [9]], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([False, True, False]))
    cache.crop(1)  # as older versions of transformers: to this length
    model([[7]], past_key_values=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
    model([[7], [8]], past_key_values=cache)
    with pytest.raises(errors.InvalidRequestError, match="rows"):
        cache.reorder_cache([2])
    assert asked == [(None, []), (2, [1, 0, 0]), (1, [1]), (0, [])]
    cache.close()


@pytest.mark.parametrize(
    "replies",
    [
        [],
        [inference_pb2.SessionResponse()],
        [inference_pb2.SessionResponse(done=inference_pb2.SessionState(length=1, rows=1))],
        list(session_reply(torch.zeros(1, 1, 4), 2)),
        list(session_reply(torch.zeros(1, 1, 4), 1, rows=2)),
        list(session_reply(torch.zeros(1, 1, 4), 1))[:-1],
    ],
    ids=["nothing", "unknown", "no logits", "another length", "other rows", "no end"],
)
def test_sessions_that_break_the_protocol(replies: Any, gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Session", *replies)
    with pytest.raises(errors.InternalError):
        model([[1]], use_cache=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 2, 8)}, "inputs_embeds"),
        ({"past_key_values": transformers.DynamicCache()}, "DynamicCache"),
        ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_forward_refuses(arguments: dict[str, Any], message: str, model: RemoteModel) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message):
        model([[1, 2]], **arguments)


def test_forward_ignores_what_asks_for_nothing(gateway: ScriptedGateway, model: RemoteModel) -> None:
    gateway.answer("Forward", *forward_reply(torch.zeros(1, 1, 4)))
    model(input_ids=[[1]], labels=None, output_attentions=False, token_type_ids=torch.zeros(1, 1))


# Pickling


def test_a_pickled_handle_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway(token="very-secret") as gateway:
        gateway.answer("GetModel", registry_pb2.GetModelResponse(model=model_info()))
        with shardlift.connect(gateway.address, token="very-secret") as client:
            packed = pickle.dumps(client.model("tiny"))
        assert b"very-secret" not in packed
        monkeypatch.setenv("SHARDLIFT_TOKEN", "very-secret")
        model = pickle.loads(packed)
        assert repr(model) == f"RemoteModel('tiny' at {gateway.address})"
        gateway.answer("GetModel", registry_pb2.GetModelResponse(model=model_info()))
        assert model.dtype is torch.bfloat16
        gateway.answer("Generate", *answer([[3]]))
        assert model.generate([[1, 2]]).tolist() == [[1, 2, 3]]
        model._gateway.close()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_handle_keeps_its_connection_and_changes(
    copied: Any, gateway: ScriptedGateway, model: RemoteModel
) -> None:
    gateway.answer("Generate", *answer([[3]]))
    model.generate([[1, 2]])
    model.generation_config.pad_token_id = 9
    twin = copied(model)
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=model_info()))
    gateway.answer("Generate", *answer([[3]]))
    assert twin.generate([[1, 2]]).tolist() == [[1, 2, 3]]
    assert dict(gateway.calls[-1].request.generation) == {"pad_token_id": 9}
    restored = pickle.loads(pickle.dumps(model))
    assert (restored.name, restored.generation_config.pad_token_id) == ("tiny", 9)
    restored._gateway.close()


def test_a_client_pickles_to_its_address(gateway: ScriptedGateway, client: shardlift.Client) -> None:
    gateway.answer("ListModels", registry_pb2.ListModelsResponse())
    with pickle.loads(pickle.dumps(client)) as restored:
        assert restored.models() == []
    twin = copy.deepcopy(client)
    gateway.answer("ListModels", registry_pb2.ListModelsResponse())
    assert twin.models() == []


# The local instance


def record_instance(address: str, pid: int | None = None, token_file: str | None = None) -> Path:
    path = instance.home() / "instance.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"address": address, "pid": pid, "ray_address": None, "token_file": token_file}))
    return path


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Has the client run `script` where it would run Python on cluster/; its arguments end up in the file returned."""
    program, arguments = tmp_path / "python", tmp_path / "arguments"
    program.write_text(f'#!/bin/sh\necho "$@" >> {arguments}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(instance.sys, "executable", str(program))
    return arguments


def test_a_stale_instance_is_forgotten() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    path = record_instance("127.0.0.1:1", pid=ended.pid)
    assert instance.find() is None
    assert not path.exists()


def test_a_clusters_gateway_that_is_restarted_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no process here that could be seen to be gone. What is asked meanwhile names it, and starts no other."""
    with ScriptedGateway() as gateway:
        ready = json.dumps({"address": gateway.address, "ray_address": "a:1"})
        arguments = fake_python(tmp_path, monkeypatch, f"echo '{ready}'")
        path = record_instance("127.0.0.1:1")
        assert instance.find() is None
        assert path.exists()
        with pytest.raises(errors.GatewayUnavailableError, match=r"no gateway answers at 127\.0\.0\.1:1"):
            shardlift.connect(timeout_s=0.2)
        with pytest.raises(errors.GatewayUnavailableError, match="shardlift down"):
            instance.find_or_start()
        assert not arguments.exists(), "no other was started"
        # Whoever names the cluster joins it anew, and whoever asks for its end forgets it.
        assert instance.start(ray_address="a:1").address == gateway.address
        assert instance.find() is not None
        record_instance("127.0.0.1:1")
        assert instance.stop() is not None
        assert not path.exists()


def test_what_runs_is_not_taken_for_what_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with ScriptedGateway() as gateway:
        path = record_instance(gateway.address)
        assert instance.start(host="127.0.0.1", port=int(gateway.address.rpartition(":")[2])).address == gateway.address
        assert instance.start(page_port="off").page is None
        for options, what in (
            ({"host": "0.0.0.0"}, "another host"),
            ({"port": 1, "host": "::1"}, "another host and another port"),
            ({"page_port": "8080"}, "another port of the page"),
            ({"tls_cert": "x"}, "other flags for TLS"),
        ):
            with pytest.raises(errors.InvalidRequestError, match=f"`shardlift down` before {what}"):
                instance.start(**options)  # type: ignore[arg-type]
        monkeypatch.setenv("SHARDLIFT_TOKEN", "mine")
        with pytest.raises(errors.InvalidRequestError, match="before another token"):
            instance.start()
        assert instance.find_or_start().address == gateway.address, "there it is what this client sends"
        token = tmp_path / "token"
        for kept, same in (("mine", True), ("another", False)):
            token.write_text(kept)
            record_instance(gateway.address, token_file=str(token))
            if same:
                assert instance.start().token == "mine"
                continue
            with pytest.raises(errors.InvalidRequestError, match="before another token") as refused:
                instance.start()
            assert kept not in str(refused.value).replace("another token", "")
        assert path.exists()


def test_a_clusters_gateway_is_stopped_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"address": "10.0.0.1:50051", "ray_address": "10.0.0.1:6379"})
    arguments = fake_python(tmp_path, monkeypatch, f"echo '{said}'")
    assert instance.stop_on("auto") == "10.0.0.1:50051"
    assert arguments.read_text() == "-m shardlift.cluster.down --json --ray-address auto\n"
    path = record_instance("10.0.0.1:50051")
    instance.stop_on("auto")
    assert path.exists(), "another cluster's"
    path.write_text(json.dumps({"address": "10.0.0.1:50051", "pid": None, "ray_address": "10.0.0.1:6379"}))
    instance.stop_on("auto")
    assert not path.exists()
    fake_python(tmp_path, monkeypatch, """echo '{"address": null, "ray_address": "10.0.0.1:6379"}'""")
    assert instance.stop_on("auto") is None
    absent = json.dumps({"error": "GatewayUnavailableError", "message": "no Ray cluster answers at auto"})
    fake_python(tmp_path, monkeypatch, f"echo '{absent}'; exit 1")
    with pytest.raises(errors.GatewayUnavailableError, match="no Ray cluster answers"):
        instance.stop_on("auto")


def test_a_garbled_instance_file_is_no_instance() -> None:
    record_instance("127.0.0.1:1").write_text("{")
    assert instance.find() is None


def test_start_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway() as gateway:
        ready = json.dumps({"address": gateway.address, "pid": None, "ray_address": "a:1", "token_file": None})
        arguments = fake_python(tmp_path, monkeypatch, f"echo noise; echo '{ready}'")
        started = instance.start(port=50051, num_cpus=2)
        assert started == instance.Instance(address=gateway.address, ray_address="a:1")
        assert arguments.read_text() == "-m shardlift.cluster.up --json --port 50051 --num-cpus 2\n"
        assert instance.start() == started  # it is up already
        assert instance.find_or_start() == started
        with pytest.raises(errors.InvalidRequestError, match="already runs"):
            instance.start(port=1)
        with shardlift.connect() as client:
            assert client.address == gateway.address
        assert instance.stop() == started
        assert arguments.read_text().splitlines()[1:] == ["-m shardlift.cluster.down --json"]
        assert instance.find() is None
        assert instance.stop() is None


def test_a_gateway_that_is_kept_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_WATCH_S", "_RETRY_S"):
        monkeypatch.setattr(instance, name, 0.01)
    told: list[Any] = []
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(ScriptedGateway())
        absent = json.dumps({"error": "GatewayUnavailableError", "message": "no Ray cluster answers at a:1"})
        ready = json.dumps({"address": gateway.address, "ray_address": "a:1"})
        taken = json.dumps({"error": "InvalidRequestError", "message": "port 50051 is taken"})
        said = tmp_path / "said"
        said.write_text("\n".join([absent, ready, taken, ready]) + "\n")
        script = f"head -n 1 {said}; sed -i 1d {said}"
        arguments = fake_python(tmp_path, monkeypatch, script)

        def tell(what: Any) -> None:
            told.append(what)
            if len(told) == 2:
                stack.close()  # it has gone
            elif len(told) == 4:
                raise KeyboardInterrupt  # as Ctrl-C and SIGTERM do, at any moment

        instance.keep(tell, ray_address="a:1")
    unavailable, first, refused, again = told
    assert isinstance(unavailable, errors.GatewayUnavailableError)
    assert isinstance(refused, errors.InvalidRequestError), "what was up once is worth another try"
    assert first == again == instance.Instance(address=gateway.address, ray_address="a:1")
    up = "-m shardlift.cluster.up --json --ray-address a:1"
    assert arguments.read_text().splitlines() == [up, up, up, up, "-m shardlift.cluster.down --json"]
    assert instance.recorded() is None


def test_the_log_of_a_gateway_that_is_kept_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "_WATCH_S", 0.01)
    log = instance.home() / "gateway.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("of another day\n")
    lines: list[str] = []
    with ScriptedGateway() as gateway:
        ready = json.dumps({"address": gateway.address, "ray_address": "a:1", "log_file": str(log)})
        fake_python(tmp_path, monkeypatch, f"echo started >> {log}; echo '{ready}'")

        def tell(line: str) -> None:
            lines.append(line)
            if line == "started" and len(lines) == 1:
                with log.open("a") as file:
                    file.write("later\n")
            elif line == "later":
                raise KeyboardInterrupt

        instance.keep(lambda _: None, tell, ray_address="a:1")
    # The last is what `down` makes of it here.
    assert lines == ["started", "later", "started"]


def test_a_gateway_that_cannot_be_kept_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"error": "InvalidRequestError", "message": "port 50051 is taken"})
    fake_python(tmp_path, monkeypatch, f"echo '{said}'; exit 1")
    with pytest.raises(errors.InvalidRequestError, match="port 50051 is taken"):
        instance.keep(lambda _: None)


def test_in_a_ray_job_the_jobs_cluster_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway() as gateway:
        ready = json.dumps({"address": gateway.address, "ray_address": "10.0.0.1:6379"})
        arguments = fake_python(tmp_path, monkeypatch, f"echo '{ready}'")
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        started = instance.find_or_start()
        assert arguments.read_text() == "-m shardlift.cluster.up --json --ray-address 10.0.0.1:6379 --any-token\n"
        assert instance.find_or_start() == started
        assert len(arguments.read_text().splitlines()) == 1
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_JOB_ID", "1")
    assert instance.ray_job_address() == "auto"


def test_a_start_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"error": "InvalidRequestError", "message": "port 50051 is taken"})
    fake_python(tmp_path, monkeypatch, f"echo '{said}'; exit 1")
    with pytest.raises(errors.InvalidRequestError, match="port 50051 is taken"):
        instance.start()
    fake_python(tmp_path, monkeypatch, "echo Traceback >&2; echo 'ImportError: no ray' >&2; exit 1")
    with pytest.raises(errors.InternalError, match=r"up\.log.*ImportError: no ray"):
        instance.start()
    assert instance.recorded() is None


def test_a_start_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(errors.GatewayUnavailableError, match=r"within 0\.2 s"):
        instance.start(timeout_s=0.2)


def test_no_warnings_are_left_behind(gateway: ScriptedGateway, model: RemoteModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gateway.answer("Generate", *answer([[3]]))
        model.generate(torch.tensor([[1, 2]]), pad_token_id=0)
