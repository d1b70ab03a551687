"""Joining a Ray cluster: where none is, that is told at once. Ray itself would go on trying for minutes."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from shardlift.cluster import joining
from shardlift.cluster.down import stop_gateway
from shardlift.proto.v1.errors import GatewayUnavailableError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_PATIENCE_S", 0.3)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{closed_port()}"
    begun_s = time.monotonic()
    with pytest.raises(GatewayUnavailableError, match=f"no Ray cluster answers at {address}: Connection refused; look"):
        stop_gateway(address)
    # What Ray would take for "auto", too.
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(GatewayUnavailableError, match=address):
        joining.join("auto")
    assert time.monotonic() - begun_s < 10


def test_a_head_that_is_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_PATIENCE_S", 20.0)
    port = closed_port()
    servers: list[socket.socket] = []
    starting = threading.Timer(0.5, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    starting.start()
    joining.check_reachable(f"127.0.0.1:{port}")
    starting.join()
    servers[0].close()


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1", "127.0.0.1", "127.0.0.1:99999"])
def test_of_other_addresses_ray_knows_more(address: str) -> None:
    joining.check_reachable(address)
