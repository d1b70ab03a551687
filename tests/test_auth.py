"""The gateway's token: how it is kept, and what it opens."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from shardlift.cluster import ports, requests, up
from shardlift.cluster.auth import TokenInterceptor, fingerprint, is_loopback, is_token, keep_token, read_token
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.cluster.instance_file import home
from shardlift.proto.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc
from shardlift.proto.v1.errors import AuthenticationError, InvalidRequestError, UnsupportedModelError
from shardlift.proto.v1.status import from_rpc_error
from shardlift.proto.v1.tls import TLS
from tests.support.certificates import Authority

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


def test_a_file_that_others_may_read_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    for mode in (0o644, 0o640, 0o606):
        file.write_text("mine")
        file.chmod(mode)
        assert keep_token(tmp_path, None) == file
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # As Kubernetes mounts a Secret: root's, and its group's. That is not for us to change.
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    file.chmod(0o440)
    assert keep_token(tmp_path, None) == file
    assert stat.S_IMODE(file.stat().st_mode) == 0o440
    file.chmod(0o444)
    with pytest.raises(InvalidRequestError, match=r"another user's, and has mode 0444"):
        keep_token(tmp_path, None)


def test_a_token_is_never_there_for_others_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under its own name, nor under the one that it is written by; and a write that fails leaves nothing."""
    seen: list[int] = []

    def look_and_fail(source: str, target: Path) -> None:
        seen.append(stat.S_IMODE(os.stat(source).st_mode))
        assert not target.exists()
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", look_and_fail)
    previous = os.umask(0)
    try:
        with pytest.raises(OSError, match="full"):
            keep_token(tmp_path / "home", None)
    finally:
        os.umask(previous)
    assert seen == [0o600]
    assert list((tmp_path / "home").iterdir()) == []
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


@pytest.mark.parametrize("token", [" x", "x\n", "gehörig", "\x00", "x" * 4097])
def test_a_token_that_no_header_carries_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(InvalidRequestError, match="SHARDLIFT_TOKEN") as refused:
        keep_token(tmp_path, token)
    assert token.strip() not in str(refused.value) or not token.strip()[1:]
    assert list(tmp_path.iterdir()) == []


def flags(*words: str) -> argparse.Namespace:
    return up._parser().parse_args(words)


def test_what_up_makes_of_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca")
    server = authority.issue("server")
    assert up._gateway_options(flags()) == GatewayOptions(port=50051)
    assert up._gateway_options(flags("--host", "0.0.0.0", "--allow-remote-code")).allow_remote_code
    tls = ("--tls-cert", str(server.cert), "--tls-key", str(server.key))
    options = up._gateway_options(flags("--host", "0.0.0.0", *tls, "--health-port", "7"))
    assert (options.tls, options.health_host, options.health_port) == (
        TLS(cert=server.cert, key=server.key),
        "0.0.0.0",
        7,
    )
    assert up._health_address(options) == "127.0.0.1:7"
    # From the environment, and from where it is that `up` was called.
    monkeypatch.chdir(tmp_path / "ca")
    for name, value in (("CERT", "server.crt"), ("KEY", "server.key"), ("CLIENT_CA", "ca.crt")):
        monkeypatch.setenv(f"SHARDLIFT_TLS_{name}", value)
    assert up._gateway_options(flags()).tls == server
    monkeypatch.setenv("SHARDLIFT_TLS_KEY", "missing.key")
    with pytest.raises(InvalidRequestError, match=r"missing\.key can't be read"):
        up._gateway_options(flags())
    for name in ("CERT", "KEY", "CLIENT_CA"):
        monkeypatch.delenv(f"SHARDLIFT_TLS_{name}")
    with pytest.raises(InvalidRequestError, match="--health-port"):
        up._gateway_options(flags("--health-port", "7"))
    with pytest.raises(InvalidRequestError, match="mutual"):
        up._gateway_options(flags("--stage-tls-cert", "x"))


def test_a_gateway_that_runs_is_not_taken_for_one_that_is_safer() -> None:
    plain, tls = GatewayOptions(), TLS(cert="c", key="k")
    assert plain.lacking(GatewayOptions(tls=tls, allow_remote_code=True)) == []
    assert GatewayOptions(tls=tls).lacking(plain) == ["--tls-cert"]
    assert GatewayOptions(stage_tls=tls, allow_remote_code=True).lacking(GatewayOptions(tls=tls)) == [
        "--stage-tls-cert",
        "--allow-remote-code",
    ]


