"""How fast bytes go from one machine to another, over gRPC on a port such as stages take."""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from ...proto.v1.errors import one_line

_METHOD = "/shardlift.doctor/Count"
_SECRET_HEADER = "x-shardlift-doctor-secret"
_PIECE_BYTES = 1 << 20
_PIECES = 32
_ROUND_TRIPS = 10
_LIMIT = [("grpc.max_receive_message_length", 2 * _PIECE_BYTES), ("grpc.so_reuseport", 0)]


class Counter:
    """Takes bytes from whoever has its secret, and says how many they were, until `stop`."""

    def __init__(self, host: str) -> None:
        self.secret = secrets.token_urlsafe(16)
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2), options=_LIMIT)
        handler = grpc.unary_unary_rpc_method_handler(self._count)
        _, service, method = _METHOD.split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        host = f"[{host}]" if ":" in host else host
        self.address = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        self._server.start()

    def _count(self, request: bytes, context: Any) -> bytes:
        given = str(dict(context.invocation_metadata()).get(_SECRET_HEADER, ""))
        if not secrets.compare_digest(given.encode(), self.secret.encode()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this counter belongs to another examination")
        return str(len(request)).encode()

    def stop(self) -> None:
        self._server.stop(0).wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """bytes_per_s: of large messages, one after another. problem: why there is no figure."""

    bytes_per_s: float = 0.0
    round_trip_s: float = 0.0
    problem: str = ""


def measure(address: str, secret: str, timeout_s: float) -> Measured:
    """Sends some 32 MiB to the `Counter` at `address`."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", 2 * _PIECE_BYTES)]
    deadline = time.monotonic() + timeout_s
    with grpc.insecure_channel(address, options=options) as channel:
        count = channel.unary_unary(_METHOD, request_serializer=bytes, response_deserializer=bytes)

        def send(piece: bytes) -> None:
            count(piece, metadata=((_SECRET_HEADER, secret),), timeout=max(0.1, deadline - time.monotonic()))

        try:
            send(b"")
            began_s = time.monotonic()
            for _ in range(_ROUND_TRIPS):
                send(b"")
            round_trip_s = (time.monotonic() - began_s) / _ROUND_TRIPS
            piece, began_s, sent = bytes(_PIECE_BYTES), time.monotonic(), 0
            while sent < _PIECES and (sent < 1 or time.monotonic() - began_s < timeout_s / 4):
                send(piece)
                sent += 1
            seconds = time.monotonic() - began_s
        except grpc.RpcError as error:
            details = Exception(error.details() or "") if isinstance(error, grpc.Call) else error
            return Measured(problem=f"{error.code().name}: {one_line(details, 200)}")
    return Measured(bytes_per_s=sent * _PIECE_BYTES / max(seconds, 1e-9), round_trip_s=round_trip_s)
