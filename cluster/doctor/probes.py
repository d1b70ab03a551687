"""What looks at a machine: each gives a value for a verdict, and raises nothing for what it finds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...proto.v1.errors import one_line
from ...worker.part_cache import PartCache
from ...worker.sources.answers import redact
from .seen import Disk, Gpu, Hub, Kernel, Kernels, Port
from .verdicts import ALIKE

_HUB_TIMEOUT_S = 15.0
_KERNELS_TIMEOUT_S = 180.0
_SMI_TIMEOUT_S = 20.0
_WRITTEN_BYTES = 1 << 20
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def required() -> tuple[list[str], str]:
    """What the package's metadata asks for, and of which Python; empty where there is no metadata."""
    try:
        metadata = importlib.metadata.metadata("shardlift")
    except importlib.metadata.PackageNotFoundError:
        return [], ""
    return metadata.get_all("Requires-Dist") or [], (metadata.get_all("Requires-Python") or [""])[0]


def versions(requirements: Sequence[str] = ()) -> dict[str, str]:
    """Of each package that matters, or is required: its version, "" where it isn't installed."""
    from ... import __version__

    named = {match[0] for text in requirements if (match := re.match(r"[\w.-]+", text))}
    found = {"python": platform.python_version(), "shardlift": __version__}
    for name in sorted(named | set(ALIKE) - set(found)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def disk(folder: Path) -> Disk:
    """What `folder` has room for; tried by writing there. It is made if it isn't there, and removed again."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".shardlift-doctor.") as file:
            file.write(bytes(_WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
        usage = shutil.disk_usage(existing)
    except OSError as error:
        return Disk(folder=str(folder), problem=error.strerror or type(error).__name__)
    return Disk(folder=str(folder), free_bytes=usage.free, total_bytes=usage.total)


def cache() -> Disk | None:
    """The disk of the folder of quantized parts; None where none is kept."""
    try:
        found = PartCache.from_environment()
    except Exception as error:
        return Disk(folder=os.environ.get("SHARDLIFT_CACHE", ""), problem=one_line(error, 200))
    return None if found is None else disk(found.folder)


def hub() -> Hub:
    """Asks the Hub who the token belongs to; what it answers without one shows that it is there."""
    from huggingface_hub import constants, get_session, get_token

    seen = Hub(
        endpoint=redact(constants.ENDPOINT),
        is_offline=bool(constants.HF_HUB_OFFLINE),
        proxies=tuple(name for name in _PROXIES if os.environ.get(name)),
    )
    if seen.is_offline:
        return seen
    token = get_token()
    if token and not (token.isascii() and token.isprintable()):
        # What would be said of the attempt may have it in it.
        return replace(seen, has_token=True, is_token_broken=True)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    began_s = time.monotonic()
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=_HUB_TIMEOUT_S)
    except Exception as error:
        return replace(seen, problem=redact(one_line(error, 200)), has_token=bool(token))
    return replace(seen, status=answer.status_code, seconds=time.monotonic() - began_s, has_token=bool(token))


def port(host: str, number: int, what: str) -> Port:
    """Whether somebody could listen at `number` of `host`, or who does."""
    try:
        with socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return Port(number=number, what=what, state="free")
    except OSError:
        is_ours = _is_gateway(host, number) if what == "the gateway" else _runs("gcs_server")
        return Port(number=number, what=what, state="ours" if is_ours else "taken")


def _is_gateway(host: str, number: int) -> bool:
    name = f"[{host}]" if ":" in host else host
    with grpc.insecure_channel(f"{name}:{number}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError as error:
            return error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND)
    return True


def _runs(program: str) -> bool:
    """Whether a program of that name runs on this machine, as far as /proc tells."""
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            if file.read_text().strip() == program:
                return True
        except OSError:
            continue
    return False


def kernels(cuda_devices: Sequence[str] | None = None) -> Kernels:
    """Tries bitsandbytes on the processor and each GPU. cuda_devices: those to be tried, as CUDA_VISIBLE_DEVICES has
    them; None for all."""
    # The path of this process: what a Ray job brings along is on it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if cuda_devices is None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cuda_devices)
    command = [sys.executable, "-m", "shardlift.cluster.doctor.kernels"]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_KERNELS_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Kernels(problem=f"no end of it within {_KERNELS_TIMEOUT_S:g} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Kernels(problem=(said[-1] if said else f"exit status {done.returncode}")[:300])
    values = json.loads(lines[-1])
    return Kernels(
        library=values["library"],
        cuda=values["cuda"],
        torch_gpus=values["torch_gpus"],
        devices=tuple(Kernel(**each) for each in values["devices"]),
    )


def driver(among: Sequence[str] | None = None) -> tuple[str, tuple[Gpu, ...]]:
    """The NVIDIA driver's version, and its GPUs (those `among`, as `read_driver`); "" and none without one."""
    command = [
        "nvidia-smi",
        "--query-gpu=index,uuid,driver_version,memory.used,memory.total,name",
        "--format=csv,noheader,nounits",
    ]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "", ()
    return read_driver(output, among)


def read_driver(output: str, among: Sequence[str] | None = None) -> tuple[str, tuple[Gpu, ...]]:
    """What nvidia-smi printed: a line for each GPU, memory in MiB. among: the GPUs that count, in their order, by index
    or by (the beginning of) their UUID, as CUDA_VISIBLE_DEVICES has them; None for all. A GPU's index is its place."""
    rows = [[cell.strip() for cell in line.split(",", 5)] for line in output.splitlines() if line.count(",") >= 5]
    if among is not None:
        rows = [row for each in among for row in rows if row[0] == each or (each and row[1].startswith(each))]
    gpus = tuple(
        Gpu(
            index=place,
            name=name,
            # "[N/A]" where the driver doesn't tell.
            used_bytes=int(used) << 20 if used.isdecimal() else 0,
            total_bytes=int(total) << 20 if total.isdecimal() else 0,
        )
        for place, (_, _, _, used, total, name) in enumerate(rows)
    )
    return (rows[0][2] if rows else ""), gpus
