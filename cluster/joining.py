"""Into a Ray cluster that is there, or told within seconds that it isn't: Ray itself goes on trying for minutes."""

from __future__ import annotations

import logging
import os
import socket
import time

import ray

from ..proto.v1.errors import GatewayUnavailableError, one_line
from .placement import NAMESPACE

# For a head that is just starting.
_PATIENCE_S = 5.0
_TRY_S = 3.0
_PAUSE_S = 0.25


def join(address: str) -> None:
    """Connects this process to the Ray cluster at `address`, as `ray.init` takes it. Raises GatewayUnavailableError."""
    check_reachable(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise GatewayUnavailableError(
            f"no Ray cluster answers at {address}: {one_line(error, 300)}; if one is there, look at Ray's token "
            "(RAY_AUTH_MODE, RAY_AUTH_TOKEN), its TLS (RAY_USE_TLS) and its version"
        ) from None


def check_reachable(address: str) -> None:
    """Raises GatewayUnavailableError where nobody listens at `address`. Of one that Ray is to find, or that is no
    host and port, nothing is known before."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal() or int(port) > 65535:
        return
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_TRY_S).close()
        except OSError as error:
            if time.monotonic() + _PAUSE_S > deadline_s:
                raise GatewayUnavailableError(
                    f"no Ray cluster answers at {address}: {error.strerror or one_line(error, 200)}; look at the "
                    "address, and whether Ray runs there (`ray status`)"
                ) from None
            time.sleep(_PAUSE_S)
        else:
            return
