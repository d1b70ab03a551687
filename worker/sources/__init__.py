"""Where a checkpoint's bytes come from: a folder, the Hugging Face Hub or an object store, read by ranges."""

from __future__ import annotations

from pathlib import Path

from ...proto.v1.errors import InvalidRequestError
from ..records import HubToken, SourceSpec
from .base import Cancel, Source
from .folder import FolderSource
from .hub import HubSource
from .remote import RemoteSource

__all__ = ["Cancel", "FolderSource", "HubSource", "RemoteSource", "Source", "open_source"]


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
            )
        case "url":
            return RemoteSource(spec.location, subfolder=spec.subfolder)
    raise InvalidRequestError(f"no source of kind {spec.kind!r}: it is folder, hub or url")