def test_beyond_loopback_there_is_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made when a gateway is started, and not before it is known that none runs: looking at flags makes no file."""
    up._gateway_options(flags("--host", "0.0.0.0"))
    assert not (home() / "token").exists()
    assert up._token_file("127.0.0.1") is None
    assert up._token_file("0.0.0.0") == home() / "token"
    monkeypatch.setenv("SHARDLIFT_TOKEN", "mine")
    assert up._token_file("127.0.0.1") == home() / "token"
    monkeypatch.setenv("SHARDLIFT_TOKEN", "gehörig")
    with pytest.raises(InvalidRequestError, match="printable ASCII"):
        up._gateway_options(flags())


def test_where_it_listens_counts_where_somebody_asked_for_it() -> None:
    runs = GatewayOptions(host="0.0.0.0", port=50051, token_file="t", health_port=7)
    asked = GatewayOptions(port=50060, page_port=8080, health_port=9)
    assert asked.lacking(runs) == []
    everything = ("host", "port", "page_port", "health_port")
    assert asked.lacking(runs, everything) == ["--host", "--port", "--health-port", "--page-port"]
    assert runs.lacking(runs, everything) == []
    assert GatewayOptions(host="0.0.0.0").lacking(runs, everything) == [], "port 0 is any"
    for page, there, same in (
        (50052, None, True),
        (0, None, True),
        (-1, None, False),
        (-1, -1, True),
        (0, -1, False),
        (50052, -1, False),
        (8080, 8080, True),
        (50052, 8080, False),
    ):
        lacking = GatewayOptions(page_port=page).lacking(GatewayOptions(port=50051, page_port=there), ("page_port",))
        assert lacking == ([] if same else ["--page-port"]), (page, there)


def test_flags_are_asked_for_and_the_environment_is_for_what_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PORT", "50060"), ("PAGE_PORT", "off")):
        monkeypatch.setenv(f"SHARDLIFT_{name}", value)
    options = up._gateway_options(flags())
    assert (options.port, options.page_port) == (50060, -1)
    assert up._explicit(flags()) == []
    assert up._explicit(flags("--host", "::1", "--port", "1", "--page-port", "off")) == ["host", "port", "page_port"]
    for name, value in (("PORT", "x"), ("PORT", "65536"), ("PAGE_PORT", "of"), ("HEALTH_PORT", "-1")):
        with monkeypatch.context() as patch:
            patch.setenv(f"SHARDLIFT_{name}", value)
            with pytest.raises(InvalidRequestError, match=f"SHARDLIFT_{name}.* is no port"):
                up._gateway_options(flags())


@pytest.mark.parametrize(
    ("words", "port", "both"),
    [
        (("--health-port", "50052"), 50052, ("--page-port", "--health-port")),
        (("--page-port", "50051"), 50051, ("--port", "--page-port")),
        (("--port", "7", "--health-port", "7"), 7, ("--port", "--health-port")),
        (("--page-port", "8080", "--health-port", "8080"), 8080, ("--page-port", "--health-port")),
    ],
)
def test_no_two_ports_are_one(words: tuple[str, ...], port: int, both: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match=f"port {port} is wanted by both {both[0]}.* and {both[1]}"):
        up._gateway_options(flags(*words))


def test_ports_that_are_chosen_differ() -> None:
    tls = TLS(cert="c", key="k")
    options = ports.with_ports(GatewayOptions(tls=tls))
    assert len({options.port, options.page_port, options.health_port}) == 3
    assert min(options.port, options.page_port or 0, options.health_port) > 0
    assert ports.with_ports(GatewayOptions(port=50051, page_port=-1)) == GatewayOptions(port=50051, page_port=-1)


def test_tokens_are_told_apart_and_not_told() -> None:
    for token, given, same in ((TOKEN, TOKEN, True), (TOKEN, TOKEN + "x", False), (None, TOKEN, False)):
        print_ = fingerprint(given, b"salt")
        assert is_token(token, b"salt", print_) is same
        assert not is_token(token, b"other", print_)
        assert given.encode() not in print_


def test_remote_code_is_the_operators_to_allow() -> None:
    source = registry_pb2.ModelSource(path="x", trust_remote_code=True)
    requests.check_remote_code(source, allowed=True)
    requests.check_remote_code(registry_pb2.ModelSource(path="x"), allowed=False)
    with pytest.raises(UnsupportedModelError, match="shardlift up --allow-remote-code"):
        requests.check_remote_code(source, allowed=False)


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
    with pytest.raises(grpc.aio.AioRpcError) as watched:
        await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))
    assert watched.value.code() is grpc.StatusCode.UNAUTHENTICATED, "it would hold a place among the calls"
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
