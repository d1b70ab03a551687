"""Where a warning is the caller's own."""

from __future__ import annotations

import sys


def outside_level() -> int:
    """The `stacklevel` of the first caller outside this package, for warnings."""
    level, frame = 1, sys._getframe(1)
    package = __name__.partition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level
