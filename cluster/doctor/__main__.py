"""`python -m shardlift.cluster.doctor`: examines this machine, or with --ray-address every node of a Ray cluster.

Prints a JSON line for each finding, as it comes. Exit status 1 where one of them is a fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from ...proto.v1.errors import one_line
from .finding import Finding


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shardlift.cluster.doctor", description=__doc__)
    parser.add_argument("--ray-address", help="examine this cluster's nodes, not this machine")
    parser.add_argument("--timeout", type=float, default=0.0, help="for each node's answers, in seconds")
    options = parser.parse_args(arguments)
    failed = False

    def tell(findings: list[Finding]) -> None:
        nonlocal failed
        for finding in findings:
            failed = failed or finding.verdict == "fail"
            print(json.dumps(finding.to_dict()), flush=True)

    if options.ray_address is None:
        from .machine import examine

        tell(examine(with_ports=True)[0])
    else:
        asyncio.run(_cluster(options.ray_address, options.timeout, tell))
    return int(failed)


async def _cluster(address: str, timeout_s: float, tell: object) -> None:
    import ray

    from ..joining import join
    from .cluster import diagnose

    assert callable(tell)
    try:
        join(address)
    except Exception as error:
        tell(
            [
                Finding(
                    check="ray",
                    verdict="fail",
                    finding=one_line(error),
                    remedy="look at the address, at Ray's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN), and at the versions "
                    "of Ray and Python, which must be the cluster's",
                )
            ]
        )
        return
    try:
        tell([Finding(check="ray", verdict="ok", finding=f"Ray {ray.__version__} answers at {address}")])
        async for findings in diagnose(timeout_s):
            tell(findings)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
