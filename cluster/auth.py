"""The gateway's token: made once, kept in a file of its user's, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import stat
import tempfile
from pathlib import Path

from ..proto.v1.errors import AuthenticationError, InvalidRequestError, one_line
from ..proto.v1.server import HeaderGuard

logger = logging.getLogger(__name__)

_MOST_TOKEN_CHARACTERS = 4096

# A single answer: a stream would hold its place among the calls for as long as nobody closes it.
_OPEN_METHODS = ("/grpc.health.v1.Health/Check",)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost could mean anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def keep_token(folder: Path, token: str | None) -> Path:
    """Writes `token`, or a new one, to a file that only its user may read; an existing one stays unless another is
    given. Gives the file's path."""
    file = folder / "token"
    if token is None and file.exists():
        close_token_file(file)
        return file
    if token is not None:
        check_token(token)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made with mode 0600, and seen under its name only when it is whole.
    descriptor, temporary = tempfile.mkstemp(prefix=".token.", dir=folder)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(token or secrets.token_urlsafe(32))
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


def close_token_file(file: Path) -> None:
    """Has an existing token file readable by its user alone. Raises InvalidRequestError where it is another user's, and
    anybody's to read.

    A Secret that Kubernetes mounts belongs to root, and to a group that the pod's containers alone are in.
    """
    state = file.stat()
    mode = stat.S_IMODE(state.st_mode)
    if state.st_uid == os.getuid():
        if mode & 0o077:
            file.chmod(0o600)
            logger.warning("the token file %s had mode %04o, and has 0600 now: others may have read it", file, mode)
    elif mode & 0o007:
        raise InvalidRequestError(
            f"the token file {file} is another user's, and has mode {mode:04o}: take others' rights off it"
        )


def check_token(token: str) -> None:
    """Raises InvalidRequestError for what no header can carry."""
    if not token or not token.isascii() or not token.isprintable() or token != token.strip():
        raise InvalidRequestError("SHARDLIFT_TOKEN must be printable ASCII without spaces around it, and not empty")
    if len(token) > _MOST_TOKEN_CHARACTERS:
        raise InvalidRequestError(
            f"SHARDLIFT_TOKEN has {len(token)} characters, over the limit of {_MOST_TOKEN_CHARACTERS}"
        )


def read_token(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"the token file {file} can't be read: {one_line(error)}") from None
    if not token:
        raise InvalidRequestError(f"the token file {file} is empty: remove it, or write a token into it")
    return token


def fingerprint(token: str, salt: bytes) -> bytes:
    """What tells one token from another, and tells neither: for the way between processes."""
    return hmac.new(salt, token.encode(), hashlib.sha256).digest()


def is_token(token: str | None, salt: bytes, print_: bytes) -> bool:
    """Whether `print_` is `token`'s, in a time that doesn't depend on it."""
    return token is not None and hmac.compare_digest(fingerprint(token, salt), print_)


class TokenInterceptor(HeaderGuard):
    """Lets in calls with `authorization: Bearer <token>`; a health check needs none."""

    def __init__(self, token: str) -> None:
        refusal = AuthenticationError("the gateway wants a token, and got none or a wrong one: set SHARDLIFT_TOKEN")
        super().__init__("authorization", f"Bearer {token}", refusal, _OPEN_METHODS)


class OnlyHealthChecks(HeaderGuard):
    """Lets in health checks, and nothing else."""

    def __init__(self) -> None:
        refusal = AuthenticationError("this port answers health checks alone: ask the gateway's own for the rest")
        # What no header can be.
        super().__init__("authorization", secrets.token_urlsafe(32), refusal, _OPEN_METHODS)
