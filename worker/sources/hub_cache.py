"""The Hub's cache on this machine, as huggingface_hub keeps it: what is whole there needs no network.

    <cache>/models--org--name/refs/<revision>                 holds the commit
                              snapshots/<commit>/<file>       -> ../../blobs/<ETag>; a plain file where links can't be
                              .no_exist/<commit>/<file>       the commit is known not to have this file

Only read here: huggingface_hub alone writes it. A download that is under way, or was broken off, is not below
`snapshots`. What is there may have been cut short all the same (a full disk), so it is looked at before it is believed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from ...proto.v1.errors import CorruptCheckpointError, ShardliftError, UnsupportedModelError
from ..headers import LENGTH_BYTES, header_length, parse_header
from ..records import FileVersion
from .base import Cancel, check_name
from .disk import DiskReader

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASHED_BYTES = 64 << 20  # a tokenizer's size; larger files are weights, whose header tells their length


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFile:
    """`version.etag` is "" where the cache doesn't tell it."""

    path: Path
    version: FileVersion


class HubCache:
    """The files of one commit of `repo_id` that are on this machine.

    Args:
        cache_dir: the cache's folder; "" for huggingface_hub's own (HF_HUB_CACHE).
    """

    def __init__(
        self, repo_id: str, commit: str, *, subfolder: str = "", cache_dir: str = "", reader: DiskReader | None = None
    ) -> None:
        repository = _repository(repo_id, cache_dir)
        self._snapshot = repository / "snapshots" / commit
        self._missing = repository / ".no_exist" / commit
        self._subfolder, self._reader = subfolder, reader or DiskReader()

    @property
    def folder(self) -> Path:
        """Where the commit's files lie, if any do."""
        return self._snapshot

    def has_snapshot(self) -> bool:
        return self._snapshot.is_dir()

    def lacks(self, file: str) -> bool:
        """Whether the Hub once said that the commit has no such file."""
        return (self._missing / self._subfolder / check_name(file)).is_file()

    def find(self, file: str) -> CachedFile | None:
        """The file, if it is there; whether it is whole is not asked."""
        path = self._snapshot / self._subfolder / check_name(file)
        try:
            status = os.stat(path)
            link = Path(os.readlink(path)) if path.is_symlink() else None
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        etag = link.name if link is not None and link.parent.name == "blobs" else ""
        return CachedFile(path=path, version=FileVersion(size_bytes=status.st_size, etag=etag))

    def find_whole(self, file: str) -> CachedFile | None:
        """The file, if it is there and nothing shows that it is damaged. Reads a small file, and of weights the header.

        For whoever doesn't know the file's version from elsewhere.
        """
        found = self.find(file)
        try:
            return found if found is not None and self._is_whole(found) else None
        except ShardliftError:
            return None

    def read_into(self, cached: CachedFile, start: int, buffer: memoryview, cancel: Cancel) -> None:
        """Fill the buffer. Raises CorruptCheckpointError for another size than `find` saw, and what a disk may."""

        def check(status: os.stat_result) -> None:
            if status.st_size != cached.version.size_bytes:
                raise CorruptCheckpointError(
                    f"{cached.path} changed while it was read: {cached.version.size_bytes} bytes then, "
                    f"{status.st_size} now"
                )

        self._reader.read_into(cached.path, start, buffer, cancel, check)

    def _is_whole(self, cached: CachedFile) -> bool:
        size, etag = cached.version.size_bytes, cached.version.etag
        if cached.path.suffix == ".safetensors":
            try:
                length = header_length(self._read(cached, 0, min(LENGTH_BYTES, size)), size, cached.path.name)
                parse_header(self._read(cached, LENGTH_BYTES, length), file=cached.path.name, file_bytes=size)
            except UnsupportedModelError:
                pass  # sound, and refused by whoever reads it
            return True
        if size > _HASHED_BYTES or len(etag) not in (40, 64):
            return True
        data = self._read(cached, 0, size)
        if len(etag) == 64:
            return hashlib.sha256(data).hexdigest() == etag
        return hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False).hexdigest() == etag

    def _read(self, cached: CachedFile, start: int, byte_count: int) -> bytes:
        data = bytearray(byte_count)
        self.read_into(cached, start, memoryview(data), Cancel())
        return bytes(data)


def cached_commit(repo_id: str, revision: str, cache_dir: str = "") -> str:
    """The commit that `revision` meant when the cache last saw it, if files of it are there; else ""."""
    repository = _repository(repo_id, cache_dir)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return ""
    return commit if _COMMIT.fullmatch(commit) and (repository / "snapshots" / commit).is_dir() else ""


def cache_folder(cache_dir: str = "") -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser()


def _repository(repo_id: str, cache_dir: str) -> Path:
    return cache_folder(cache_dir) / f"models--{repo_id.replace('/', '--')}"
