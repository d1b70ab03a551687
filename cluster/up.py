"""`python -m shardlift.cluster.up`: a gateway, on a Ray of its own or on a cluster that is there.

Prints one JSON line, {"address", "pid", "ray_address", "token_file", "health", "page", "log_file", "grace_s",
"warnings"}, once it serves; or {"error", "message"} and exits with 1. "health" is where a gateway with TLS answers
health checks in plain text, "page" the URL of its page, "warnings" what its operator should know. On a Ray of its own
it stays, as that Ray's parent, until SIGTERM, and takes everything down with it.

A gateway that runs already is taken as it is, as far as nothing else was asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ..proto.v1.credentials import check
from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.status import to_error
from ..proto.v1.tls import gateway_tls, stage_tls
from ..worker import logs
from .auth import check_token, is_loopback, keep_token
from .controller import Running, running_controller, start_controller, stop_controller
from .gateway_options import GRACE_S, GatewayOptions
from .instance_file import home
from .joining import join
from .placement import NAMESPACE
from .ports import check_ports, given, parse_page_port, with_ports

# Of this package, where the module runs as a program and has another name.
_PACKAGE = logs.__name__.partition(".")[0]
logger = logging.getLogger(f"{_PACKAGE}.cluster.up")

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
    told = _Told()
    try:
        log = logs.LogSettings.of(options.log_format, options.log_level)
        logs.configure(log)
        logging.getLogger(_PACKAGE).addHandler(told)
        asked = replace(_gateway_options(options), log=log, log_file=str(home() / "gateway.log"))
        if options.ray_address:
            join(options.ray_address)
        else:
            _start_ray(options.num_cpus, options.num_gpus)
            # Ray puts its own in their place, which ends all of it at once.
            _at_end(stop)
        running = _running(asked, _explicit(options), any_token=options.any_token)
    except Exception as error:
        ours = to_error(error)
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}), flush=True)
        ray.shutdown()
        return 1
    actual = running.options
    answer: dict[str, Any] = {
        "address": running.address,
        "pid": None if options.ray_address else os.getpid(),
        "ray_address": ray.get_runtime_context().gcs_address,
        "token_file": actual.token_file,
        "health": _health_address(actual),
        "page": running.page or None,
        "log_file": actual.log_file,
        "grace_s": actual.grace_s,
        "warnings": [*told.lines, *running.warnings],
    }
    print(json.dumps(answer), flush=True)
    if not options.ray_address:
        stopped.wait()
        stop_controller(unload=True)
    ray.shutdown()
    return 0


class _Told(logging.Handler):
    """Warnings of this process, for whoever started it: its own stderr is a file that few look at."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _running(asked: GatewayOptions, explicit: Collection[str], *, any_token: bool) -> Running:
    """The cluster's gateway; started as `asked` where there is none. Raises InvalidRequestError for one that runs with
    other settings than were asked for: before anything here is changed, the token's file above all."""
    token = os.environ.get("SHARDLIFT_TOKEN")
    running = running_controller()
    if running is None:
        file = _token_file(asked.host)
        running = start_controller(with_ports(replace(asked, token_file=None if file is None else str(file))))
    lacking = asked.lacking(running.options, explicit)
    if token and not any_token and not running.has_token(token):
        lacking.append("the token (SHARDLIFT_TOKEN)")
    if lacking:
        raise InvalidRequestError(
            f"a gateway already runs at {running.address}, with other settings of {', '.join(lacking)}: stop it first "
            "(`shardlift down`, or from elsewhere on its cluster `shardlift down --ray-address auto`; a cluster's "
            "models stay), or leave them out"
        )
    actual = running.options
    if actual.token_file is not None and actual.tls is None and not is_loopback(actual.host):
        logger.warning("the gateway listens on %s without TLS: its token travels in plain text", actual.host)
    return running


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardlift.cluster.up", description=__doc__)
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    # Without a default, to know what was asked for: _gateway_options has the defaults.
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--page-port", type=parse_page_port)
    parser.add_argument("--log-format", choices=logs.FORMATS)
    parser.add_argument("--log-level", type=str.upper, choices=logs.LEVELS)
    parser.add_argument("--ray-address")
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--num-gpus", type=int)
    _add_security(parser)
    parser.add_argument(
        "--any-token", action="store_true", help="SHARDLIFT_TOKEN here is a client's: one that runs may have another"
    )
    parser.add_argument("--grace", type=float, default=GRACE_S)
    return parser


