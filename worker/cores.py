"""How many threads a stage computes with."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from ..proto.v1.errors import InvalidRequestError

THREADS = "SHARDLIFT_THREADS"
_MOST_THREADS = 4096


# Any of these, and somebody has settled how OpenMP's threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def settle_threads(environment: MutableMapping[str, str], *, shares_cores: bool = False) -> None:
    """Has OpenMP take `$SHARDLIFT_THREADS` threads; without it all usable cores, unless OMP_NUM_THREADS says otherwise.

    shares_cores: another stage computes on them, too. Then threads that wait for work sleep. By themselves they spin
    for milliseconds, which is sooner where they have their cores to themselves, and where they don't leaves all stages
    a fraction of their speed. What is computed is the same. To be called before torch is imported: OpenMP reads this
    when it is loaded, for bitsandbytes' kernels too. Raises InvalidRequestError for what is no number of threads.
    """
    if shares_cores and not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "passive"
    if given := environment.get(THREADS):
        if not given.isdecimal() or not 0 < int(given) <= _MOST_THREADS:
            raise InvalidRequestError(f"{THREADS} is {given[:80]!r}: a number from 1 to {_MOST_THREADS} is needed")
        environment["OMP_NUM_THREADS"] = str(int(given))
    elif environment.get("OMP_NUM_THREADS") == "1":
        # Ray's word for an actor that has reserved no CPU; a stage computes as a process of its own would.
        environment["OMP_NUM_THREADS"] = str(usable_cores())


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, within its container's share (cgroup v2) of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        # No such file, or "max": no limit.
        return cores
