"""TLS at the gateway: who gets in, who doesn't and what they are told; certificates that change under a running one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shardlift
from shardlift.client import channel
from shardlift.client.gateway import Gateway as GatewayConnection
from shardlift.client.hub_token import hub_token
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.proto.v1 import credentials
from shardlift.proto.v1.errors import AuthenticationError, GatewayUnavailableError, InvalidRequestError
from shardlift.proto.v1.tls import TLS, client_tls, gateway_tls, stage_tls
from tests.support import gateway
from tests.support.certificates import Authority

TOKEN = "the-gateways-token"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody here believes."""
    return Authority(tmp_path_factory.mktemp("stranger"), "another ca")


Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts a gateway without models, as an operator's options say; its address."""
    (tmp_path / "token").write_text(TOKEN)
    async with contextlib.AsyncExitStack() as running:

        async def start(tls: TLS | None, **options: Any) -> str:
            given = GatewayOptions(tls=tls, token_file=str(tmp_path / "token"), **options)
            return await running.enter_async_context(gateway.serve(given))

        yield start


async def names(address: str, tls: TLS | None, token: str | None = TOKEN) -> list[str]:
    """What a client with these files and this token sees: the models' names."""
    client = await shardlift.connect_async(address, token, tls=tls, timeout_s=1)
    async with client:
        return [info.name for info in await client.infos()]


async def blocking_names(address: str, tls: TLS | None, token: str | None = TOKEN) -> list[str]:
    def ask() -> list[str]:
        with shardlift.connect(address, token, tls=tls, timeout_s=1) as client:
            return [info.name for info in client.infos()]

    return await asyncio.to_thread(ask)


def client_of(authority: Authority) -> TLS:
    return TLS(ca=authority.file)


# ---- one side --------------------------------------------------------------------------------------------------------


async def test_a_client_that_knows_the_ca_gets_in(serve: Serve, authority: Authority) -> None:
    address = await serve(replace(authority.issue("server"), ca=None))
    assert address.startswith("grpcs://127.0.0.1:")
    assert await names(address, client_of(authority)) == []
    assert await blocking_names(address, client_of(authority)) == []
    # The address without its scheme: the files ask for TLS.
    assert await names(address.removeprefix("grpcs://"), client_of(authority)) == []


async def test_tokens_are_wanted_over_tls_too(serve: Serve, authority: Authority) -> None:
    address = await serve(authority.issue("server"))
    client = authority.issue("client")
    for token in (None, "wrong", TOKEN[:-1]):
        with pytest.raises(AuthenticationError, match="SHARDLIFT_TOKEN"):
            await names(address, client, token)
    assert await names(address, client) == []


@pytest.mark.parametrize("ask", [names, blocking_names])
async def test_what_a_client_is_told(
    serve: Serve, authority: Authority, stranger: Authority, ask: Callable[..., Awaitable[list[str]]]
) -> None:
    address = await serve(replace(authority.issue("server"), ca=None))
    expired = await serve(replace(authority.issue("expired", days=-1), ca=None))
    misnamed = await serve(replace(authority.issue("misnamed", hosts=["elsewhere.example"]), ca=None))
    plain = await serve(None)
    good = client_of(authority)
    for where, tls, said in (
        (address, client_of(stranger), "unable to get local issuer certificate"),
        (address, TLS(), "unable to get local issuer certificate"),
        (expired, good, "certificate has expired"),
        (misnamed, good, "made out to another name"),
        (plain, good, "speaks plain text"),
        (address.replace("grpcs", "grpc"), None, r"closes the connection at once.*grpcs://"),
    ):
        with pytest.raises(AuthenticationError, match=said):
            await ask(where, tls)
    # A name may be expected that isn't the address.
    assert await ask(misnamed, replace(good, name="elsewhere.example")) == []
    # And whoever was refused has changed nothing for others.
    assert await ask(address, good) == []


