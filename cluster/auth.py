"""The gateway's token: made once, kept in a file of its user's, compared in constant time."""

from __future__ import annotations

import ipaddress
import os
import secrets
import tempfile
from pathlib import Path

from ..proto.v1.errors import AuthenticationError, InvalidRequestError, one_line
from ..proto.v1.server import HeaderGuard

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


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
        return file
    folder.mkdir(parents=True, exist_ok=True)
    # Made with mode 0600.
    descriptor, temporary = tempfile.mkstemp(prefix=".token.", dir=folder)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(token or secrets.token_urlsafe(32))
    os.replace(temporary, file)
    return file


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


class TokenInterceptor(HeaderGuard):
    """Lets in calls with `authorization: Bearer <token>`; health checks need none."""

    def __init__(self, token: str) -> None:
        refusal = AuthenticationError("the gateway wants a token, and got none or a wrong one: set SHARDLIFT_TOKEN")
        super().__init__("authorization", f"Bearer {token}", refusal, _OPEN_SERVICES)
