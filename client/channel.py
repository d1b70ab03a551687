"""The channel to a gateway: its address, its credentials, and the token that goes with every call."""

from __future__ import annotations

import ipaddress
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..proto.v1.credentials import channel_credentials, channel_options, failed_handshake
from ..proto.v1.errors import AuthenticationError, GatewayUnavailableError, InvalidRequestError
from ..proto.v1.tls import TLS, client_tls
from ..proto.v1.wire import CHANNEL_OPTIONS
from .outside import outside_level

DEFAULT_PORT = 50051
CONNECT_TIMEOUT_S = 3.0
# What asks for TLS, and for plain text.
SECURE, PLAIN = "grpcs://", "grpc://"
# For gRPC to say why nobody answered.
REASON_S = 2.0

# A peer that vanished without a word is noticed by a ping. gRPC servers by default refuse pings that come more often
# than every five minutes, so this stays above that.
_KEEPALIVE_MS = 330_000
# A restarted gateway is found again within seconds, not after gRPC's own two minutes.
_RECONNECT_MS = (200, 5_000)


def normalize(address: str, tls: TLS | None = None) -> str:
    """`address` as "host:port", with the default port where it names none; or "grpcs://host:port", where TLS is asked
    for: by that, by `tls`, or for an address without a scheme by the environment. "grpc://" asks for plain text, and
    stays. Raises InvalidRequestError.
    """
    scheme, rest = _split(address.strip())
    if scheme == PLAIN and tls is not None:
        raise InvalidRequestError(f"gateway address {address!r} asks for plain text, and tls= for TLS: leave one out")
    if not scheme and (tls is not None or client_tls(os.environ) is not None):
        scheme = SECURE
    return scheme + (rest if rest.startswith("unix:") else _host_port(rest, address))


def _split(text: str) -> tuple[str, str]:
    """The scheme, if it is one of ours, and what follows it."""
    scheme = next((scheme for scheme in (SECURE, PLAIN) if text.startswith(scheme)), "")
    return scheme, text.removeprefix(scheme)


def _host_port(text: str, address: str) -> str:
    if not text or "://" in text or "/" in text or any(character.isspace() for character in text):
        raise InvalidRequestError(f"gateway address {address!r} is not of the form host:port, or grpcs://host:port")
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        host, port = host + bracket, rest.removeprefix(":")
    elif text.count(":") > 1:  # a bare IPv6 address
        host, port = f"[{text}]", ""
    else:
        host, _, port = text.partition(":")
    port = port or str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidRequestError(f"gateway address {address!r} is not of the form host:port, or grpcs://host:port")
    return f"{host}:{port}"


def as_recorded(address: str) -> str:
    """An address that was written down with what it speaks, such that the environment says nothing else of it."""
    has_scheme = bool(_split(address)[0])
    return address if has_scheme or client_tls(os.environ) is None else PLAIN + address


def is_secure(address: str) -> bool:
    """Whether what is sent to `address` (as `normalize` gives it) is encrypted."""
    return address.startswith(SECURE)


def is_plain(address: str) -> bool:
    """Whether `address` says itself that plain text is meant."""
    return address.startswith(PLAIN)


def is_loopback(address: str) -> bool:
    """Whether what is sent to `address` (as `normalize` gives it) stays on this machine."""
    address = _split(address)[1]
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_same(address: str, other: str) -> bool:
    """Whether both name one gateway, with the same words about TLS or without them."""
    return _split(address)[1] == _split(other)[1]


def warn_of_plain_text(address: str, token: str | None, what: str = "gateway token") -> None:
    """Warns where `token` would travel for all to read. "grpc://" says that it may: behind a mesh that encrypts."""
    if token is not None and not address.startswith((SECURE, PLAIN)) and not is_loopback(address):
        warnings.warn(
            f"the {what} goes to {address} in plain text: have the gateway use TLS and write "
            f"grpcs://{address}, or, where the network is safe, grpc://{address}",
            UserWarning,
            stacklevel=outside_level(),
        )


def open_channel(address: str, token: str | None, tls: TLS | None = None) -> grpc.Channel:
    """A channel to `address` that sends `token` with every call. Connects when first used.

    tls: the files for an address with TLS; by default the environment's. Raises InvalidRequestError for those that
    can't be used.
    """
    channel = _secured(address, tls)
    return channel if token is None else grpc.intercept_channel(channel, _Bearer(token))


