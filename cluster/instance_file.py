"""What the client keeps about the local instance, as far as this side reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def home() -> Path:
    """$SHARDLIFT_HOME, else ~/.shardlift."""
    return Path(os.environ.get("SHARDLIFT_HOME") or Path.home() / ".shardlift")


def read_instance() -> dict[str, Any] | None:
    try:
        value = json.loads((home() / "instance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_ours(pid: int) -> bool:
    """Whether process `pid` is a local instance still: its number may belong to another by now."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        # No such process, or no /proc on this system: there, the number must do.
        return not Path("/proc/self").exists()
    except OSError:
        return False
    return b"shardlift.cluster.up" in command
