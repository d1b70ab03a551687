"""Ray nodes as `ray start` makes them, with the job server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, ready: tuple[str, int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, from when it listens at `ready` on; terminated, or after 30 s killed with all of its group."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            if ready is not None:
                _wait_for(ready, process, log)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def _wait_for(address: tuple[str, int], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"nothing listens at {address}\n{log.read_text()}"
        time.sleep(0.2)


def submit(address: str, environment: Mapping[str, str], entrypoint: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Submits a job and waits for its end. Ray's job server answers a while before it can take one."""
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", address, "--", *entrypoint],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)
