"""Which files make a connection TLS. Paths only: what is in them is read where it is used, and never sent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InvalidRequestError

# What stages' certificates are made out to, unless the operator says otherwise: their addresses come and go.
STAGE_NAME = "shardlift-stage"


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """PEM files for one end of a connection.

    ca: of those whose certificates are believed; a client without one believes the system's. cert, key: one's own
    certificate, followed by those between it and its CA, and its private key. name: what the other end's certificate
    must be made out to, where that is not the address it is reached by.

    Raises InvalidRequestError for one of `cert` and `key` without the other.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for field in ("ca", "cert", "key"):
            path = getattr(self, field)
            # Of an environment, an empty one is none.
            object.__setattr__(self, field, os.fspath(path) if path else None)
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise InvalidRequestError(f"TLS has a {given} ({getattr(self, given)}) but no {missing}: give both files")


def client_tls(environment: Mapping[str, str]) -> TLS | None:
    """What a client's environment says: $SHARDLIFT_TLS_CA, …_CLIENT_CERT, …_CLIENT_KEY, …_NAME; None where it says
    nothing."""
    ca, name = environment.get("SHARDLIFT_TLS_CA") or None, environment.get("SHARDLIFT_TLS_NAME") or None
    cert, key = (
        environment.get("SHARDLIFT_TLS_CLIENT_CERT") or None,
        environment.get("SHARDLIFT_TLS_CLIENT_KEY") or None,
    )
    return TLS(ca=ca, cert=cert, key=key, name=name) if ca or cert or key or name else None


def gateway_tls(cert: str | None, key: str | None, client_ca: str | None) -> TLS | None:
    """A gateway's own; None for plain text. Raises InvalidRequestError for what doesn't make sense together."""
    if not (cert or key or client_ca):
        return None
    if not (cert and key):
        raise InvalidRequestError("the gateway's TLS needs its certificate and its key: give --tls-cert and --tls-key")
    return TLS(ca=client_ca, cert=cert, key=key)


def stage_tls(cert: str | None, key: str | None, ca: str | None, name: str | None) -> TLS | None:
    """The stages', at both ends of their connections; None for plain text. Raises InvalidRequestError for a part."""
    if not (cert or key or ca or name):
        return None
    if not (cert and key and ca):
        raise InvalidRequestError(
            "TLS between stages is mutual: give --stage-tls-cert, --stage-tls-key and --stage-tls-ca, files that lie "
            "on every node"
        )
    return TLS(ca=ca, cert=cert, key=key, name=name or STAGE_NAME)