def _add_security(parser: argparse.ArgumentParser) -> None:
    """Flags that the environment may give, too: a process that is started for a client inherits it."""
    environment = os.environ
    parser.add_argument("--tls-cert", default=environment.get("SHARDLIFT_TLS_CERT"))
    parser.add_argument("--tls-key", default=environment.get("SHARDLIFT_TLS_KEY"))
    parser.add_argument("--tls-client-ca", default=environment.get("SHARDLIFT_TLS_CLIENT_CA"))
    parser.add_argument("--health-port", type=int)
    parser.add_argument("--stage-tls-cert", default=environment.get("SHARDLIFT_STAGE_TLS_CERT"))
    parser.add_argument("--stage-tls-key", default=environment.get("SHARDLIFT_STAGE_TLS_KEY"))
    parser.add_argument("--stage-tls-ca", default=environment.get("SHARDLIFT_STAGE_TLS_CA"))
    parser.add_argument("--stage-tls-name", default=environment.get("SHARDLIFT_STAGE_TLS_NAME"))
    parser.add_argument("--allow-remote-code", action="store_true")


def _gateway_options(options: argparse.Namespace) -> GatewayOptions:
    """What is asked for, checked as far as it can be here; without the token's file, which is made when there is no
    gateway yet. Raises InvalidRequestError."""
    host = options.host or "127.0.0.1"
    port = given(options.port, "SHARDLIFT_PORT", DEFAULT_PORT)
    health_port = given(options.health_port, "SHARDLIFT_HEALTH_PORT", 0)
    page_port = options.page_port
    if page_port is None and (text := os.environ.get("SHARDLIFT_PAGE_PORT")):
        try:
            page_port = parse_page_port(text)
        except argparse.ArgumentTypeError as error:
            raise InvalidRequestError(f"SHARDLIFT_PAGE_PORT: {error}") from None
    check_ports(port, page_port, health_port)
    if token := os.environ.get("SHARDLIFT_TOKEN"):
        check_token(token)
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
    if health_port and tls is None:
        raise InvalidRequestError("--health-port is for a gateway with TLS: without it, its own port answers probes")
    return GatewayOptions(
        host=host,
        port=port,
        tls=tls,
        # Kubernetes asks from outside the pod; everybody else from here.
        health_host=host if health_port else "127.0.0.1",
        health_port=health_port,
        stage_tls=stages,
        allow_remote_code=options.allow_remote_code,
        page_port=page_port,
        grace_s=options.grace,
    )


def _explicit(options: argparse.Namespace) -> list[str]:
    """Where to listen, as far as a flag says so. What the environment says is for a gateway that is started."""
    return [name for name in ("host", "port", "page_port", "health_port") if getattr(options, name) is not None]


def _whole(path: str | None) -> str | None:
    """For another process, which may be in another folder."""
    return os.path.abspath(path) if path else None


def _health_address(options: GatewayOptions) -> str | None:
    if options.tls is None:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.health_host, options.health_host)
    return f"[{host}]:{options.health_port}" if ":" in host else f"{host}:{options.health_port}"


def _at_end(stop: Callable[..., None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _token_file(host: str) -> Path | None:
    """The file with the gateway's token: needed beyond loopback, and used wherever SHARDLIFT_TOKEN asks for one."""
    given = os.environ.get("SHARDLIFT_TOKEN")
    return keep_token(home(), given) if given or not is_loopback(host) else None


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
