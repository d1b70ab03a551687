"""`python -m shardlift.cluster.down`: stops the local instance that the instance file names.

A Ray of its own goes, with the models on it. On a cluster that it had joined only the gateway goes: the models stay,
and the next gateway finds them. With --ray-address it is the gateway of that cluster, whatever the file names.

Prints one JSON line: {}, or with --ray-address {"address", "ray_address"}, the former null where no gateway was; or
{"error", "message"} and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

from ..proto.v1.errors import GatewayUnavailableError, InternalError
from ..proto.v1.status import to_error
from .instance_file import is_ours, read_instance

# Beyond the gateway's grace.
_STOP_TIMEOUT_S = 60.0


def stop_instance() -> None:
    """Raises InternalError when it doesn't end."""
    instance = read_instance()
    if instance is None:
        return
    pid = instance.get("pid")
    if pid is None:
        _leave(instance.get("ray_address") or "auto")
        return
    if not is_ours(int(pid)):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGTERM)
    limit_s = float(instance.get("grace_s") or 0.0) + _STOP_TIMEOUT_S
    deadline = time.monotonic() + limit_s
    while is_ours(int(pid)):
        if time.monotonic() > deadline:
            raise InternalError(f"process {pid} does not end within {limit_s:.0f} s of SIGTERM: kill it")
        time.sleep(0.1)


def _leave(ray_address: str) -> None:
    # A cluster that has gone has taken the gateway with it.
    with contextlib.suppress(GatewayUnavailableError):
        stop_gateway(ray_address)


def stop_gateway(ray_address: str) -> dict[str, Any]:
    """Stops the gateway of the cluster at `ray_address`, and says where both were. Raises GatewayUnavailableError where
    no cluster is."""
    import ray

    from .controller import stop_controller
    from .joining import join

    join(ray_address)
    try:
        return {"address": stop_controller(unload=False), "ray_address": ray.get_runtime_context().gcs_address}
    finally:
        ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(prog="shardlift.cluster.down", description=__doc__)
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    parser.add_argument("--ray-address")
    options = parser.parse_args()
    answer: dict[str, Any] = {}
    try:
        if options.ray_address:
            answer = stop_gateway(options.ray_address)
        else:
            stop_instance()
    except Exception as error:
        ours = to_error(error)
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}))
        return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
