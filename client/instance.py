"""The local instance: one gateway per user and machine, that `from_pretrained` starts when there is no other.

A small file names it, so that every process of the user finds it. What runs behind it is cluster/'s: this file is the
whole of the boundary, and it is crossed by running `python -m shardlift.cluster.up` and `… .down`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..proto.v1 import status
from ..proto.v1.errors import GatewayUnavailableError, InternalError, InvalidRequestError, ShardliftError
from . import channel

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 120.0
_HEALTH_TIMEOUT_S = 2.0
_POLL_S = 0.05
# Of a gateway that is kept: Ray brings back one whose process has died, within seconds.
_WATCH_S = 2.0
_MISSES = 5
_RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A gateway that this user started, or joined, on this machine."""

    address: str
    # The process that keeps the local Ray alive; None when the gateway joined a cluster that lives on its own.
    pid: int | None = None
    ray_address: str | None = None
    token_file: str | None = None
    # Where it answers health checks in plain text, if its own port speaks TLS.
    health: str | None = None
    # The flags for TLS and remote code that it was started with.
    security: Mapping[str, Any] | None = None
    # URL of the page that shows the cluster.
    page: str | None = None
    # For how long a stop lets running calls go on.
    grace_s: float = 0.0

    @property
    def token(self) -> str | None:
        """The gateway's token, read from its file."""
        if self.token_file is None:
            return None
        try:
            return Path(self.token_file).read_text(encoding="utf-8").strip() or None
        except OSError:
            return None


def home() -> Path:
    """The folder of the local instance: $SHARDLIFT_HOME, else ~/.shardlift."""
    return Path(os.environ.get("SHARDLIFT_HOME") or Path.home() / ".shardlift")


def recorded() -> Instance | None:
    """The instance that the file names, whether or not it still answers."""
    try:
        values = json.loads((home() / "instance.json").read_text(encoding="utf-8"))
        return _from_dict(values)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find() -> Instance | None:
    """The instance that answers, if there is one. Forgets one that is gone for good."""
    instance = recorded()
    if instance is None:
        return None
    if _answers(instance):
        return instance
    if instance.pid is None or not _alive(instance.pid):
        _forget(instance)
    return None


def find_or_start() -> Instance:
    """The instance that answers, else a new one; inside a Ray job, the gateway of the job's own cluster."""
    ray_address = ray_job_address()
    instance = find()
    if instance is not None and (ray_address is None or ray_address in ("auto", instance.ray_address)):
        return instance
    return start(ray_address=ray_address)


def ray_job_address() -> str | None:
    """The address of the Ray cluster that this process runs in as a job; None when it runs in none."""
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    return "auto" if os.environ.get("RAY_JOB_ID") else None


def start(
    *,
    host: str | None = None,
    port: int | None = None,
    ray_address: str | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    page_port: str | None = None,
    log_format: str | None = None,
    log_level: str | None = None,
    grace_s: float | None = None,
    timeout_s: float = START_TIMEOUT_S,
    **security: str | int | bool | None,
) -> Instance:
    """Starts a gateway, on a Ray of its own or on the cluster at `ray_address`, and returns once it answers.

    security: the flags of `shardlift up` for TLS and remote code, with underscores. An instance that is up already and
    meets the request is returned as it is. Raises what the start failed with,
    InvalidRequestError when another instance is in the way, GatewayUnavailableError when it takes over `timeout_s`.
    """
    with _lock():
        running = find()
        if running is not None and ray_address is None:
            if port is not None and not running.address.endswith(f":{port}"):
                raise InvalidRequestError(
                    f"a local instance already runs at {running.address}: run `shardlift down` before another port"
                )
            if security and security != running.security:
                raise InvalidRequestError(
                    f"a local instance already runs at {running.address}: run `shardlift down` before other flags for "
                    "TLS or remote code"
                )
            return running
        stuck = recorded()
        if running is None and stuck is not None:
            raise GatewayUnavailableError(
                f"the local instance (process {stuck.pid}) doesn't answer at {stuck.address}: run `shardlift down`"
            )
        options = {
            "--host": host,
            "--port": port,
            "--ray-address": ray_address,
            "--num-cpus": num_cpus,
            "--num-gpus": num_gpus,
            **{f"--{name.replace('_', '-')}": value for name, value in security.items()},
            "--page-port": page_port,
            "--log-format": log_format,
            "--log-level": log_level,
            "--grace": grace_s,
        }
        arguments = [text for name, value in options.items() if value is not None for text in _words(name, value)]
        instance = replace(_launch(arguments, timeout_s), security=security or None)
        # A cluster joined from a job must not make us forget the Ray of our own that `down` has to stop.
        if running is None or running.pid is None:
            _record(instance)
        return instance


