"""Lines that another process adds to a file, as they come."""

from __future__ import annotations

import os
from pathlib import Path

# Of one look: what is far behind is passed on in pieces.
_MOST_BYTES = 1 << 20


class Follower:
    """The lines of the file at `path`, from its end as it is now on. It need not be there yet, and may be replaced by
    another, as logs are that are kept within bounds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._inode = 0
        self._rest = b""
        try:
            state = path.stat()
        except OSError:
            return
        self._at, self._inode = state.st_size, state.st_ino

    def lines(self) -> list[str]:
        """What was added since the last look, as far as its lines are whole."""
        added = b""
        try:
            if self.path.stat().st_ino != self._inode:
                # It was begun anew; what came before that is still in the one that made room.
                added = self._read(self.path.with_name(f"{self.path.name}.1")) if self._inode else b""
                self._at, self._inode = 0, self.path.stat().st_ino
            added += self._read(self.path)
        except OSError:
            pass
        *whole, self._rest = (self._rest + added).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]

    def _read(self, path: Path) -> bytes:
        """What was added to the file that is followed, if it is at `path`."""
        try:
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode:
                    return b""
                self._at = self._at if state.st_size >= self._at else 0
                file.seek(self._at)
                added = file.read(_MOST_BYTES)
        except OSError:
            return b""
        self._at += len(added)
        return added
