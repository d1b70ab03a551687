"""`python -m shardlift.cluster.down`: stops the local instance that the instance file names.

A Ray of its own goes, with the models on it. On a cluster that it had joined only the gateway goes: the models stay,
and the next gateway finds them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time

from ..proto.v1.errors import InternalError
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
    import ray

    from .controller import stop_controller
    from .placement import NAMESPACE

    try:
        ray.init(address=ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError):
        # The cluster has gone, and the gateway with it.
        return
    try:
        stop_controller(unload=False)
    finally:
        ray.shutdown()


def main() -> int:
    try:
        stop_instance()
    except Exception as error:
        ours = to_error(error)
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}))
        return 1
    print(json.dumps({}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
