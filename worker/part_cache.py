"""Quantized parts that this node keeps: a second load, or a respawn, reads them in place of the checkpoint."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..proto.v1.errors import CorruptCheckpointError, InvalidRequestError, one_line
from .byte_sizes import parse_size
from .part_file import FORMAT, PartFile, write_part
from .sources import Cancel
from .spec import CachedPart, StageSpec

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SHARDLIFT_CACHE"
LIMIT_VARIABLE = "SHARDLIFT_CACHE_SIZE"

_SUFFIX = ".safetensors"
_TEMPORARY = ".writing"
_ABANDONED_S = 3600.0  # nothing is being written for so long without a change
_DISK_SHARE = 0.3  # of its disk, unless a size is given
_KEEP_FREE = 0.05  # of its disk, whatever size is given


def key_of(spec: StageSpec, device_class: str, versions: Mapping[str, str]) -> str:
    """What a part depends on, all of it, as a file's name: bytes, their order, what is done to them, and by what."""
    said = {
        "format": FORMAT,
        "source": [spec.source.kind, spec.source.location, spec.source.subfolder, spec.source.commit],
        "endpoint": spec.source.endpoint,
        "records": [
            [record.key, record.file, record.dtype, record.shape, record.start, record.end] for record in spec.records
        ],
        "files": {name: [version.size_bytes, version.etag] for name, version in spec.versions.items()},
        "cut": [spec.cut.first, spec.cut.end, spec.cut.num_layers],
        "config": spec.config,
        "quantization": spec.quantization,
        "quantize_experts": spec.quantize_experts,
        "code": spec.code.key if spec.code is not None else None,
        "packing": asdict(spec.packing) if spec.packing else None,
        "dtype": spec.dtype,
        "device": device_class,
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:40]


def is_worth_keeping(spec: StageSpec) -> bool:
    """Whether a part is smaller than what it is made of, and stays what it is.

    No node keeps a checkpoint's own bytes, such as those that are quantized there already. Some stores tell no version
    of a file: what is kept could then be of another one of the same size.
    """
    return bool(spec.quantization) and all(version.etag for version in spec.versions.values())


class PartCache:
    """Parts in `folder`, at most `limit_bytes` together; those unused for longest go first.

    Several processes may use one folder. A cache that fails (no room, no permission) is no reason for a load to fail:
    nothing here raises but what a defect would.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> PartCache | None:
        """The cache that $SHARDLIFT_CACHE names (a folder, or "off") with $SHARDLIFT_CACHE_SIZE bytes ("100GiB").

        By default ~/.cache/shardlift, and 30 % of its disk. Raises InvalidRequestError for a size that is none.
        """
        named = environment.get(FOLDER_VARIABLE, "").strip()
        if named.lower() == "off":
            return None
        try:
            base = named or environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
            folder = Path(base).expanduser() if named else Path(base) / "shardlift"
        except RuntimeError as error:
            logger.warning("no quantized part is kept here (%s): set %s to a folder", error, FOLDER_VARIABLE)
            return None
        text = environment.get(LIMIT_VARIABLE, "").strip()
        if text:
            try:
                return cls(folder, parse_size(text))
            except InvalidRequestError:
                raise InvalidRequestError(f"{LIMIT_VARIABLE}={text!r} is no size: write e.g. 100GiB") from None
        return cls(folder, int(_disk(folder).total * _DISK_SHARE))

    def find(self, key: str) -> PartFile | None:
        """The part, open, and marked as used; None if there is none that is sound."""
        path = self._path(key)
        try:
            part = PartFile(path)
        except FileNotFoundError:
            return None
        except (OSError, CorruptCheckpointError) as error:
            logger.warning("dropping a cached part: %s", one_line(error))
            self.drop(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return part

    def drop(self, key: str) -> None:
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def store(self, key: str, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any], cancel: Cancel) -> int:
        """Writes a part, whole or not at all, and makes room for it. Gives its bytes, 0 if it wasn't stored."""
        wanted = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if wanted > self.limit_bytes:
            logger.info("a part of %d bytes is not kept: %s=%d is smaller", wanted, LIMIT_VARIABLE, self.limit_bytes)
            return 0
        temporary = self.folder / f"{key}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._lock():
                self._make_room(wanted)
                disk = _disk(self.folder)
                if disk.free - wanted < disk.total * _KEEP_FREE:
                    logger.info("a part of %d bytes is not kept: its disk has %d bytes left", wanted, disk.free)
                    return 0
                # While nobody else counts what is free.
                _take_room(temporary, wanted)
            try:
                written = write_part(temporary, tensors, about, cancel)
                # No fsync: after a power cut the checksums tell what never reached the disk.
                os.replace(temporary, self._path(key))
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a part could not be kept in %s: %s", self.folder, one_line(error))
            return 0
        return written

    def entries(self) -> list[CachedPart]:
        """What is kept, the latest used first. Reads headers alone."""
        found = []
        for path in self._files(_SUFFIX):
            try:
                status = path.stat()
                part = PartFile(path)
            except (OSError, CorruptCheckpointError):
                continue  # going, or to be dropped by whoever wants it
            part.close()
            found.append(
                CachedPart(key=path.stem, size_bytes=status.st_size, used_s=status.st_mtime, about=dict(part.about))
            )
        return sorted(found, key=lambda entry: (-entry.used_s, entry.key))

    def clear(self) -> int:
        """Removes everything. Gives the bytes that it took."""
        with self._lock():
            freed = 0
            for path in [*self._files(_SUFFIX), *self._files(_TEMPORARY)]:
                with contextlib.suppress(OSError):
                    size = path.stat().st_size
                    path.unlink()
                    freed += size
            return freed

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _files(self, suffix: str) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.name.endswith(suffix)]
        except OSError:
            return []

    def _make_room(self, wanted: int) -> None:
        """Removes what was unused for longest until `wanted` bytes more fit; and what a killed writer has left."""
        held = 0
        for path in self._files(_TEMPORARY):
            with contextlib.suppress(OSError, ValueError):
                writer, status = int(path.name.removesuffix(_TEMPORARY).split(".")[1]), path.stat()
                age_s = time.time() - status.st_mtime
                # A container's processes have the numbers of an earlier one's.
                if age_s > _ABANDONED_S or (age_s > 60 and not _lives(writer)):
                    path.unlink()
                else:
                    held += status.st_size
        aged = []
        for path in self._files(_SUFFIX):
            with contextlib.suppress(OSError):
                status = path.stat()
                aged.append((status.st_mtime, status.st_size, path))
        held += sum(size for _, size, _ in aged)
        for _, size, path in sorted(aged):
            if held + wanted <= self.limit_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                held -= size

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Between the processes of this node. Where the folder can't be locked, without."""
        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield
            return
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _take_room(path: Path, size: int) -> None:
    """Makes the file, with the room that it will need. Raises OSError where there is none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            path.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Disk:
    total: int
    free: int


def _disk(folder: Path) -> _Disk:
    """The disk that `folder` lies on, or will."""
    for existing in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(existing)
            return _Disk(usage.total, usage.free)
    return _Disk(0, 0)


def _lives(process: int) -> bool:
    """On this machine; a folder that several machines share may hold another's file: hence the age as well."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
