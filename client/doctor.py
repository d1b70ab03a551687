"""What is wrong here, on the way to the gateway, and behind it: findings of three levels, as they come."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from ..proto.v1.errors import AuthenticationError, GatewayUnavailableError, ShardliftError, one_line
from . import channel, gateway
from .connection import Client
from .nodes import Finding


def here() -> Iterator[Finding]:
    """This machine, without any cluster."""
    return _examined([])


def ray_cluster(address: str, timeout_s: float) -> Iterator[Finding]:
    """The nodes of the Ray cluster at `address`, without a gateway."""
    return _examined(["--ray-address", address, "--timeout", str(timeout_s)])


def gateway_and_nodes(address: str | None, token: str | None, timeout_s: float) -> Iterator[Finding]:
    """The way to the gateway, and what it finds among the nodes; nothing where no gateway is known."""
    try:
        where, token = gateway.target(address, token, start=False)
    except GatewayUnavailableError:
        return
    if (transport := _transport(where)) is not None:
        yield transport
    try:
        client = Client(gateway.resolve(where, token, start=False, timeout_s=channel.CONNECT_TIMEOUT_S, retry_s=0))
    except ShardliftError as error:
        yield Finding(
            check="gateway",
            verdict="fail",
            finding=one_line(error),
            remedy="start one with `shardlift up`; look at SHARDLIFT_ADDRESS, at firewalls, and at the gateway's log",
        )
        return
    with client:
        yield Finding(check="gateway", verdict="ok", finding=f"answers at {where}")
        try:
            for number, finding in enumerate(client.diagnose(timeout_s=timeout_s)):
                if number == 0:  # whatever it says, it has listened
                    yield _token_is_right(token)
                yield finding
        except AuthenticationError as error:
            yield Finding(
                check="token",
                verdict="fail",
                finding=one_line(error),
                remedy="set SHARDLIFT_TOKEN, or --token-file, to what the gateway was started with ($SHARDLIFT_HOME/"
                "token where it runs)",
            )
        except ShardliftError as error:
            yield Finding(
                check="gateway",
                verdict="fail",
                finding=f"its examination ended early: {one_line(error)}",
                remedy="look at the gateway's log; a gateway that is older than this command examines nothing",
            )


def _transport(where: str) -> Finding | None:
    """What the way to the gateway gives away; None where there is no way to speak of."""
    if channel.is_secure(where):
        return Finding(check="transport", verdict="ok", finding=f"what goes to {where} is encrypted")
    if channel.is_loopback(where):
        return None
    if channel.is_plain(where):
        said = f"what goes to {where} is in plain text, as its grpc:// says that it may be"
        return Finding(check="transport", verdict="ok", finding=said)
    return Finding(
        check="transport",
        verdict="warn",
        finding=f"what goes to {where} is not encrypted, the token included",
        remedy=f"have the gateway use TLS (`shardlift up --tls-cert`) and write grpcs://{where}; or, where the network "
        f"is safe, grpc://{where}",
    )


def _token_is_right(token: str | None) -> Finding:
    finding = "the gateway listens without one" if token is None else "the gateway listens to it"
    return Finding(check="token", verdict="ok", finding=finding)


def _examined(arguments: Sequence[str]) -> Iterator[Finding]:
    """Findings of the examination that runs beside the cluster's code: this side takes neither torch nor ray."""
    command = [sys.executable, "-m", "shardlift.cluster.doctor", *arguments]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        told = 0
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    told += 1
                    yield Finding(**json.loads(line))
        except BaseException:
            process.terminate()
            raise
        if process.wait() not in (0, 1) or not told:
            log.seek(0)
            said = [line.strip() for line in log if line.strip()]
            last = said[-1] if said else "it said nothing"
            yield Finding(
                check="examination",
                verdict="fail",
                finding=f"it could not be carried out: {last[:300]}",
                remedy="install shardlift with what it needs: `pip install .`, or its wheel",
            )