def _words(name: str, value: object) -> list[str]:
    """As they stand on a command line."""
    if isinstance(value, bool):
        return [name] if value else []
    return [name, str(value)]


def stop() -> Instance | None:
    """Stops the local instance and returns what it was; None when there was none. Raises what the stop failed with."""
    with _lock():
        instance = recorded()
        if instance is None:
            return None
        command = [sys.executable, "-m", "shardlift.cluster.down", "--json"]
        limit_s = instance.grace_s + STOP_TIMEOUT_S
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise InternalError(f"the local instance did not stop within {limit_s:g} s") from None
        if done.returncode != 0:
            raise _failure(done.stdout, done.stderr, "the local instance did not stop")
        _forget(instance)
        return instance


def keep(on_change: Callable[[Instance | ShardliftError], None], **options: Any) -> None:
    """As `start`, with its arguments, but stays: a gateway that has gone is started again, and a cluster that isn't
    there is waited for. KeyboardInterrupt ends it, and stops the gateway.

    `on_change` is told of each start, and of each that failed for now. Raises what the first start failed with for
    good, and what the stop failed with.
    """
    was_up = False
    try:
        while True:
            try:
                running = start(**options)
            except ShardliftError as error:
                if not was_up and not isinstance(error, GatewayUnavailableError):
                    raise
                on_change(error)
                time.sleep(_RETRY_S)
                continue
            was_up = True
            on_change(running)
            _watch(running)
    except KeyboardInterrupt:
        stop()


def _watch(running: Instance) -> None:
    """Returns once the gateway has gone."""
    misses = 0
    while misses < _MISSES:
        time.sleep(_WATCH_S)
        misses = 0 if _answers(running) else misses + 1


def last_json_line(text: str) -> dict[str, Any] | None:
    """The last line of `text` that is a JSON object: libraries may print lines of their own around it."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            if line.startswith("{") and isinstance(value := json.loads(line), dict):
                return value
    return None


def _launch(arguments: list[str], timeout_s: float) -> Instance:
    # Output goes to files, not pipes: the process outlives us and must be able to go on writing.
    output, log = home() / "up.out", home() / "up.log"
    command = [sys.executable, "-m", "shardlift.cluster.up", "--json", *arguments]
    with output.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            returncode = process.poll()  # before reading: what was printed before the end is then seen
            answer = last_json_line(output.read_text(encoding="utf-8", errors="replace"))
            if answer is not None and "address" in answer:
                process.returncode = process.returncode or 0  # it stays on purpose: no ResourceWarning
                return _from_dict(answer)
            if returncode is not None:
                text = output.read_text(encoding="utf-8", errors="replace")
                raise _failure(
                    text, log.read_text(encoding="utf-8", errors="replace"), f"no local instance came up (see {log})"
                )
            if time.monotonic() > deadline:
                raise GatewayUnavailableError(f"no local instance came up within {timeout_s:g} s (see {log})")
            time.sleep(_POLL_S)
    except BaseException:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise


def _failure(stdout: str, stderr: str, otherwise: str) -> Exception:
    answer = last_json_line(stdout)
    if answer is not None and "error" in answer:
        return status.from_reason(str(answer["error"]), str(answer.get("message", otherwise)))
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "it said nothing")
    return InternalError(f"{otherwise}: {last[:300]}")


def _from_dict(values: dict[str, Any]) -> Instance:
    return Instance(
        address=str(values["address"]),
        pid=None if values.get("pid") is None else int(values["pid"]),
        ray_address=values.get("ray_address"),
        token_file=values.get("token_file"),
        health=values.get("health"),
        security=values.get("security"),
        page=values.get("page"),
        grace_s=float(values.get("grace_s") or 0.0),
    )


def _record(instance: Instance) -> None:
    path = home() / "instance.json"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(instance)) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _forget(instance: Instance) -> None:
    if recorded() == instance:
        (home() / "instance.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    # Two processes that find no instance at the same moment start one between them.
    home().mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _answers(instance: Instance) -> bool:
    address = instance.health or instance.address
    with channel.open_channel(address, None) as connection:
        return channel.answers(connection, _HEALTH_TIMEOUT_S, wait=False)
