"""The names and forms that the public contract promises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import shardlift

# from_pretrained, as it was promised. What follows these is ours to extend.
CONTRACT = {
    "config": None,
    "quantization_config": None,
    "device_map": "auto",
    "max_memory": None,
    "num_stages": None,
    "dtype": "auto",
    "revision": "main",
    "subfolder": "",
    "variant": None,
    "token": None,
    "cache_dir": None,
    "trust_remote_code": False,
    "attn_implementation": None,
    "adapter_kwargs": None,
    "name": None,
    "address": None,
}


def test_exported_names() -> None:
    assert set(shardlift.__all__) == {
        "TLS",
        "AsyncClient",
        "AutoModelForCausalLM",
        "BitsAndBytesConfig",
        "Client",
        "ShardliftError",
        "__version__",
        "connect",
        "connect_async",
    }
    for name in shardlift.__all__:
        assert getattr(shardlift, name) is not None
        assert name in dir(shardlift)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shardlift.nothing


def test_bits_and_bytes_config_is_transformers_own() -> None:
    import transformers

    assert shardlift.BitsAndBytesConfig is transformers.BitsAndBytesConfig


def test_from_pretrained_has_the_contract_signature() -> None:
    parameters = inspect.signature(shardlift.AutoModelForCausalLM.from_pretrained).parameters
    names = list(parameters)
    assert names[0] == "pretrained_model_name_or_path"
    assert {name: parameters[name].default for name in names[1 : 1 + len(CONTRACT)]} == CONTRACT
    assert names[1 : 1 + len(CONTRACT)] == list(CONTRACT)
    assert names[1 + len(CONTRACT) :] == [
        "local_files_only",
        "experts_implementation",
        "quantize_experts",
        "requantize",
        "dequantize",
        "staging_budget",
        "connections",
        "part_cache",
        "reserve_tokens",
        "max_sessions",
        "max_waiting",
        "idle_timeout_s",
        "batching",
        "trace",
        "progress",
        "kwargs",
    ]
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_auto_model_cannot_be_instantiated() -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        shardlift.AutoModelForCausalLM()


@pytest.mark.parametrize("connect", [shardlift.connect, shardlift.connect_async])
def test_connect_takes_address_and_token(connect: Any) -> None:
    parameters = inspect.signature(connect).parameters
    assert list(parameters) == ["address", "token", "timeout_s", "retry_s", "tls"]


@pytest.mark.parametrize("client", [shardlift.Client, shardlift.AsyncClient])
@pytest.mark.parametrize("name", ["models", "infos", "model", "plan", "load", "unload", "close"])
def test_client_methods(name: str, client: type) -> None:
    assert callable(getattr(client, name))


def test_both_clients_and_both_handles_can_do_the_same() -> None:
    from shardlift.client.async_handle import AsyncRemoteModel
    from shardlift.client.async_session import AsyncRemoteSession
    from shardlift.client.handle import RemoteModel
    from shardlift.client.session import RemoteSession

    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(shardlift.AsyncClient) == public(shardlift.Client)
    assert public(AsyncRemoteModel) == public(RemoteModel)
    assert public(AsyncRemoteSession) == public(RemoteSession)
    for pair, names in (
        ((AsyncRemoteModel, RemoteModel), ("generate", "stream", "forward", "session")),
        ((AsyncRemoteSession, RemoteSession), ("generate", "stream", "forward", "rollback")),
    ):
        for name in names:
            ours, theirs = (inspect.signature(getattr(cls, name)) for cls in pair)
            assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize(
    "name",
    [
        *("generate", "__call__", "config", "generation_config", "address", "dtype", "device"),
        *("hf_device_map", "get_memory_footprint", "residency", "unload", "stream", "stream_text", "session"),
    ],
)
def test_handle_attributes(name: str) -> None:
    from shardlift.client.handle import RemoteModel

    assert hasattr(RemoteModel, name)
