"""TLS as gRPC takes it: credentials from files, which a server reads again when they change."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Sequence

import grpc
import grpc.aio

from .errors import InvalidRequestError, one_line
from .tls import TLS

logger = logging.getLogger(__name__)

# A certificate with everything between it and its CA takes some kilobytes; a system's bundle of CAs, some hundreds.
_MOST_BYTES = 4 << 20


def check(tls: TLS) -> None:
    """Raises InvalidRequestError, naming the file, for one that can't be read or used, and for a key of another
    certificate."""
    for path in (tls.ca, tls.cert, tls.key):
        if path is not None:
            _read(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.cert is not None and tls.key is not None:
        try:
            # A key that wants a password would ask for it on a terminal.
            context.load_cert_chain(tls.cert, tls.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise InvalidRequestError(
                f"{tls.cert} and {tls.key} are no PEM certificate with its unencrypted key: {one_line(error, 200)}"
            ) from None
    if tls.ca is not None:
        try:
            context.load_verify_locations(tls.ca)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidRequestError(f"{tls.ca} holds no PEM certificates: {one_line(error, 200)}") from None


def channel_credentials(tls: TLS) -> grpc.ChannelCredentials:
    """For a client, from the files as they are now. Raises InvalidRequestError for those that can't be used."""
    check(tls)
    ca, key, cert = (None if path is None else _read(path) for path in (tls.ca, tls.key, tls.cert))
    return grpc.ssl_channel_credentials(ca, key, cert)


def channel_options(tls: TLS | None) -> list[tuple[str, str]]:
    """What a client's channel needs beside its credentials: the name to expect, where it isn't the address's."""
    return [] if tls is None or tls.name is None else [("grpc.ssl_target_name_override", tls.name)]


def stage_channel(address: str, tls: TLS | None, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
    """A channel to a stage, for the running event loop, with the files as they are now."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=[*options, *channel_options(tls)])


def listen(server: grpc.aio.Server, address: str, tls: TLS | None) -> int:
    """Has `server` listen at `address`; gives the port, or 0 where it can't. With a CA in `tls`, clients need a
    certificate. Raises InvalidRequestError for files that can't be used."""
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _server_credentials(tls))
    except RuntimeError:
        return 0


def _server_credentials(tls: TLS) -> grpc.ServerCredentials:
    check(tls)
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.configuration(),
        files.changed,  # type: ignore[arg-type] # None is for "as before", which grpc-stubs doesn't know
        require_client_authentication=tls.ca is not None,
    )


class _Files:
    """A server's files. gRPC asks at each handshake, on threads of its own, whether they have changed."""

    def __init__(self, tls: TLS) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen = self._state()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        assert self._tls.cert is not None
        assert self._tls.key is not None
        pair = (_read(self._tls.key), _read(self._tls.cert))
        return grpc.ssl_server_certificate_configuration([pair], None if self._tls.ca is None else _read(self._tls.ca))

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The files anew, or None while they are what they were. Those that can't be used leave what was in force."""
        with self._lock:
            try:
                state = self._state()
                if state == self._seen:
                    return None
                # One file may have been replaced, and its fellow not yet: then this is asked again.
                check(self._tls)
                configuration = self.configuration()
            except (OSError, InvalidRequestError) as error:
                logger.warning("TLS files have changed and can't be used, the former stay: %s", one_line(error))
                return None
            self._seen = state
            logger.info("TLS certificate %s was read again", self._tls.cert)
            return configuration

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        paths = (self._tls.ca, self._tls.cert, self._tls.key)
        found = [os.stat(path) for path in paths if path is not None]
        return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in found)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError(f"TLS file {path} can't be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise InvalidRequestError(f"TLS file {path} has over {_MOST_BYTES:,} bytes: no certificate is so large")
    return data


def failed_handshake(details: str) -> str | None:
    """What gRPC says where TLS has failed, in short; None where it says nothing of that.

    The end that refuses knows why. The other one sees the connection close, which it has no name for.
    """
    text = " ".join(details.split())
    if "WRONG_VERSION_NUMBER" in text:
        return "the other end speaks plain text"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return text.partition("CERTIFICATE_VERIFY_FAILED: ")[2].removesuffix(": OK") or "its certificate isn't believed"
    if "Hostname Verification Check failed" in text:
        return "its certificate is made out to another name"
    if "handshake failed" in text.lower():
        return text.rpartition("failed ")[2][:200]
    return None
