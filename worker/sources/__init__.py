"""Where a checkpoint's bytes come from: a folder, the Hugging Face Hub or an object store, read by ranges."""

from __future__ import annotations

from pathlib import Path

from ...proto.v1.errors import CorruptCheckpointError, InvalidRequestError
from ..records import HubToken, SourceSpec
from .base import Cancel, Source
from .folder import FolderSource
from .hub import HubSource
from .remote import RemoteSource

__all__ = ["Cancel", "FolderSource", "HubSource", "RemoteSource", "Source", "open_source", "read_file"]


def open_source(spec: SourceSpec, token: HubToken) -> Source:
    """The source that `spec` describes. `token` is for the Hub alone."""
    match spec.kind:
        case "folder":
            return FolderSource(Path(spec.location) / spec.subfolder)
        case "hub":
            return HubSource(
                spec.location,
                spec.commit,
                subfolder=spec.subfolder,
                endpoint=spec.endpoint or None,
                token=token,
                cache_dir=spec.cache_dir,
                is_cached_only=spec.is_cached_only,
                local_files_only=spec.local_files_only,
            )
        case "url":
            return RemoteSource(spec.location, subfolder=spec.subfolder)
    raise InvalidRequestError(f"no source of kind {spec.kind!r}: it is folder, hub or url")


def read_file(source: Source, file: str, limit_bytes: int) -> bytes:
    """A small file, whole. Raises CorruptCheckpointError for one over `limit_bytes`."""
    version = source.stat(file)
    if version.size_bytes > limit_bytes:
        raise CorruptCheckpointError(f"{file} has {version.size_bytes:,} bytes; at most {limit_bytes:,} are read")
    data = bytearray(version.size_bytes)
    source.read_into(file, 0, memoryview(data), version)
    return bytes(data)
