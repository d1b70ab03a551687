"""`python -m shardlift.cluster.up`: a gateway, on a Ray of its own or on a cluster that is there.

Prints one JSON line, {"address", "pid", "ray_address", "token_file", "health", "page"}, once it serves; or {"error",
"message"} and exits with 1. "health" is where a gateway with TLS answers health checks in plain text, "page" the URL of
its page. On a Ray of its own it stays, as that Ray's parent, until SIGTERM, and takes everything down with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ..proto.v1.credentials import check
from ..proto.v1.errors import GatewayUnavailableError, InvalidRequestError, one_line
from ..proto.v1.status import to_error
from ..proto.v1.tls import gateway_tls, stage_tls
from ..worker import logs
from .auth import is_loopback, keep_token
from .controller import start_controller, stop_controller
from .gateway_options import GRACE_S, GatewayOptions
from .instance_file import home
from .placement import NAMESPACE

logger = logging.getLogger(__name__)

DEFAULT_PORT = 50051
# A Ray of our own is for this machine alone. Ray takes 127.0.0.1 for "my address on the network" (on Linux), so
# another address of the loopback range says what is meant.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()

    _at_end(stop)
    try:
        log = logs.LogSettings.of(options.log_format, options.log_level)
        logs.configure(log)
        asked = replace(_gateway_options(options), log=log)
        if options.ray_address:
            _join(options.ray_address)
        else:
            _start_ray(options.num_cpus, options.num_gpus)
            # Ray puts its own in their place, which ends all of it at once.
            _at_end(stop)
        address, actual, page = start_controller(_with_ports(asked))
    except Exception as error:
        ours = to_error(error)
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}), flush=True)
        ray.shutdown()
        return 1
    answer: dict[str, Any] = {
        "address": address,
        "pid": None if options.ray_address else os.getpid(),
        "ray_address": ray.get_runtime_context().gcs_address,
        "token_file": asked.token_file,
        "health": _health_address(actual),
        "page": page or None,
        "grace_s": actual.grace_s,
    }
    print(json.dumps(answer), flush=True)
    if not options.ray_address:
        stopped.wait()
        stop_controller(unload=True)
    ray.shutdown()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardlift.cluster.up", description=__doc__)
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("SHARDLIFT_PORT") or DEFAULT_PORT))
    parser.add_argument("--page-port", type=_page_port, default=os.environ.get("SHARDLIFT_PAGE_PORT") or None)
    parser.add_argument("--log-format", choices=logs.FORMATS)
    parser.add_argument("--log-level", type=str.upper, choices=logs.LEVELS)
    parser.add_argument("--ray-address")
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--num-gpus", type=int)
    _add_security(parser)
    parser.add_argument("--grace", type=float, default=GRACE_S)
    return parser


def _add_security(parser: argparse.ArgumentParser) -> None:
    """Flags that the environment may give, too: a process that is started for a client inherits it."""
    environment = os.environ
    parser.add_argument("--tls-cert", default=environment.get("SHARDLIFT_TLS_CERT"))
    parser.add_argument("--tls-key", default=environment.get("SHARDLIFT_TLS_KEY"))
    parser.add_argument("--tls-client-ca", default=environment.get("SHARDLIFT_TLS_CLIENT_CA"))
    parser.add_argument("--health-port", type=int, default=int(environment.get("SHARDLIFT_HEALTH_PORT") or 0))
    parser.add_argument("--stage-tls-cert", default=environment.get("SHARDLIFT_STAGE_TLS_CERT"))
    parser.add_argument("--stage-tls-key", default=environment.get("SHARDLIFT_STAGE_TLS_KEY"))
    parser.add_argument("--stage-tls-ca", default=environment.get("SHARDLIFT_STAGE_TLS_CA"))
    parser.add_argument("--stage-tls-name", default=environment.get("SHARDLIFT_STAGE_TLS_NAME"))
    parser.add_argument("--allow-remote-code", action="store_true")


def _gateway_options(options: argparse.Namespace) -> GatewayOptions:
    """What is asked for, checked as far as it can be here. Makes the token file. Raises InvalidRequestError."""
    tls = gateway_tls(_whole(options.tls_cert), _whole(options.tls_key), _whole(options.tls_client_ca))
    stages = stage_tls(
        _whole(options.stage_tls_cert),
        _whole(options.stage_tls_key),
        _whole(options.stage_tls_ca),
        options.stage_tls_name,
    )
    for each in (tls, stages):
        if each is not None:
            check(each)
    if options.health_port and tls is None:
        raise InvalidRequestError("--health-port is for a gateway with TLS: without it, its own port answers probes")
    token_file = _token_file(options.host)
    if token_file is not None and tls is None and not is_loopback(options.host):
        logger.warning("the gateway listens on %s without TLS: its token travels in plain text", options.host)
    return GatewayOptions(
        host=options.host,
        port=options.port,
        token_file=None if token_file is None else str(token_file),
        tls=tls,
        # Kubernetes asks from outside the pod; everybody else from here.
        health_host=options.host if options.health_port else "127.0.0.1",
        health_port=options.health_port,
        stage_tls=stages,
        allow_remote_code=options.allow_remote_code,
        page_port=options.page_port,
        grace_s=options.grace,
    )


def _whole(path: str | None) -> str | None:
    """For another process, which may be in another folder."""
    return os.path.abspath(path) if path else None


def _with_ports(options: GatewayOptions) -> GatewayOptions:
    """Free ports in the place of 0, chosen once: a gateway that is restarted must come back where it was."""
    health_port = options.health_port
    if options.tls is not None and not health_port:
        health_port = _free_port(options.health_host)
    page_port = options.page_port
    # Without a word about it, the port after the gateway's own; of one that is chosen at random, another such.
    if page_port == 0 or (page_port is None and not options.port):
        page_port = _free_port(options.host)
    port = options.port or _free_port(options.host)
    return replace(options, port=port, health_port=health_port, page_port=page_port)


def _health_address(options: GatewayOptions) -> str | None:
    if options.tls is None:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.health_host, options.health_host)
    return f"[{host}]:{options.health_port}" if ":" in host else f"{host}:{options.health_port}"


def _page_port(text: str) -> int:
    """-1 for "off"."""
    if text == "off":
        return -1
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no port, and not off")
    return int(text)


def _at_end(stop: Callable[..., None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def _token_file(host: str) -> Path | None:
    """The file with the gateway's token: needed beyond loopback, and used wherever SHARDLIFT_TOKEN asks for one."""
    given = os.environ.get("SHARDLIFT_TOKEN")
    return keep_token(home(), given) if given or not is_loopback(host) else None


def _join(address: str) -> None:
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise GatewayUnavailableError(f"no Ray cluster answers at {address}: {one_line(error, 300)}") from None


def _start_ray(num_cpus: int | None, num_gpus: int | None) -> None:
    # A cluster of the environment's is not what is asked for here.
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=_LOOPBACK,
    )


if __name__ == "__main__":
    sys.exit(main())
