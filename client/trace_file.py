"""The timeline of a load, written as it comes, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import os
from types import TracebackType

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidRequestError


class TraceFile:
    """One JSON object with the events of all stages. A load that fails leaves no file.

    Raises InvalidRequestError where `path` can't be written: before the load, not after it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        try:
            self._file = open(path, "wb")  # noqa: SIM115 - open as long as this is
        except OSError as error:
            raise InvalidRequestError(f"the trace can't be written to {os.fspath(path)!r}: {error.strerror}") from None
        self._file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
        self._events = self._inside = self._needs_comma = False

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write(b"]}\n")
        self._file.close()
        if kind is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def add(self, piece: registry_pb2.LoadTrace) -> None:
        """Pieces come stage by stage, each stage's in order: of an array whose brackets are left out here."""
        text = piece.json
        if not self._inside:
            text = text[1:]
            self._needs_comma = self._events
        self._inside = not piece.last
        if piece.last:
            text = text[:-1]
        if not text:
            return
        if self._needs_comma:
            self._file.write(b",\n")
            self._needs_comma = False
        self._events = True
        self._file.write(text)