async def command(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of the command line, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shardlift.client.cli.main", *words),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_refusal_is_one_line_of_the_command_line(
    serve: Serve, authority: Authority, stranger: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    address = await serve(replace(authority.issue("server"), ca=None))
    listing = ("list", "--address", address)
    code, said = await command(*listing, SHARDLIFT_TLS_CA=str(stranger.file))
    assert code == 1
    (line,) = said.splitlines()
    assert line.startswith(f"error: TLS with {address} fails: ")
    # Whoever wants to hear gRPC's own words does, and processes that are started are as talkative as they were.
    _, said = await command(*listing, SHARDLIFT_TLS_CA=str(stranger.file), GRPC_VERBOSITY="INFO")
    assert "Handshake failed" in said
    program = "import shardlift.client.cli.main, os; assert 'GRPC_VERBOSITY' not in os.environ"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


# ---- both sides ------------------------------------------------------------------------------------------------------


async def test_mutual_tls(serve: Serve, authority: Authority, stranger: Authority) -> None:
    address = await serve(authority.issue("server"))
    assert await names(address, authority.issue("client")) == []
    for tls in (
        client_of(authority),
        replace(stranger.issue("client"), ca=authority.file),
        authority.issue("late", days=-1),
    ):
        with pytest.raises(AuthenticationError, match="SHARDLIFT_TLS_CLIENT_CERT"):
            await names(address, tls)
    with pytest.raises(AuthenticationError, match="closes the connection"):
        await names(address.replace("grpcs", "grpc"), None)
    assert await names(address, authority.issue("client")) == []


async def test_the_environment_names_files_too(
    serve: Serve, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = await serve(authority.issue("server"))
    client = authority.issue("client")
    for name, value in (("CA", client.ca), ("CLIENT_CERT", client.cert), ("CLIENT_KEY", client.key)):
        assert value is not None
        monkeypatch.setenv(f"SHARDLIFT_TLS_{name}", value)
    bare = address.removeprefix("grpcs://")
    assert await names(bare, None) == []
    # A pickled handle finds them where it is unpickled, and carries none.
    connection = GatewayConnection(bare, None)
    again = pickle.loads(pickle.dumps(connection))
    assert again.address == address
    await asyncio.to_thread(again.connect)
    again.close()
    connection.close()
    # An address that says otherwise is believed.
    with pytest.raises(AuthenticationError, match="closes the connection"):
        await names(f"grpc://{bare}", None)


# ---- health ----------------------------------------------------------------------------------------------------------


async def test_health_is_told_in_plain_text_and_nothing_else(serve: Serve, authority: Authority) -> None:
    from tests.support.ray_start import free_port

    port = free_port("127.0.0.1")
    address = await serve(authority.issue("server"), health_port=port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        health = health_pb2_grpc.HealthStub(opened)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="a-model"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        for method in ("/shardlift.v1.ModelRegistryService/ListModels", "/grpc.health.v1.Health/Watch"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await opened.unary_unary(method)(b"", metadata=[("authorization", f"Bearer {TOKEN}")])
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(InvalidRequestError, match="--health-port"):
        await serve(authority.issue("server"), health_port=port)
    assert await names(address, authority.issue("client")) == []


# ---- rotation --------------------------------------------------------------------------------------------------------


async def test_new_files_count_without_a_restart(serve: Serve, tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = TLS(ca=str(tmp_path / "ca.crt"), cert=str(tmp_path / "tls.crt"), key=str(tmp_path / "tls.key"))

    def put(source: TLS, *fields: str) -> None:
        for field in fields:
            wanted, draft = getattr(files, field), tmp_path / "draft"
            shutil.copy(getattr(source, field), draft)
            os.replace(draft, wanted)

    first, second = old.issue("server"), new.issue("server")
    put(first, "ca", "cert", "key")
    address = await serve(files)
    before, after = old.issue("client"), new.issue("client")
    assert await names(address, before) == []
    with pytest.raises(AuthenticationError):
        await names(address, after)

    async with await shardlift.connect_async(address, TOKEN, tls=before, timeout_s=1) as open_all_along:
        # Half of it, and then nonsense: what was in force stays.
        put(second, "cert")
        assert await names(address, before) == []
        Path(files.cert or "").write_text("nonsense")
        assert await names(address, before) == []
        put(second, "cert", "key", "ca")
        assert await names(address, after) == []
        with pytest.raises(AuthenticationError):
            await names(address, before)
        # A connection that was made under the old ones goes on.
        assert await open_all_along.infos() == []


# ---- files and words -------------------------------------------------------------------------------------------------


def test_files_are_checked_before_anything_starts(tmp_path: Path, authority: Authority) -> None:
    good = authority.issue("server")
    credentials.check(good)
    other = authority.issue("other")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    missing = str(tmp_path / "missing")
    for tls, said in (
        (replace(good, cert=missing), r"missing can't be read: No such file"),
        (replace(good, ca=missing), r"missing can't be read"),
        (replace(good, key=other.key), r"no PEM certificate with its unencrypted key"),
        (replace(good, cert=str(nonsense)), r"nonsense and .* are no PEM certificate"),
        (replace(good, ca=str(nonsense)), r"nonsense holds no PEM certificates"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            credentials.check(tls)
    with nonsense.open("wb") as stream:
        stream.truncate(5 << 20)
    with pytest.raises(InvalidRequestError, match="no certificate is so large"):
        credentials.check(replace(good, ca=str(nonsense)))
    with pytest.raises(InvalidRequestError, match="no key"):
        TLS(cert=good.cert)


def test_what_belongs_together() -> None:
    assert gateway_tls(None, None, None) is None
    assert gateway_tls("c", "k", None) == TLS(cert="c", key="k")
    for given in (("c", None, None), (None, "k", None), (None, None, "ca")):
        with pytest.raises(InvalidRequestError, match="--tls-cert and --tls-key"):
            gateway_tls(*given)
    assert stage_tls(None, None, None, None) is None
    assert stage_tls("c", "k", "ca", None) == TLS(ca="ca", cert="c", key="k", name="shardlift-stage")
    for parts in (("c", "k", None, None), ("c", None, "ca", None), (None, None, None, "n")):
        with pytest.raises(InvalidRequestError, match="mutual"):
            stage_tls(*parts)
    assert client_tls({}) is None
    assert client_tls({"SHARDLIFT_TLS_CA": ""}) is None
    assert client_tls({"SHARDLIFT_TLS_NAME": "n"}) == TLS(name="n")


def test_addresses_with_a_scheme() -> None:
    assert channel.normalize("grpcs://host") == "grpcs://host:50051"
    assert channel.normalize("grpc://host:7") == "grpc://host:7"
    assert channel.normalize("host:7", TLS(ca="x")) == "grpcs://host:7"
    assert channel.normalize(channel.normalize("grpc://[::1]:7")) == "grpc://[::1]:7"
    assert channel.is_loopback("grpcs://127.0.0.1:7")
    assert not channel.is_loopback("grpcs://host:7")
    with pytest.raises(InvalidRequestError, match="plain text, and tls= for TLS"):
        channel.normalize("grpc://host", TLS())
    with pytest.raises(InvalidRequestError, match="grpcs://host:port"):
        channel.normalize("https://host")


@pytest.mark.parametrize("address", ["gateway.example:1", "10.255.255.1:1"])
def test_a_token_in_plain_text_is_warned_of(address: str) -> None:
    with pytest.warns(UserWarning, match=rf"token goes to {address} in plain text.*grpcs://"):
        GatewayConnection(address, TOKEN).close()
    with pytest.warns(UserWarning, match=rf"Hub token goes to {address} in plain text"):
        assert hub_token("hf_x", address) == "hf_x"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "grpc://gateway.example:1", "grpcs://gateway.example:1"])
def test_but_not_where_it_stays_here_or_is_meant(address: str) -> None:
    GatewayConnection(address, TOKEN).close()
    GatewayConnection("gateway.example:1", None).close()
    assert hub_token("hf_x", address) == "hf_x"


def test_nobody_there_is_no_failure_of_tls(authority: Authority) -> None:
    from tests.support.ray_start import free_port

    with pytest.raises(GatewayUnavailableError, match="no gateway answers"):
        shardlift.connect(f"grpcs://127.0.0.1:{free_port('127.0.0.1')}", tls=client_of(authority), timeout_s=0.2)
