"""A checkpoint in an object store or on a web server: whatever fsspec reads, by ranges.

A store doesn't pin versions as the Hub does: an object may be replaced while it is read. So the version is compared
when a process first reads a file, whenever an answer is not the one expected, and once more by `verify` after the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ...proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GatedCheckpointError,
    ShardliftError,
    SourceError,
)
from ..records import FileVersion
from . import answers
from .base import Cancel, check_name, check_range
from .once import OncePerFile
from .patience import ATTEMPTS, Failure, Patience, Sleep
from .store_errors import Meaning, Verdict, judge
from .stores import open_store
from .urls import parse_url

PIECE_BYTES = 8 << 20  # read at a time: each piece is copied once, out of what the library gives

# What stores call a file's version, the more exact first; then its content's hash, then its time of change.
_TAGS = (
    *("ETag", "etag", "e_tag", "generation"),
    *("md5Hash", "md5", "Content-MD5", "content_md5", "crc32c", "checksum"),
    *("LastModified", "last_modified", "Last-Modified", "mtime", "modifiedTime", "updated", "modified", "created"),
)
# gcsfs and Azure's client try again by themselves, and can't be told not to.
_PATIENT_SCHEMES = {"gs", "gcs", "abfs", "abfss", "az"}
_PATIENT_ATTEMPTS = 2
_REMEDIES = {
    "s3": "give every node credentials that may read it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a "
    "role), or set FSSPEC_S3_ANON=true there for a public bucket",
    "gs": "give every node credentials that may read it (GOOGLE_APPLICATION_CREDENTIALS or a service account), or set "
    "FSSPEC_GS_TOKEN=anon there for a public bucket",
}
_REMEDIES["s3a"], _REMEDIES["gcs"] = _REMEDIES["s3"], _REMEDIES["gs"]
_REMEDY = "give every node the credentials to read it, in its environment"


class RemoteSource:
    """Files below `location`, a URL as `urls.parse_url` takes it.

    Args:
        attempts: reads in a row that may fail, without a byte gained, before `SourceError`; None: as the store's own
            client needs it.
        connect_s, stall_s: limits on connecting, and on waiting for the next bytes, where the store's client has them.
        piece_s: limit on one answer, of at most `piece_bytes`.
        sleep: waits between attempts; by default a sleep that a `Cancel` ends.

    Raises:
        InvalidRequestError: no such kind of store, or its package isn't installed.
    """

    def __init__(
        self,
        location: str,
        *,
        subfolder: str = "",
        attempts: int | None = None,
        connect_s: float = 10.0,
        stall_s: float = 20.0,
        piece_s: float = 120.0,
        piece_bytes: int = PIECE_BYTES,
        sleep: Sleep | None = None,
    ) -> None:
        self._url = parse_url(location)
        self._subfolder = subfolder.strip("/")
        if attempts is None:
            attempts = _PATIENT_ATTEMPTS if self._url.scheme in _PATIENT_SCHEMES else ATTEMPTS
        self._attempts, self._sleep, self._piece_bytes = attempts, sleep, piece_bytes
        self._store = open_store(self._url, connect_s=connect_s, stall_s=stall_s, limit_s=piece_s)
        self._seen = OncePerFile[FileVersion]()
        self._may_read: bool | None = None

    def __repr__(self) -> str:
        return f"RemoteSource({self._url.text!r})"

    @property
    def link(self) -> str:
        return self._url.root

    def stat(self, file: str) -> FileVersion:
        version = self._ask(file, Cancel())
        self._seen.put(file, version)
        return version

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        check_range(file, start, len(buffer), version)
        cancel, path, done = cancel or Cancel(), self._path(file), 0
        self._compare_once(file, version, cancel)
        patience = self._patience(f"bytes {start} to {start + len(buffer)} of {path}", cancel)
        while done < len(buffer):
            cancel.check(file)
            piece = buffer[done : done + self._piece_bytes]
            data, verdict = b"", None
            try:
                data = self._store.read(path, start + done, start + done + len(piece), version.etag, cancel)
            except Exception as error:  # each library has its own
                verdict = judge(error)
            if verdict is not None:  # here, where no error of ours is chained to one that may quote secrets
                cancel.check(file)
                self._failed(file, verdict, patience, version)
                continue
            if len(data) > len(piece):
                raise SourceError(f"{path}: {len(data)} bytes came for {len(piece)}: its store can't read ranges")
            piece[: len(data)] = data
            done += len(data)
            patience.gained(len(data))
            if len(data) < len(piece):
                self._compare(file, version, cancel)
                patience.failed(Failure(cause="the answer ended early"))

    def verify(self, file: str, version: FileVersion) -> None:
        self._compare(file, version, Cancel())

    def close(self) -> None:
        self._store.close()

    # -- versions

    def _ask(self, file: str, cancel: Cancel) -> FileVersion:
        path = self._path(file)
        patience = self._patience(f"the size of {path}", cancel)
        found: Mapping[str, Any]
        while True:
            cancel.check(file)
            found, verdict = {}, None
            try:
                found = self._store.info(path, cancel)
            except Exception as error:
                verdict = judge(error)
            if verdict is not None:
                cancel.check(file)
                self._failed(file, verdict, patience)
                continue
            if found.get("type") == "directory":
                raise CheckpointNotFoundError(f"{path} is not a file")
            size = found.get("size")
            if not isinstance(size, int):
                raise SourceError(f"{self._url.root} tells no size of {path}: it can't be read by ranges")
            return FileVersion(size_bytes=size, etag=version_tag(found))

    def _compare_once(self, file: str, version: FileVersion, cancel: Cancel) -> None:
        """What this process saw of the file first must be the driver's version."""
        self._expect(file, version, self._seen.get(file, lambda: self._ask(file, cancel)))

    def _compare(self, file: str, version: FileVersion, cancel: Cancel) -> None:
        self._expect(file, version, self._ask(file, cancel))

    def _expect(self, file: str, version: FileVersion, found: FileVersion) -> None:
        if not version.is_same(found):
            raise CorruptCheckpointError(
                f"{self._path(file)} changed since the load began: {version.size_bytes} bytes and version "
                f"{version.etag[:80]} then, {found.size_bytes} bytes and version {found.etag[:80]} now; load it again"
            )

    # -- failures

    def _failed(self, file: str, verdict: Verdict, patience: Patience, version: FileVersion | None = None) -> None:
        """Waits, where another attempt may go well; else raises what the verdict means.

        Args:
            version: what is being read; None when that is only being asked for.
        """
        path = self._path(file)
        match verdict.meaning:
            case Meaning.MISSING:
                raise CheckpointNotFoundError(
                    f"there is no {path} ({verdict.cause}): check the bucket or server, the folder and the file"
                )
            case Meaning.DENIED:
                if version is None and self._may_read_other(file):
                    raise CheckpointNotFoundError(
                        f"{path} is not there, or not to be read ({verdict.cause}): without the right to list, a store "
                        "does not tell which"
                    )
                remedy = _REMEDIES.get(self._url.scheme, _REMEDY)
                raise GatedCheckpointError(f"{path} may not be read ({verdict.cause}): {remedy}")
            case Meaning.CHANGED if version is not None:
                self._compare(file, version, Cancel())
            case Meaning.LASTING | Meaning.CHANGED:
                raise SourceError(f"reading {path} failed for good: {verdict.cause}")
        patience.failed(Failure(cause=verdict.cause))

    def _may_read_other(self, file: str) -> bool:
        """Whether these credentials read the checkpoint at all: each has a config.json."""
        if file == "config.json":
            return False
        if self._may_read is None:
            try:
                self._ask("config.json", Cancel())
                self._may_read = True
            except ShardliftError:
                self._may_read = False
        return self._may_read

    # -- names

    def _path(self, file: str) -> str:
        check_name(file)
        return "/".join([self._url.text, *([self._subfolder] if self._subfolder else []), file])

    def _patience(self, what: str, cancel: Cancel) -> Patience:
        return Patience(what, self._attempts, sleep=self._sleep, cancel=cancel)


def version_tag(info: Mapping[str, Any]) -> str:
    """What tells this version of a file from another, by its store's own word; "" if it has none."""
    for name in _TAGS:
        value = info.get(name)
        if value:
            return answers.normalize_etag(value.isoformat() if isinstance(value, datetime) else str(value))
    return ""
