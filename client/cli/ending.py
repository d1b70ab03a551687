"""How a command ends that is told to: Ctrl-C is Python's own KeyboardInterrupt, SIGTERM is made one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whatever gives back on Ctrl-C gives back on this."""


@contextlib.contextmanager
def ended_by_sigterm(said: str) -> Iterator[None]:
    """SIGTERM raises Terminated(`said`) in here, where the process would have ended without a word."""
    if threading.current_thread() is not threading.main_thread():
        # Signals are the main thread's: whoever runs a command elsewhere has its own way to end it.
        yield
        return

    def end(*_: object) -> None:
        # Who says it twice doesn't want to wait.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated(said)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
