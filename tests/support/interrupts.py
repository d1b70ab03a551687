"""Ctrl-C for the processes that a test starts."""

from __future__ import annotations

import signal


def heed() -> None:
    """For a child before it executes its command (Popen's preexec_fn): Ctrl-C reaches it.

    A shell has what it starts with & ignore Ctrl-C, these tests perhaps, and so whatever they start.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
