"""A real S3 server (moto's) on 127.0.0.1, behind a proxy that fails as it is told to.

The proxy speaks HTTP/1.1, passes every request on and logs it, and does to the answers what a `Fault` of
`tests.support.hub` says. Its clients see S3 as it is on a bad day: resets in mid body, stalls, "503 Slow Down".
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import boto3
from moto.server import ThreadedMotoServer

from tests.support.hub import Fault, Reset, Stall, Status, Truncate, interrupt

BUCKET = "models"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIATESTKEY", "AWS_SECRET_ACCESS_KEY": "s3cr3t/k3y+of/tests"}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Request:
    """`range` is what was asked for, as (start, end exclusive)."""

    method: str
    key: str
    query: str
    range: tuple[int, int] | None


class S3Server:
    """Moto and the proxy, while the context lasts.

    Attributes:
        fault: asked about every request, from the serving threads; what it returns happens to the answer.
        requests: all that came in, in order.
    """

    def __init__(self) -> None:
        self.fault: Callable[[S3Request], Fault | None] | None = None
        self.requests: list[S3Request] = []
        self.closing = threading.Event()
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._lock = threading.Lock()

    def __enter__(self) -> S3Server:
        self._moto.start()
        self.upstream = self._moto.get_host_and_port()
        self._proxy = _Proxy(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{self.upstream[0]}:{self.upstream[1]}",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.closing.set()
        self._proxy.shutdown()
        self._thread.join()
        self._proxy.end_connections()
        self._proxy.server_close()
        self.client.close()
        self._moto.stop()

    @property
    def endpoint(self) -> str:
        """The proxy's: what goes in AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self._proxy.server_port}"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_folder(self, prefix: str, folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(folder).as_posix()}".lstrip("/"), file.read_bytes())

    def note(self, request: S3Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
        return self.fault(request) if self.fault is not None else None

    def ranges(self, key: str) -> list[tuple[int, int]]:
        return [each.range for each in self.requests if each.method == "GET" and each.key == key and each.range]


class _Proxy(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close joins them

    def __init__(self, address: tuple[str, int], s3: S3Server) -> None:
        self.s3 = s3
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._connections.discard(request)
        self.close_request(request)  # no shutdown: a FIN would go out ahead of a fault's RST

    def end_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, as they do here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        request = S3Request(
            method=self.command,
            key=unquote(parts.path).removeprefix(f"/{BUCKET}").lstrip("/"),
            query=parts.query,
            range=(int(first), int(last) + 1) if first and last else None,
        )
        fault = self.server.s3.note(request)
        if isinstance(fault, Status):
            self._answer(fault.code, dict(fault.headers), _error_body(fault.code), None)
            return
        if (
            isinstance(fault, Reset | Stall | Truncate)
            and fault.after_bytes is None
            and not interrupt(self, fault, self.server.s3.closing)
        ):
            return
        host, port = self.server.s3.upstream
        upstream = http.client.HTTPConnection(host, port, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            headers = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "date", "server")
            }
            self._answer(answer.status, headers, data, fault)
        finally:
            upstream.close()

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: Fault | None) -> None:
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"} | {
            "Content-Length": headers.get("Content-Length", headers.get("content-length", str(len(data))))
            if self.command == "HEAD"
            else str(len(data))
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = len(data)
        if isinstance(fault, Reset | Stall | Truncate) and fault.after_bytes is not None:
            cut = min(fault.after_bytes, len(data))
        self.wfile.write(data[:cut])
        if cut < len(data) and interrupt(self, fault, self.server.s3.closing):
            self.wfile.write(data[cut:])


def _error_body(status: int) -> bytes:
    code = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}.get(status, "Unnamed")
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>Said by the proxy</Message>'
        "<RequestId>1</RequestId></Error>"
    ).encode()
