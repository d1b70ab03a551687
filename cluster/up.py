"""`python -m shardlift.cluster.up`: a gateway, on a Ray of its own or on a cluster that is there.

Prints one JSON line, {"address", "pid", "ray_address", "token_file"}, once it serves; or {"error", "message"} and exits
with 1. On a Ray of its own it stays, as that Ray's parent, until SIGTERM, and takes everything down with it.
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
from pathlib import Path
from typing import Any

import ray

from ..proto.v1.errors import GatewayUnavailableError, one_line
from ..proto.v1.status import to_error
from .auth import is_loopback, keep_token
from .controller import start_controller, stop_controller
from .gateway import GRACE_S
from .instance_file import home
from .placement import NAMESPACE

DEFAULT_PORT = 50051
# A Ray of our own is for this machine alone. Ray takes 127.0.0.1 for "my address on the network" (on Linux), so
# another address of the loopback range says what is meant.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shardlift.cluster.up", description=__doc__)
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("SHARDLIFT_PORT") or DEFAULT_PORT))
    parser.add_argument("--ray-address")
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--num-gpus", type=int)
    parser.add_argument("--grace", type=float, default=GRACE_S)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()

    _at_end(stop)
    try:
        token_file = _token_file(options.host)
        if options.ray_address:
            _join(options.ray_address)
        else:
            _start_ray(options.num_cpus, options.num_gpus)
            # Ray puts its own in their place, which ends all of it at once.
            _at_end(stop)
        port = options.port or _free_port(options.host)
        address = start_controller(options.host, port, None if token_file is None else str(token_file), options.grace)
    except Exception as error:
        ours = to_error(error)
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}), flush=True)
        ray.shutdown()
        return 1
    answer: dict[str, Any] = {
        "address": address,
        "pid": None if options.ray_address else os.getpid(),
        "ray_address": ray.get_runtime_context().gcs_address,
        "token_file": token_file and str(token_file),
        "grace_s": options.grace,
    }
    print(json.dumps(answer), flush=True)
    if not options.ray_address:
        stopped.wait()
        stop_controller(unload=True)
    ray.shutdown()
    return 0


def _at_end(stop: Callable[..., None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _free_port(host: str) -> int:
    """A port for `--port 0`, chosen once: a gateway that is restarted must come back where it was."""
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
