"""A checkpoint in a folder: a local disk, or NFS."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from ...proto.v1.errors import CheckpointNotFoundError, CorruptCheckpointError, SourceError
from ..records import FileVersion
from .base import Cancel, check_name, check_range

_PIECE_BYTES = 16 << 20  # read at a time, so that a cancelled read ends soon


class FolderSource:
    """Files below `folder`. A file is opened for each read, so that nothing is held between reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __repr__(self) -> str:
        return f"FolderSource({str(self._folder)!r})"

    def stat(self, file: str) -> FileVersion:
        try:
            return self._version(file, os.stat(self._path(file)))
        except OSError as error:
            self._fail(file, error)

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        check_range(file, start, len(buffer), version)
        try:
            descriptor = os.open(self._path(file), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._check_version(file, descriptor, version)
                self._fill(file, descriptor, start, buffer, cancel or Cancel())
                self._check_version(file, descriptor, version)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._fail(file, error)

    def close(self) -> None:
        pass

    def _path(self, file: str) -> Path:
        return self._folder / check_name(file)

    def _version(self, file: str, status: os.stat_result) -> FileVersion:
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointNotFoundError(f"{self._folder / file} is not a file")
        return FileVersion(size_bytes=status.st_size, etag=f"{status.st_mtime_ns}-{status.st_size}")

    def _check_version(self, file: str, descriptor: int, version: FileVersion) -> None:
        found = self._version(file, os.fstat(descriptor))
        if found != version:
            raise CorruptCheckpointError(
                f"{self._folder / file} changed since the load began: {version.size_bytes} bytes and version "
                f"{version.etag} then, {found.size_bytes} bytes and version {found.etag} now; load it again"
            )

    def _fill(self, file: str, descriptor: int, start: int, buffer: memoryview, cancel: Cancel) -> None:
        done = 0
        while done < len(buffer):
            cancel.check(file)
            count = os.preadv(descriptor, [buffer[done : done + _PIECE_BYTES]], start + done)
            if count == 0:
                raise CorruptCheckpointError(
                    f"{self._folder / file} ends at byte {start + done}, before byte {start + len(buffer)}: "
                    "it was cut short while being read; load it again"
                )
            done += count

    def _fail(self, file: str, error: OSError) -> NoReturn:
        path = self._folder / file
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointNotFoundError(
                f"no file {path}: check the path, and that every node sees it (a shared file system)"
            ) from error
        raise SourceError(f"reading {path} failed: {error.strerror or type(error).__name__}") from error
