"""What an HTTP answer to a range request means. Pure: statuses and headers in, decisions out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

RETRY_AFTER_LIMIT_S = 300.0

_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.IGNORECASE)
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})")
_QUERY = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]*")
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s'\"/?#@]*:[^\s'\"@]*|[^\s'\"/?#@]+)@", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The bytes [start, end) of a file of `total_bytes` (None: the server didn't say)."""

    start: int
    end: int
    total_bytes: int | None


def parse_content_range(value: str) -> Span | None:
    """The header's range, or None if it isn't one."""
    match = _CONTENT_RANGE.fullmatch(value.strip())
    if match is None:
        return None
    first, last, total = match.groups()
    return Span(start=int(first), end=int(last) + 1, total_bytes=None if total == "*" else int(total))


def is_transient(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in (408, 425, 429) or status >= 500


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """How long the server asks to wait: Retry-After (seconds or a date), or the Hub's `ratelimit: "api";r=0;t=55`."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", value, re.ASCII):
        wait_s = float(value)
    elif value:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - now_s
        except (ValueError, OverflowError):
            return None
    else:
        match = _RATE_LIMIT.search(headers.get("ratelimit", ""))
        if match is None:
            return None
        wait_s = float(match[1])
    return min(max(wait_s, 0.0), RETRY_AFTER_LIMIT_S)


def backoff_s(failures: int, random: float, *, first_s: float = 0.5, limit_s: float = 30.0) -> float:
    """Seconds to wait after the n-th failure in a row; `random` in [0, 1) takes off up to a half."""
    return min(limit_s, first_s * 2.0 ** min(failures - 1, 32)) * (1 - random / 2)


def normalize_etag(value: str | None) -> str:
    """The tag without quotes and weakness, as huggingface_hub gives it; "" for none."""
    return (value or "").strip().removeprefix("W/").strip('"')


def origin(url: str) -> tuple[str, str, int] | None:
    """(scheme, host, port) of an http or https URL; None for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    return parts.scheme, parts.hostname.lower(), port


def redact(text: str) -> str:
    """Without what is secret in its URLs: a signed URL's query, and a name and password before the host."""
    return _USERINFO.sub(r"\1…@", _QUERY.sub(r"\1?…", text))
