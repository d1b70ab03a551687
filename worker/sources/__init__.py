"""Where a checkpoint's bytes come from: a folder, or the Hugging Face Hub, read by ranges."""

from __future__ import annotations

from pathlib import Path

from ...proto.v1.errors import InvalidRequestError
from ..records import HubToken, SourceSpec
from .base import Cancel, Source
from .folder import FolderSource
from .hub import HubSource

__all__ = ["Cancel", "FolderSource", "HubSource", "Source", "open_source"]


def open_source(spec: SourceSpec, token: HubToken) -> Source:
    """The source that `spec` describes. `token` is for the Hub alone."""
    match spec.kind:
        case "folder":
            return FolderSource(Path(spec.location) / spec.subfolder)
        case "hub":
            return HubSource(
                spec.location, spec.commit, subfolder=spec.subfolder, endpoint=spec.endpoint or None, token=token
            )
    raise InvalidRequestError(f"no source of kind {spec.kind!r}: it is folder or hub")
