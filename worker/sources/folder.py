"""A checkpoint in a folder: a local disk, or NFS."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ...proto.v1.errors import CheckpointNotFoundError, CorruptCheckpointError
from ..records import FileVersion
from .base import Cancel, check_name, check_range
from .disk import DiskReader
from .patience import ATTEMPTS, Sleep


class FolderSource:
    """Files below `folder`. A file is opened for each read, so that nothing is held between reads.

    Args:
        attempts: reads in a row that may fail in a way that passes, without a byte gained, before `SourceError`.
        sleep: waits between attempts; by default a sleep that a `Cancel` ends.
    """

    def __init__(self, folder: Path, *, attempts: int = ATTEMPTS, sleep: Sleep | None = None) -> None:
        self._folder = folder
        self._reader = DiskReader(attempts=attempts, sleep=sleep)

    def __repr__(self) -> str:
        return f"FolderSource({str(self._folder)!r})"

    @property
    def link(self) -> str:
        return f"folder {self._folder}"

    def stat(self, file: str) -> FileVersion:
        return self._version(file, self._reader.stat(self._path(file)))

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        check_range(file, start, len(buffer), version)

        def check(status: os.stat_result) -> None:
            found = self._version(file, status)
            if found != version:
                raise CorruptCheckpointError(
                    f"{self._folder / file} changed since the load began: {version.size_bytes} bytes and version "
                    f"{version.etag} then, {found.size_bytes} bytes and version {found.etag} now; load it again"
                )

        self._reader.read_into(self._path(file), start, buffer, cancel or Cancel(), check)

    def verify(self, file: str, version: FileVersion) -> None:
        """Each read has checked it, before and after."""

    def close(self) -> None:
        pass

    def _path(self, file: str) -> Path:
        return self._folder / check_name(file)

    def _version(self, file: str, status: os.stat_result) -> FileVersion:
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointNotFoundError(f"{self._folder / file} is not a file")
        return FileVersion(size_bytes=status.st_size, etag=f"{status.st_mtime_ns}-{status.st_size}")
