"""The timeline of a load, written as it comes, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import os
import warnings
from types import TracebackType

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidRequestError
from .outside import outside_level


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
        self._failure: OSError | None = None
        self._write(b'{"displayTimeUnit":"ms","traceEvents":[')
        self._events = self._inside = self._needs_comma = False

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write(b"]}\n")
        with contextlib.suppress(OSError):
            self._file.close()
        if kind is not None and os.path.isfile(self._path):
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        elif kind is None and self._failure is not None:
            # The model is there, and stays.
            warnings.warn(f"the trace is incomplete: {self._failure}", UserWarning, stacklevel=outside_level())

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
            self._write(b",\n")
            self._needs_comma = False
        self._events = True
        self._write(text)

    def _write(self, text: bytes) -> None:
        """What can't be written is told at the end: a full disk must not cost the load."""
        if self._failure is None:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:
                self._failure = error
