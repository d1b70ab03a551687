"""A file of this machine's own tree, read by ranges: again, where a disk or a shared file system falters."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ...proto.v1.errors import CheckpointNotFoundError, CorruptCheckpointError, SourceError
from .base import Cancel
from .patience import ATTEMPTS, Failure, Patience, Sleep

# What a network file system answers while its server restarts, or moves, or is out of reach for a while. EMFILE and
# ENFILE pass too: other threads and processes close their files.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "EMFILE", "ENFILE", "ENOTCONN"),
        *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ESHUTDOWN", "EPIPE", "ENOLINK", "ECOMM", "EPROTO"),
    )
    if hasattr(errno, name)
)

_PIECE_BYTES = 16 << 20  # read at a time, so that a cancelled read ends soon
_REMEDY = "check the disk or the mount (its server, dmesg), then load again"


class DiskReader:
    """Reads files, with patience for what may pass.

    Args:
        attempts: that may fail in a row, without a byte gained, before `SourceError`.
        sleep: waits between attempts; by default a sleep that a `Cancel` ends.
    """

    def __init__(self, *, attempts: int = ATTEMPTS, sleep: Sleep | None = None) -> None:
        self._attempts, self._sleep = attempts, sleep

    def stat(self, path: Path) -> os.stat_result:
        """Raises CheckpointNotFoundError and SourceError."""
        patience = self._patience(f"the size of {path}", Cancel())
        while True:
            try:
                return os.stat(path)
            except OSError as error:
                self._failed(path, error, patience)

    def read_into(
        self, path: Path, start: int, buffer: memoryview, cancel: Cancel, check: Callable[[os.stat_result], None]
    ) -> None:
        """Fill the buffer with the file's bytes from `start` on.

        Args:
            check: given the open file's status before and after it is read; raises if it isn't the one that is meant.

        Raises:
            CorruptCheckpointError: the file ends before the buffer does.
            CheckpointNotFoundError, LoadCancelledError, SourceError, and what `check` raises.
        """
        patience = self._patience(f"bytes {start} to {start + len(buffer)} of {path}", cancel)
        done, is_checked = 0, False
        while not is_checked:
            patience.check(path.name)
            try:
                # Opened anew for each attempt: a stale handle stays stale.
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    check(os.fstat(descriptor))
                    while done < len(buffer):
                        count = os.preadv(descriptor, [buffer[done : done + _PIECE_BYTES]], start + done)
                        if count == 0:
                            raise CorruptCheckpointError(
                                f"{path} ends at byte {start + done}, before byte {start + len(buffer)}: "
                                "it was cut short while being read; load it again"
                            )
                        done += count
                        patience.gained(count)
                        patience.check(path.name)
                    check(os.fstat(descriptor))
                    is_checked = True
                finally:
                    os.close(descriptor)
            except OSError as error:
                self._failed(path, error, patience)

    def _patience(self, what: str, cancel: Cancel) -> Patience:
        return Patience(what, self._attempts, sleep=self._sleep, cancel=cancel, remedy=_REMEDY)

    def _failed(self, path: Path, error: OSError, patience: Patience) -> None:
        """Waits, where another attempt may go well."""
        if error.errno not in TRANSIENT:
            _refuse(path, error)
        patience.failed(Failure(cause=_text(error), error=error))


def _refuse(path: Path, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        raise CheckpointNotFoundError(
            f"no file {path}: check the path, and that every node sees it (a shared file system)"
        ) from error
    if isinstance(error, PermissionError):
        raise SourceError(
            f"reading {path} failed: {_text(error)}; this process runs as user {os.geteuid()}, who has no permission: "
            "let that user read the file and enter its folders"
        ) from error
    raise SourceError(f"reading {path} failed: {_text(error)}") from error


def _text(error: OSError) -> str:
    if error.errno is None:
        return str(error) or type(error).__name__
    return f"{error.strerror or os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})"
