"""Which Hub token goes to a gateway. It is a secret of the caller's, so it leaves this machine only when told to."""

from __future__ import annotations

import os

from ..proto.v1.errors import InvalidRequestError
from .channel import is_loopback, warn_of_plain_text


def hub_token(token: str | bool | None, address: str) -> str | None:
    """The token to send to the gateway at `address`.

    A token that is passed as a string always goes, with a warning where it would travel in plain text; the one of this
    environment (HF_TOKEN, or `hf auth login`) goes to a gateway on this machine alone; `False` sends none. Raises
    InvalidRequestError for `True` where there is none, or where it would travel, and as `cleaned`.
    """
    if isinstance(token, str):
        token = cleaned(token) or None
        warn_of_plain_text(address, token, "Hub token")
        return token
    if token is False:
        return None
    if not is_loopback(address):
        if token:
            raise InvalidRequestError(
                f"token=True would send this machine's Hub token to {address}: pass the token itself to say so"
            )
        return None
    if token is None and os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return None
    from huggingface_hub import get_token

    found = get_token()
    if token and not found:
        raise InvalidRequestError("token=True, but there is no Hub token here: set HF_TOKEN or run `hf auth login`")
    return None if found is None else cleaned(found)


def cleaned(token: str) -> str:
    """`token` without the line end of the file that it was read from. Raises InvalidRequestError, without the token in
    it, for one that no header can carry: whoever sends such a one fails with it in the error."""
    token = token.strip()
    if not token.isascii() or not token.isprintable():
        raise InvalidRequestError("the Hub token has characters that a header can't carry: read it again")
    return token
