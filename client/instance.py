"""The local instance: one gateway per user and machine, that `from_pretrained` starts when there is no other.

A small file names it, so that every process of the user finds it. What runs behind it is cluster/'s: this file is the
whole of the boundary, and it is crossed by running `python -m shardlift.cluster.up` and `… .down`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..proto.v1 import status
from ..proto.v1.errors import GatewayUnavailableError, InternalError, InvalidRequestError, ShardliftError
from . import channel
from .follow import Follower

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
    # Where the gateway's log lines are, on its machine.
    log_file: str | None = None
    # For how long a stop lets running calls go on.
    grace_s: float = 0.0
    # What its start had to say, one line each; told once, and not recorded.
    warnings: Sequence[str] = field(default=(), compare=False)

    @property
    def token(self) -> str | None:
        """The gateway's token, read from its file."""
        if self.token_file is None:
            return None
        try:
            return Path(self.token_file).read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def wants(self, token: str) -> bool:
        """Whether `token` is the gateway's, as far as its file can be read here."""
        if self.token_file is None:
            return False
        return self.token is None or hmac.compare_digest(self.token.encode(), token.encode())


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
    """The instance that answers, if there is one. Forgets one whose process has gone.

    A gateway on a cluster may be on its way up again: only `stop` forgets that.
    """
    instance = recorded()
    if instance is None:
        return None
    if _answers(instance):
        return instance
    if instance.pid is not None and not _alive(instance.pid):
        _forget(instance)
    return None


def find_or_start() -> Instance:
    """The instance that answers, else a new one; inside a Ray job, the gateway of the job's own cluster."""
    ray_address = ray_job_address()
    instance = find()
    if instance is not None and (ray_address is None or ray_address in ("auto", instance.ray_address)):
        return instance
    return start(ray_address=ray_address, any_token=True)


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
    any_token: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    **security: str | int | bool | None,
) -> Instance:
    """Starts a gateway, on a Ray of its own or on the cluster at `ray_address`, and returns once it answers.

    security: the flags of `shardlift up` for TLS and remote code, with underscores. any_token: $SHARDLIFT_TOKEN is what
    this client sends, and not what a gateway that runs has to want. An instance that is up already and meets the
    request is returned as it is. Raises what the start failed with, InvalidRequestError when another instance is in the
    way, GatewayUnavailableError when it takes over `timeout_s`.
    """
    with _lock():
        running = find()
        if running is not None and ray_address is None:
            _refuse_other(running, host, port, page_port, security, any_token)
            return running
        stuck = None if running is not None else recorded()
        if stuck is not None and (stuck.pid is not None or ray_address is None):
            raise GatewayUnavailableError(_not_answering(stuck))
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
            "--any-token": any_token,
        }
        arguments = [text for name, value in options.items() if value is not None for text in _words(name, value)]
        instance = replace(_launch(arguments, timeout_s), security=security or None)
        # A cluster joined from a job must not make us forget the Ray of our own that `down` has to stop.
        if running is None or running.pid is None:
            _record(instance)
        return instance


def _refuse_other(
    running: Instance,
    host: str | None,
    port: int | None,
    page_port: str | None,
    security: Mapping[str, Any],
    any_token: bool,
) -> None:
    """Raises InvalidRequestError where something else is asked for than what runs."""
    has_host, _, has_port = running.address.rpartition("://")[2].rpartition(":")
    page = "off" if running.page is None else str(urlsplit(running.page).port)
    token = None if any_token else os.environ.get("SHARDLIFT_TOKEN")
    others = {
        "another host": host is not None and host.strip("[]") != has_host.strip("[]"),
        "another port": port is not None and str(port) != has_port,
        "another port of the page": page_port not in (None, page) and (page_port != "0" or page == "off"),
        "another token": bool(token) and not running.wants(str(token)),
        "other flags for TLS or remote code": bool(security) and security != running.security,
    }
    if found := [what for what, is_other in others.items() if is_other]:
        raise InvalidRequestError(
            f"a local instance already runs at {running.address}: run `shardlift down` before {' and '.join(found)}"
        )


def _not_answering(instance: Instance) -> str:
    if instance.pid is not None:
        return f"the local instance (process {instance.pid}) doesn't answer at {instance.address}: run `shardlift down`"
    return (
        f"the gateway that this machine has joined, on the cluster at {instance.ray_address}, doesn't answer at "
        f"{instance.address}: wait if it is being restarted, join it again with `shardlift up --ray-address "
        f"{instance.ray_address}`, or have it forgotten with `shardlift down`"
    )


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
        _take_down([], instance.grace_s + STOP_TIMEOUT_S)
        _forget(instance)
        return instance


def stop_on(ray_address: str) -> str | None:
    """Stops the gateway of the cluster at `ray_address`, whoever started it, and returns its address; None where there
    was none. The models stay. Raises what the stop failed with, GatewayUnavailableError where no cluster is there."""
    with _lock():
        # How long its grace is, it knows: the process that asks it waits for that.
        answer = _take_down(["--ray-address", ray_address], None)
        instance = recorded()
        if instance is not None and instance.pid is None and instance.ray_address == answer.get("ray_address"):
            _forget(instance)
        address = answer.get("address")
        return None if address is None else str(address)


def _take_down(arguments: list[str], limit_s: float | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "shardlift.cluster.down", "--json", *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise InternalError(f"the local instance did not stop within {limit_s:g} s") from None
    if done.returncode != 0:
        raise _failure(done.stdout, done.stderr, "the gateway did not stop")
    return last_json_line(done.stdout) or {}


def keep(
    on_change: Callable[[Instance | ShardliftError], None],
    on_line: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> None:
    """As `start`, with its arguments, but stays: a gateway that has gone is started again, and a cluster that isn't
    there is waited for. KeyboardInterrupt ends it, and stops the gateway.

    `on_change` is told of each start, and of each that failed for now; `on_line` each line of the gateway's log, where
    that is on this machine. Raises what the first start failed with for good, and what the stop failed with.
    """
    was_up = False
    # From before the start on, of which it tells, too.
    log = Follower(home() / "gateway.log")
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
            if running.log_file is not None and Path(running.log_file) != log.path:
                log = Follower(Path(running.log_file))
            _watch(running, log, on_line)
    except KeyboardInterrupt:
        stop()
        for line in log.lines():
            on_line(line)


def _watch(running: Instance, log: Follower, on_line: Callable[[str], None]) -> None:
    """Returns once the gateway has gone."""
    misses = 0
    while misses < _MISSES:
        for line in log.lines():
            on_line(line)
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
        log_file=values.get("log_file"),
        grace_s=float(values.get("grace_s") or 0.0),
        warnings=tuple(values.get("warnings") or ()),
    )


def _record(instance: Instance) -> None:
    path = home() / "instance.json"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(replace(instance, warnings=()))) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _forget(instance: Instance) -> None:
    if recorded() == instance:
        (home() / "instance.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    # Two processes that find no instance at the same moment start one between them.
    try:
        home().mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (home() / "lock").open("w")
    except OSError as error:
        raise InvalidRequestError(
            f"the folder of the local instance, {home()}, can't be written: {error.strerror}; set SHARDLIFT_HOME to "
            "one that can"
        ) from None
    with file:
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
