"""Machines on this machine: Linux network namespaces with addresses of their own, joined by a bridge."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# Of a range that nobody routes (RFC 2544: for benchmarks between devices).
_NETWORK = "198.18.{third}.{last}"


@dataclass(frozen=True)
class Machine:
    """A network namespace, with a /tmp/ray of its own. Other files, and processes, are the host's."""

    address: str
    namespace: str
    cable: str  # the host's end of it
    sessions: Path  # what its /tmp/ray is

    @contextlib.contextmanager
    def running(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        ready: tuple[str, int] | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process there, from when it listens at `ready` on; terminated, or after 30 s killed with its group."""
        from .ray_start import running

        # Mounts are the process's own after `ip netns exec`.
        mounted = 'mount --bind "$0" /tmp/ray && exec "$@"'
        words = ["ip", "netns", "exec", self.namespace, "sh", "-c", mounted, str(self.sessions), *command]
        with running(words, environment, log, ready=ready) as process:
            yield process

    def end(self) -> None:
        """Ends all that runs there, as a power cut would."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        for pid in done.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Nothing comes in or goes out any more, and nobody is told."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        _ip("link", "set", self.cable, "up")


@contextlib.contextmanager
def machines(count: int, folder: Path) -> Iterator[list[Machine]]:
    """As many machines, which reach each other and this process. Skips the test where the user may not make them.

    folder: for what Ray writes, with a short path, for it has sockets there.
    """
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    tag = secrets.token_hex(2)
    third = secrets.randbelow(250)
    bridge = f"sl{tag}"
    found: list[Machine] = []
    Path("/tmp/ray").mkdir(exist_ok=True)
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this user may not make network namespaces: {error.stderr.strip()}")
        _ip("addr", "add", f"{_NETWORK.format(third=third, last=1)}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index in range(count):
            machine = Machine(
                address=_NETWORK.format(third=third, last=index + 2),
                namespace=f"sl{tag}{index}",
                cable=f"sl{tag}v{index}",
                sessions=folder / str(index),
            )
            machine.sessions.mkdir(parents=True)
            _ip("netns", "add", machine.namespace)
            found.append(machine)
            _ip("link", "add", machine.cable, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace)
            _ip("link", "set", machine.cable, "master", bridge, "up")
            inside = ("-n", machine.namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "route", "add", "default", "via", _NETWORK.format(third=third, last=1))
        yield found
    finally:
        for machine in found:
            machine.end()  # a namespace lives as long as its processes
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", machine.namespace)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
