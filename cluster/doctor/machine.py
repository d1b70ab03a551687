"""One machine, examined by itself."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ...proto.v1.errors import one_line
from . import probes, verdicts
from .finding import Finding
from .seen import Facts

GATEWAY_PORT = 50051
_RAY_PORTS = ((6379, "Ray's head"), (8265, "Ray's job server"))


def examine(*, cuda_devices: Sequence[str] | None = None, with_ports: bool = False) -> tuple[list[Finding], Facts]:
    """All that can be said of this machine alone. with_ports: whether a gateway and a Ray head could start here."""
    requirements, python = probes.required()
    found = probes.versions(requirements)
    driver, gpus = probes.driver(cuda_devices)
    torch_gpus = 0

    def kernels() -> list[Finding]:
        nonlocal torch_gpus
        seen = probes.kernels(cuda_devices)
        torch_gpus = seen.torch_gpus
        return verdicts.kernels(seen, driver, len(gpus))

    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", lambda: verdicts.versions(found, requirements, python)),
        ("kernels", kernels),
        ("cache", lambda: [verdicts.cache(probes.cache())]),
        ("shared-memory", lambda: _shared_memory(Path("/dev/shm"))),
        ("hub", lambda: [verdicts.hub(probes.hub())]),
    ]
    if with_ports:
        checks.append(("ports", _ports))
    findings = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:
            traceback.print_exc()
            findings.append(
                Finding(
                    check=name,
                    verdict="fail",
                    finding=f"the check itself failed: {type(error).__name__}: {one_line(error, 200)}",
                    remedy="this is a defect of shardlift's: report it with the lines on stderr",
                )
            )
    return findings, Facts(versions=found, driver=driver, gpus=gpus, torch_gpus=torch_gpus)


def _shared_memory(folder: Path) -> list[Finding]:
    return [verdicts.shared_memory(probes.disk(folder))] if folder.exists() else []


def _ports() -> list[Finding]:
    named = os.environ.get("SHARDLIFT_PORT", "")
    number = int(named) if named.isdecimal() and 0 < int(named) < 65536 else GATEWAY_PORT
    wanted = [(number, "the gateway"), *_RAY_PORTS]
    return [verdicts.port(probes.port("127.0.0.1", number, what)) for number, what in wanted]
