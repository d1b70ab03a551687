"""Log lines of the gateway and of workers: for people, or one JSON object each, with what they are about.

`configure` is called once in each process that is ours alone. What a line is about (model, stage, session, load) comes
from the process (`configure`), from the task that logs (`note`), or from the line itself (`extra=`), the latter first.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TextIO

from ..proto.v1.errors import InvalidRequestError

FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# What a line may be about, in this order.
SUBJECTS = ("model", "load_id", "stage", "session")
# Of a file of lines, before another is begun: it may lie in memory (k8s/base).
_MOST_FILE_BYTES = 2 << 20

_noted: ContextVar[Mapping[str, str]] = ContextVar("shardlift_log_subjects")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    format: str = "text"
    level: str = "INFO"

    @classmethod
    def of(cls, format_: str | None = None, level: str | None = None) -> LogSettings:
        """As given, else as $SHARDLIFT_LOG_FORMAT and $SHARDLIFT_LOG_LEVEL have it. Raises InvalidRequestError."""
        format_ = format_ or os.environ.get("SHARDLIFT_LOG_FORMAT") or "text"
        level = (level or os.environ.get("SHARDLIFT_LOG_LEVEL") or "INFO").upper()
        if format_ not in FORMATS:
            raise InvalidRequestError(f"log format {format_[:80]!r} is none: write {' or '.join(FORMATS)}")
        if level not in LEVELS:
            raise InvalidRequestError(f"log level {level[:80]!r} is none: write one of {', '.join(LEVELS)}")
        return cls(format=format_, level=level)


def configure(
    settings: LogSettings,
    subjects: Mapping[str, str] | None = None,
    *,
    stream: TextIO | None = None,
    file: str | None = None,
) -> None:
    """Has this package's loggers write to `stream` (stderr), each line about `subjects`. Called again, it replaces
    what it did before.

    file: for the same lines once more, where it can be written; it and the one before it (`.1`) are bounded.
    """
    logger = logging.getLogger(__name__.split(".", maxsplit=1)[0])
    for handler in list(logger.handlers):
        if isinstance(handler, (_Handler, _FileHandler)):
            logger.removeHandler(handler)
            handler.close()
    handlers: list[logging.Handler] = [_Handler(stream or sys.stderr)]
    trouble: OSError | None = None
    if file is not None:
        try:
            handlers.append(_FileHandler(file, maxBytes=_MOST_FILE_BYTES, backupCount=1, encoding="utf-8"))
        except OSError as error:
            # Another machine's folder, perhaps: the lines are on stderr.
            trouble = error
    for own in handlers:
        own.setFormatter((_Json if settings.format == "json" else _Text)(subjects or {}))
        logger.addHandler(own)
    logger.setLevel(settings.level)
    # Whoever set up the root logger would write each line once more.
    logger.propagate = False
    if trouble is not None:
        logger.info("the log isn't kept at %s: %s", file, trouble.strerror)


def note(**subjects: str) -> None:
    """The rest of this task, and the tasks that it begins, are about `subjects`, too."""
    _noted.set({**_noted.get({}), **subjects})


class _Handler(logging.StreamHandler):
    pass


class _FileHandler(logging.handlers.RotatingFileHandler):
    pass


class _About(logging.Formatter):
    def __init__(self, subjects: Mapping[str, str]) -> None:
        super().__init__()
        self._subjects = subjects

    def about(self, record: logging.LogRecord) -> dict[str, str]:
        known = {**self._subjects, **_noted.get({})}
        found = {name: getattr(record, name, known.get(name)) for name in SUBJECTS}
        return {name: str(value) for name, value in found.items() if value not in (None, "")}

    @staticmethod
    def at(record: logging.LogRecord) -> str:
        """UTC, to the millisecond."""
        return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


class _Json(_About):
    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": self.at(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self.about(record),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


class _Text(_About):
    def format(self, record: logging.LogRecord) -> str:
        about = " ".join(f"{name}={value}" for name, value in self.about(record).items())
        line = f"{self.at(record)} {record.levelname} {record.name}: {record.getMessage()}"
        line += f" [{about}]" if about else ""
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
