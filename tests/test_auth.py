"""The gateway's token: how it is kept, and what it opens."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from shardlift.cluster.auth import TokenInterceptor, is_loopback, keep_token, read_token
from shardlift.proto.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc
from shardlift.proto.v1.errors import AuthenticationError, InvalidRequestError
from shardlift.proto.v1.status import from_rpc_error

TOKEN = "s3cret_token-of-the-gateway"


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_new_token_is_its_users_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        file = keep_token(tmp_path / "not" / "there", None)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = read_token(str(file))
    assert token is not None
    assert len(token) >= 32
    assert read_token(str(keep_token(tmp_path / "another", None))) != token
    assert [path.name for path in file.parent.iterdir()] == ["token"], "nothing else is left there"


def test_a_token_is_kept_until_another_is_given(tmp_path: Path) -> None:
    made = read_token(str(keep_token(tmp_path, None)))
    file = keep_token(tmp_path, None)
    assert read_token(str(file)) == made
    file.chmod(0o644)
    assert keep_token(tmp_path, "mine") == file
    assert file.read_text() == "mine"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_token(str(keep_token(tmp_path, None))) == "mine"


def test_reading(tmp_path: Path) -> None:
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text("  written by hand\n")
    assert read_token(str(file)) == "written by hand"
    file.write_text(" \n")
    with pytest.raises(InvalidRequestError, match=r"token file .* is empty: remove it"):
        read_token(str(file))
    file.unlink()
    with pytest.raises(InvalidRequestError, match=r"token file .* can't be read"):
        read_token(str(file))


def test_loopback() -> None:
    for host in ("localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "127.evil.example", "", "localhost.example"):
        assert not is_loopback(host), host


# ---- the door --------------------------------------------------------------------------------------------------------


class _Registry(registry_pb2_grpc.ModelRegistryServiceServicer):
    async def ListModels(
        self, request: registry_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ListModelsResponse:
        return registry_pb2.ListModelsResponse(models=[registry_pb2.ModelInfo(name="seen")])

    async def LoadModel(
        self, request: registry_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.LoadModelResponse]:
        yield registry_pb2.LoadModelResponse(warning="seen")


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    async def Forward(
        self, request_iterator: AsyncIterator[inference_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.ForwardResponse]:
        async for _ in request_iterator:
            yield inference_pb2.ForwardResponse(more=b"seen")


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[TokenInterceptor(TOKEN)])
    registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(_Registry(), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(), server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


Metadata = Sequence[tuple[str, str | bytes]]
RIGHT = f"Bearer {TOKEN}"


async def ask(channel: grpc.aio.Channel, metadata: Metadata) -> list[str]:
    """What each kind of call gives: unary, streamed answers, streamed both ways."""
    registry = registry_pb2_grpc.ModelRegistryServiceStub(channel)
    inference = inference_pb2_grpc.InferenceServiceStub(channel)

    async def unary() -> str:
        return (await registry.ListModels(registry_pb2.ListModelsRequest(), metadata=metadata)).models[0].name

    async def stream() -> str:
        async for answer in registry.LoadModel(registry_pb2.LoadModelRequest(), metadata=metadata):
            return answer.warning
        return ""

    async def both() -> str:
        async for answer in inference.Forward(iter([inference_pb2.ForwardRequest()]), metadata=metadata):
            return answer.more.decode()
        return ""

    return [await _answer(call) for call in (unary, stream, both)]


async def _answer(call: Callable[[], Awaitable[str]]) -> str:
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        refused = error
    ours = from_rpc_error(refused, "here")
    assert type(ours) is AuthenticationError
    assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "SHARDLIFT_TOKEN" in str(ours)
    assert TOKEN not in str(ours)
    return "refused"


async def test_the_right_token_opens(channel: grpc.aio.Channel) -> None:
    assert await ask(channel, [("authorization", RIGHT)]) == ["seen"] * 3


@pytest.mark.parametrize(
    "given",
    [None, "", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}"],
)
async def test_no_other_does(channel: grpc.aio.Channel, given: str | None) -> None:
    metadata: Metadata = [] if given is None else [("authorization", given)]
    assert await ask(channel, metadata) == ["refused"] * 3


async def test_health_is_open_and_reflection_is_not(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_method_that_does_not_exist_is_not_told_from_one_that_does(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/shardlift.v1.ModelRegistryService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(b"")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_service_that_only_begins_like_health_is_closed(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary("/grpc.health.v1.HealthX/Check")(b"")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
