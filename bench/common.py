"""What every benchmark's report begins with."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from typing import Any

import torch


def surroundings(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Date, hardware, and versions of Python and `packages`."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"CPU, {os.cpu_count()} cores" if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
