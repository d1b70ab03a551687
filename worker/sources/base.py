"""What a checkpoint's bytes are read through, whatever they lie on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Protocol

from ...proto.v1.errors import CorruptCheckpointError, LoadCancelledError
from ..records import FileVersion


class Cancel:
    """Set once, by whoever gives up on reads; the reads end at once, with `LoadCancelledError`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        with self._lock:
            self._event.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    def wait(self, seconds: float) -> bool:
        """Sleep, but not beyond `set`. True when set."""
        return self._event.wait(seconds)

    def check(self, file: str) -> None:
        if self.is_set:
            raise LoadCancelledError(f"reading {file} was cancelled")

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """While the context lasts, `set` calls `callback` too: what breaks off a read that blocks."""
        with self._lock:
            self._callbacks.append(callback)
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


class Source(Protocol):
    """A checkpoint's files. All methods are safe to call from several threads at once."""

    def stat(self, file: str) -> FileVersion:
        """The file's size and version as they are now.

        Raises:
            CheckpointNotFoundError, GatedCheckpointError, SourceError.
        """
        ...

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        """Fill the whole buffer with the file's bytes from `start` on.

        Raises:
            CorruptCheckpointError: the file is no longer `version`, or too short.
            LoadCancelledError: `cancel` was set meanwhile.
            CheckpointNotFoundError, GatedCheckpointError, SourceError.
        """
        ...

    def verify(self, file: str, version: FileVersion) -> None:
        """For after a file's last read: what was read was `version`.

        Where each read checks by itself, there is nothing left to do.

        Raises:
            CorruptCheckpointError: the file is no longer `version`.
            CheckpointNotFoundError, GatedCheckpointError, SourceError.
        """
        ...

    @property
    def link(self) -> str:
        """What the bytes come over, for people: "s3://bucket", "the Hub (huggingface.co)". Holds no secret."""
        ...

    def close(self) -> None: ...


def check_name(file: str) -> str:
    """`file`, if it stays inside the checkpoint: names come from index files, which anyone may have written."""
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in file or not file.isprintable():
        raise CorruptCheckpointError(f"file name {ascii(file)[:120]} leads out of the checkpoint: check its index file")
    return file


def check_range(file: str, start: int, byte_count: int, version: FileVersion) -> None:
    """The range lies inside the file: whoever asks has checked the header against the file's size."""
    assert start >= 0
    if start + byte_count > version.size_bytes:
        raise CorruptCheckpointError(
            f"{file}: bytes {start} to {start + byte_count} are wanted of a file of {version.size_bytes}; load it again"
        )
