"""The gateway's ports: its own, its page's, and the one for health beside TLS."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Collection
from dataclasses import replace

from ..proto.v1.errors import InvalidRequestError
from .gateway_options import GatewayOptions

LAST_PORT = 65535


def given(flag: int | None, variable: str, otherwise: int) -> int:
    """What a flag says, else a variable. Raises InvalidRequestError for what is no port."""
    text = os.environ.get(variable)
    if flag is not None or not text:
        return otherwise if flag is None else flag
    if not text.isdecimal() or int(text) > LAST_PORT:
        raise InvalidRequestError(f"{variable}={text[:80]!r} is no port: write a number up to {LAST_PORT}")
    return int(text)


def check_ports(port: int, page_port: int | None, health_port: int) -> None:
    """Raises InvalidRequestError where two are to listen on one: health comes first, and the page would be lost."""
    page = port + 1 if page_port is None and port else page_port
    wanted = {"--port": port, "--page-port (by default the one after --port)": page, "--health-port": health_port}
    named = [(flag, number) for flag, number in wanted.items() if number is not None and number > 0]
    for index, (flag, number) in enumerate(named):
        for other, same in named[:index]:
            if number == same:
                raise InvalidRequestError(f"port {number} is wanted by both {other} and {flag}: give one another")


def parse_page_port(text: str) -> int:
    """-1 for "off"."""
    if text == "off":
        return -1
    if not text.isdecimal() or int(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no port, and not off")
    return int(text)


def with_ports(options: GatewayOptions) -> GatewayOptions:
    """Free ports in the place of 0, chosen once: a gateway that is restarted must come back where it was."""
    port = options.port or _free_port(options.host)
    # Without a word about it, the port after the gateway's own; of one that is chosen at random, another such.
    page_port, taken = options.page_port, {port, options.health_port}
    if page_port == 0 or (page_port is None and not options.port):
        page_port = _free_port(options.host, taken)
    health_port, taken = options.health_port, {port, port + 1 if page_port is None else page_port}
    if options.tls is not None and not health_port:
        health_port = _free_port(options.health_host, taken)
    return replace(options, port=port, health_port=health_port, page_port=page_port)


def _free_port(host: str, taken: Collection[int] = ()) -> int:
    """One that nobody listens on, and that isn't `taken` by what is about to."""
    while True:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if (port := int(probe.getsockname()[1])) not in taken:
                return port
