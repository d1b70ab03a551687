"""The processes of a cluster's stage workers, as a line of JSON: {stage: pid}. In a process of its own: it needs Ray.

python -m bench.stage_pids RAY_ADDRESS
"""

from __future__ import annotations

import json
import os
import sys

import ray


def main() -> None:
    ray.init(address=sys.argv[1], namespace="shardlift", log_to_driver=False, logging_level="ERROR")
    pids = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("stage:"):
            worker = ray.get_actor(actor["name"], namespace=actor["namespace"])
            stage = int(actor["name"].rsplit(":", 1)[1].partition("~")[0])
            pids[stage] = ray.get(worker.__ray_call__.remote(lambda self: os.getpid()))
    print(json.dumps(pids), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