def open_async_channel(address: str, tls: TLS | None = None) -> grpc.aio.Channel:
    """A channel to `address` for the running event loop. Its calls take the token as metadata: `authorization`."""
    return _secured_async(address, tls)


def authorization(token: str) -> tuple[str, str]:
    """The header that carries `token`. Raises AuthenticationError where none can."""
    if not token.isascii() or not token.isprintable():
        raise AuthenticationError("the gateway token has characters that a header can't carry: read it again")
    return "authorization", f"Bearer {token}"


def _options(address: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        *CHANNEL_OPTIONS,
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS[0]),
        ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS[1]),
    ]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


# The one place where credentials are made.


def _secured(address: str, tls: TLS | None) -> grpc.Channel:
    target, options = _split(address)[1], _options(address)
    if not is_secure(address):
        return grpc.insecure_channel(target, options=options)
    tls = tls or client_tls(os.environ) or TLS()
    return grpc.secure_channel(target, channel_credentials(tls), options=[*options, *channel_options(tls)])


def _secured_async(address: str, tls: TLS | None) -> grpc.aio.Channel:
    target, options = _split(address)[1], _options(address)
    if not is_secure(address):
        return grpc.aio.insecure_channel(target, options=options)
    tls = tls or client_tls(os.environ) or TLS()
    return grpc.aio.secure_channel(target, channel_credentials(tls), options=[*options, *channel_options(tls)])


def answers(channel: grpc.Channel, timeout_s: float, *, wait: bool) -> bool:
    """Whether somebody answers on `channel`: at once, or (`wait`) within `timeout_s`.

    Whatever is said to the question after health, even a refusal, is an answer.
    """
    # Not grpc.channel_ready_future: its polling thread outlives the future, and trips over a channel closed meanwhile.
    try:
        health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=wait
        )
    except grpc.RpcError as error:
        return is_answer(error, wait=wait)
    return True


def is_answer(error: grpc.RpcError, *, wait: bool) -> bool:
    """Whether somebody said `error` to the question after health."""
    silent = {grpc.StatusCode.UNAVAILABLE} | ({grpc.StatusCode.DEADLINE_EXCEEDED} if wait else set())
    return error.code() not in silent


def wait_ready(channel: grpc.Channel, address: str, timeout_s: float) -> None:
    """Returns once somebody answers on `channel`. Raises GatewayUnavailableError after `timeout_s`, and
    AuthenticationError where it is TLS that stands between: at once, for no waiting mends that."""
    if is_secure(address):
        why = _refusal(channel, timeout_s)
        if failed_handshake(why) is not None:
            raise no_answer(address, timeout_s, why)
    if not answers(channel, timeout_s, wait=True):
        raise no_answer(address, timeout_s, _refusal(channel, REASON_S))


def _refusal(channel: grpc.Channel, timeout_s: float) -> str:
    """What gRPC says of an attempt to connect; nothing of one that succeeds."""
    try:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        return str(error.details() or "")
    return ""


def no_answer(address: str, timeout_s: float, details: str = "") -> GatewayUnavailableError | AuthenticationError:
    """What to raise when nobody answered at `address`. details: what gRPC says of the last attempt."""
    if is_secure(address) and (why := failed_handshake(details)) is not None:
        return AuthenticationError(
            f"TLS with {address} fails: {why}; look at SHARDLIFT_TLS_CA, SHARDLIFT_TLS_NAME or tls=, and at the "
            "gateway's certificate"
        )
    if "Socket closed" in details or "Connection reset" in details:
        wanted = "a certificate (SHARDLIFT_TLS_CLIENT_CERT)" if is_secure(address) else "TLS (write grpcs://)"
        return AuthenticationError(f"{address} closes the connection at once: its gateway may want {wanted}")
    return GatewayUnavailableError(
        f"no gateway answers at {address} (waited {timeout_s:g} s): start one with `shardlift up`, "
        "or set SHARDLIFT_ADDRESS"
    )


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: list[tuple[str, str]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: Any


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call. (gRPC's own call credentials need an encrypted channel.)"""

    def __init__(self, token: str) -> None:
        self._metadata = authorization(token)

    def _signed(self, details: Any) -> _CallDetails:
        return _CallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=[*(details.metadata or ()), self._metadata],
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return continuation(self._signed(client_call_details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return continuation(self._signed(client_call_details), request)

    def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        return continuation(self._signed(client_call_details), request_iterator)

    def intercept_stream_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Iterator[Any]
    ) -> Any:
        return continuation(self._signed(client_call_details), request_iterator)
