"""Sizes as people write them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal

from ..proto.v1.errors import InvalidRequestError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_MAX_BYTES = (1 << 63) - 1
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:bit|b)\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes from a number or "20GiB", "512MB". Raises InvalidRequestError."""
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise InvalidRequestError(f"{text!r} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size > _MAX_BYTES:
        raise InvalidRequestError(f"{text!r} is more than any device has: at most {_MAX_BYTES} bytes can be meant")
    return size


def parse_rate(text: str) -> float:
    """Bytes a second from "1.2GB/s", "10Gbit/s", "500MiB" or a number. Raises InvalidRequestError."""
    number = text.strip().removesuffix("/s").removesuffix("ps")
    bits = _BITS.fullmatch(number)
    try:
        rate = float(bits[1]) * _UNITS[f"{bits[2]}B".upper()] / 8 if bits else float(parse_size(number))
    except InvalidRequestError:
        rate = 0.0
    if rate <= 0:
        raise InvalidRequestError(f"{text[:40]!r} is no speed: write e.g. 1.2GB/s, 500MiB/s or 10Gbit/s")
    return rate


def format_size(size_bytes: int) -> str:
    """ "1.50 GiB": for people."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
