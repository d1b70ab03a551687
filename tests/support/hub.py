"""A small Hugging Face Hub on 127.0.0.1, for the real client to talk to.

It follows the Hub in what a loader depends on: revisions resolve to commits, small files are answered at once, large
ones by a redirect to signed, expiring URLs on another origin (the "CDN"), byte ranges, and the `X-Error-Code` of each
refusal. The CDN refuses a request that carries `Authorization`, as S3 does for a signed URL, so a client that leaks its
token fails. Every request is logged, and a test can have any of them fail in a chosen way.

Standalone: `python -m tests.support.hub --repo org/name=FOLDER [--gated org/name=TOKEN] [--port N]`.

What to answer is decided in `HubServer` and returned as a value; `_Handler` alone touches a socket.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import hmac
import json
import math
import re
import secrets
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias
from urllib.parse import parse_qs, quote, unquote, urlsplit

Origin: TypeAlias = Literal["hub", "cdn"]

_LARGE_SUFFIXES = {".safetensors", ".bin", ".gguf", ".pt", ".pth"}
_LARGE_BYTES = 10 * 2**20
_CHUNK_BYTES = 256 * 2**10

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API_ROUTE = re.compile(
    rf"/api/models/{_REPO}(?:/(?P<what>tree|paths-info|revision)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?"
)
_RESOLVE_ROUTE = re.compile(rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
_CDN_ROUTE = re.compile(rf"/repos/{_REPO}/(?P<rev>[0-9a-f]{{40}})/(?P<path>.+)")


# ---- what a test sees ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestInfo:
    """A request as it came in. `range` is what was asked of the file, as (start, end exclusive), if it can be met."""

    origin: Origin
    method: str
    path: str
    repo: str | None
    file: str | None
    range: tuple[int, int] | None
    had_authorization: bool
    user_agent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRequest(RequestInfo):
    """A request and its answer so far: its `status`, 0 before the headers, and the body's bytes given to the socket."""

    status: int
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status, an empty body and these headers, in place of the right answer."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the connection after so many bytes of the body; before the headers if `after_bytes` is None.

    An answer without a body (a HEAD, a redirect) is cut before its headers. So with `Stall` and `Truncate`.
    """

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing for a while, then the rest. Closing the server ends every stall."""

    after_bytes: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Truncate:
    """Announce the whole body, send so many bytes of it, and close the connection in good order."""

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer 200 and the whole file to a request for a range."""


@dataclass(frozen=True, slots=True)
class Etag:
    """Answer with this ETag (quotes included), as when the file has changed."""

    value: str


Fault: TypeAlias = Status | Reset | Stall | Truncate | IgnoreRange | Etag


# ---- repositories ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """One file of a commit. `oid` is git's blob id: of the content, or of the LFS pointer when the file is large."""

    location: Path
    size: int
    sha256: str
    oid: str
    pointer_bytes: int | None

    @property
    def is_large(self) -> bool:
        return self.pointer_bytes is not None

    @property
    def etag(self) -> str:
        return f'"{self.sha256 if self.is_large else self.oid}"'

    def tree_entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_bytes}
        return entry

    def sibling(self, path: str, *, blobs: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry |= {"size": self.size, "blobId": self.oid}
            if self.is_large:
                entry["lfs"] = {"sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_bytes}
        return entry


@dataclass(slots=True, kw_only=True)
class _Repo:
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated_token: str | None = None


def _snapshot(folder: Path) -> dict[str, _File]:
    """Every file below `folder` by its path in the repository, in order, without git's and the client's own folders."""
    files = {}
    for location in sorted(folder.rglob("*")):
        path = location.relative_to(folder)
        if location.is_file() and not {".git", ".cache"} & set(path.parts):
            stat = location.stat()
            files[path.as_posix()] = _hashed(location.resolve(), stat.st_size, stat.st_mtime_ns)
    if not files:
        raise ValueError(f"no files to serve in {folder}: pass the folder that holds the checkpoint")
    return files


@functools.lru_cache(maxsize=4096)
def _hashed(location: Path, size: int, mtime_ns: int) -> _File:
    """The file with its hashes; remembered, since several servers of one session serve the same checkpoint."""
    del mtime_ns  # part of the key only
    digest = hashlib.sha256()
    for piece in _Body(location, 0, size).pieces(0, size):
        digest.update(piece)
    sha256 = digest.hexdigest()
    is_large = size > _LARGE_BYTES or location.suffix in _LARGE_SUFFIXES
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    blob = pointer if is_large else location.read_bytes()
    return _File(
        location=location,
        size=size,
        sha256=sha256,
        oid=hashlib.sha1(b"blob %d\0" % len(blob) + blob, usedforsecurity=False).hexdigest(),
        pointer_bytes=len(pointer) if is_large else None,
    )


def _commit_id(files: Mapping[str, _File]) -> str:
    listing = "".join(f"{path}\0{file.oid}\n" for path, file in files.items())
    return hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()


# ---- answers as values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Body:
    """The bytes [start, end) of a file or of some bytes."""

    source: bytes | Path
    start: int
    end: int

    def pieces(self, skip: int, stop: int) -> Iterator[bytes]:
        """This body's bytes [skip, stop), in pieces."""
        position, end = self.start + skip, self.start + stop
        if isinstance(self.source, bytes):
            if position < end:
                yield self.source[position:end]
            return
        with self.source.open("rb") as stream:
            stream.seek(position)
            while position < end and (piece := stream.read(min(_CHUNK_BYTES, end - position))):
                position += len(piece)
                yield piece


_NO_BODY = _Body(b"", 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: _Body = _NO_BODY
    repo: str | None = None
    file: str | None = None
    range: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    origin: Origin
    method: str
    target: str
    headers: Message
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")

    @property
    def token(self) -> str | None:
        authorization = self.headers.get("Authorization")
        return authorization.removeprefix("Bearer ") if authorization else None


class _RefusalError(Exception):
    """An answer other than the file: raised where it is found, turned into a reply in one place."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


def _json_reply(payload: object, headers: Mapping[str, str] | None = None, status: int = 200) -> _Reply:
    body = json.dumps(payload).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    return _Reply(status=status, headers=headers, body=_Body(body, 0, len(body)))


def _refusal_reply(refusal: _RefusalError) -> _Reply:
    headers = {"X-Error-Message": refusal.message, **refusal.headers}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return _json_reply({"error": refusal.message}, headers, refusal.status)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The range asked for, as (start, end exclusive); None when there is none or it is one to ignore (RFC 9110, 14.2).

    Raises ValueError when no byte of the file is in it (416).
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise ValueError(f"range {header} has no byte of {size}")
    return start, end


def _file_reply(request: _Request, file: _File, headers: dict[str, str]) -> _Reply:
    """The file or the asked range of it, under the request's preconditions."""
    headers = {"ETag": file.etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    if_match = request.headers.get("If-Match")
    if if_match not in (None, "*", file.etag):
        return _Reply(status=412, headers=headers)
    wanted = request.headers.get("Range") if request.headers.get("If-Range") in (None, file.etag) else None
    try:
        span = parse_range(wanted, file.size)
    except ValueError:
        return _Reply(status=416, headers=headers | {"Content-Range": f"bytes */{file.size}"})
    if span is None:
        return _Reply(status=200, headers=headers, body=_Body(file.location, 0, file.size))
    start, end = span
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return _Reply(status=206, headers=headers, body=_Body(file.location, start, end))


def _with_fault(reply: _Reply, fault: Fault | None) -> _Reply:
    """The reply as the fault changes its content; faults of the connection are the handler's."""
    match fault:
        case Status(code, headers):
            return replace(reply, status=code, headers=dict(headers), body=_NO_BODY)
        case Etag(value):
            tags = {name: value for name in ("ETag", "X-Linked-Etag") if name in reply.headers}
            return replace(reply, headers=reply.headers | tags)
        case IgnoreRange() if reply.status == HTTPStatus.PARTIAL_CONTENT:
            headers = {name: value for name, value in reply.headers.items() if name != "Content-Range"}
            source = reply.body.source
            assert isinstance(source, Path)
            return replace(reply, status=200, headers=headers, body=_Body(source, 0, source.stat().st_size))
    return reply


# ---- the server ------------------------------------------------------------------------------------------------------


class HubServer:
    """Two listeners on `host`, while the context lasts: the hub on `port` (0: any free one) and its CDN.

    Attributes:
        fault: asked about every request, from the serving threads; what it returns happens to the answer.
        clock: seconds since the epoch, for signing URLs and for their expiry; set it forward to expire them.
        url_lifetime_s: how long a signed URL is good for.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.fault: Callable[[RequestInfo], Fault | None] | None = None
        self.clock: Callable[[], float] = time.time
        self.url_lifetime_s: float = 3600.0
        self._host, self._port = host, port
        self._repos: dict[str, _Repo] = {}
        self._secret = secrets.token_bytes(32)
        self._log = _Log()
        self._listeners: dict[Origin, _Listener] = {}

    def __enter__(self) -> HubServer:
        with contextlib.ExitStack() as opened:
            ports: dict[Origin, int] = {"hub": self._port, "cdn": 0}
            for origin, port in ports.items():
                listener = _Listener((self._host, port), self, origin)
                opened.callback(listener.close)
                self._listeners[origin] = listener
            opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End every connection, stalled ones too, and wait for its thread. A defect of the server itself is raised."""
        listeners = list(self._listeners.values())
        self._listeners.clear()
        for listener in listeners:
            listener.close()
        defects = [defect for listener in listeners for defect in listener.defects]
        if defects and error is None:
            raise defects[0]

    @property
    def endpoint(self) -> str:
        """What goes in `HF_ENDPOINT` or `endpoint=`."""
        return self._listeners["hub"].url

    @property
    def cdn_endpoint(self) -> str:
        return self._listeners["cdn"].url

    def add_repo(
        self,
        repo_id: str,
        folder: Path,
        *,
        revision: str = "main",
        revisions: Mapping[str, str] | None = None,
        gated_token: str | None = None,
    ) -> str:
        """Serve `folder` as it is now as `revision` of `repo_id`, and return its commit: a hash of paths and contents.

        Call it again with another revision and folder to give the repository more commits. `revisions` names further
        branches or tags: name to a revision or commit that exists. With `gated_token`, files need that token.
        """
        files = _snapshot(Path(folder))
        commit = _commit_id(files)
        repo = self._repos.setdefault(repo_id, _Repo())
        repo.commits[commit] = files
        repo.refs[revision] = commit
        for name, target in (revisions or {}).items():
            repo.refs[name] = repo.refs.get(target, target)
            assert repo.refs[name] in repo.commits, f"{name} points to {target}, which {repo_id} does not have"
        if gated_token is not None:
            repo.gated_token = gated_token
        return commit

    # -- the log

    @property
    def requests(self) -> list[LoggedRequest]:
        """Every request that came so far, in order, those still being answered too."""
        return self._log.snapshot()

    def clear(self) -> None:
        """Forget the requests logged so far."""
        self._log.clear()

    def bytes_sent(self, repo: str | None = None, suffix: str = ".safetensors") -> int:
        """Bytes of file content sent, for files that end in `suffix`, of one repository or of all."""
        return sum(
            request.bytes_sent
            for request in self.requests
            if request.status in (200, 206) and (request.file or "").endswith(suffix) and repo in (None, request.repo)
        )

    def ranges(self, file: str, repo: str | None = None) -> list[tuple[int, int]]:
        """The ranges of `file` that were answered as ranges, as (start, end exclusive), in order of the answers."""
        return [
            request.range
            for request in self.requests
            if request.method == "GET" and request.status == HTTPStatus.PARTIAL_CONTENT and request.file == file
            if request.range is not None and repo in (None, request.repo)
        ]

    # -- deciding the answers

    def _answer(self, request: _Request) -> _Reply:
        """The right answer to a request, with what the log says of it."""
        if match := (_CDN_ROUTE if request.origin == "cdn" else _RESOLVE_ROUTE).fullmatch(request.path):
            decide, file_path = self._answer_file, unquote(match["path"])
        elif request.origin == "hub" and (match := _API_ROUTE.fullmatch(request.path)):
            decide, file_path = self._answer_api, None
        else:
            return _refusal_reply(_RefusalError(404, "", f"no such page here: {request.path}"))
        route = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        try:
            reply = decide(request, route)
        except _RefusalError as refusal:
            reply = _refusal_reply(refusal)
        return replace(reply, repo=route["repo"], file=file_path)

    def _find_repo(self, repo_id: str) -> _Repo:
        if repo_id not in self._repos:
            raise _RefusalError(404, "RepoNotFound", "Repository not found")
        return self._repos[repo_id]

    def _find_commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, _File]]:
        repo = self._find_repo(repo_id)
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def _check_access(self, request: _Request, repo_id: str) -> None:
        wanted = self._find_repo(repo_id).gated_token
        if wanted is None or request.token == wanted:
            return
        if request.token is None:
            message = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
            raise _RefusalError(401, "GatedRepo", message)
        raise _RefusalError(403, "GatedRepo", f"Access to model {repo_id} is restricted: you are not on its list.")

    def _answer_file(self, request: _Request, route: Mapping[str, str]) -> _Reply:
        """`/resolve/` on the hub, and the CDN: the same files behind different checks."""
        if request.method not in ("GET", "HEAD"):
            raise _RefusalError(405, "", f"{request.method} is not allowed for a file")
        repo_id, path = route["repo"], route["path"]
        if request.origin == "cdn":
            self._check_signed(request)
        else:
            self._check_access(request, repo_id)
        commit, files = self._find_commit(repo_id, route["rev"])
        if path not in files:
            raise _RefusalError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if request.origin == "cdn":
            reply = _file_reply(request, files[path], {})
        else:
            reply = self._answer_resolve(request, repo_id, commit, path, files[path])
        with contextlib.suppress(ValueError):
            return replace(reply, range=parse_range(request.headers.get("Range"), files[path].size))
        return reply

    def _answer_resolve(self, request: _Request, repo_id: str, commit: str, path: str, file: _File) -> _Reply:
        if not file.is_large:
            return _file_reply(request, file, {"X-Repo-Commit": commit})
        headers = {
            "Location": self._signed_url(f"/repos/{quote(repo_id)}/{commit}/{quote(path)}"),
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(file.size),
            "X-Linked-Etag": file.etag,
            "Accept-Ranges": "bytes",
        }
        return _Reply(status=302, headers=headers)

    def _answer_api(self, request: _Request, route: Mapping[str, str]) -> _Reply:
        repo_id = route["repo"]
        commit, files = self._find_commit(repo_id, route.get("rev", "main"))
        if route.get("what") == "tree":
            return _json_reply(_tree(files, route.get("path", ""), recursive=request.flag("recursive")))
        if route.get("what") == "paths-info":
            entries = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            return _json_reply([entries[path] for path in _posted_paths(request) if path in entries])
        return _json_reply(self._model_info(request, repo_id, commit, files), {"X-Repo-Commit": commit})

    def _model_info(
        self, request: _Request, repo_id: str, commit: str, files: Mapping[str, _File]
    ) -> dict[str, object]:
        blobs = request.flag("blobs")
        info: dict[str, object] = {
            "_id": commit[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.rpartition("/")[0] or None,
            "sha": commit,
            "createdAt": "2025-01-01T00:00:00.000Z",
            "lastModified": "2025-01-01T00:00:00.000Z",
            "private": False,
            "gated": "manual" if self._repos[repo_id].gated_token is not None else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["transformers", "safetensors"],
            "library_name": "transformers",
            "siblings": [file.sibling(path, blobs=blobs) for path, file in files.items()],
        }
        expand = {name for key in ("expand", "expand[]") for name in request.query.get(key, [])}
        return {key: value for key, value in info.items() if not expand or key in expand | {"_id", "id"}}

    # -- signed URLs

    def _signed_url(self, path: str) -> str:
        expires = math.ceil(self.clock() + self.url_lifetime_s)
        return f"{self.cdn_endpoint}{path}?Expires={expires}&Signature={self._signature(path, expires)}"

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"{unquote(path)}\n{expires}".encode(), "sha256").hexdigest()

    def _check_signed(self, request: _Request) -> None:
        if "Authorization" in request.headers:
            raise _RefusalError(400, "", "Only one auth mechanism allowed: the signature, or the Authorization header")
        expires, signature = (request.query.get(name, [""])[0] for name in ("Expires", "Signature"))
        if not expires.isdecimal() or not hmac.compare_digest(
            signature.encode(), self._signature(request.path, int(expires)).encode()
        ):
            raise _RefusalError(403, "", "Access denied: the signature does not match")
        if self.clock() >= int(expires):
            raise _RefusalError(403, "", "Access denied: the request has expired")


def _tree(files: Mapping[str, _File], below: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The Hub's listing of a folder ("" is the root): folders and files, or everything below it."""
    prefix = f"{below.rstrip('/')}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
            if recursive or depth == 1:
                entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            entries[path] = file.tree_entry(path)
    if not entries:
        raise _RefusalError(404, "EntryNotFound", f"{below} does not exist")
    return list(entries.values())


def _posted_paths(request: _Request) -> list[str]:
    """The `paths` of a paths-info request, which clients post as a form or as JSON."""
    if request.headers.get("Content-Type", "").startswith("application/json"):
        return list(json.loads(request.body)["paths"])
    return parse_qs(request.body.decode()).get("paths", [])


# ---- sockets and threads ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _LogRow:
    info: RequestInfo
    status: int = 0
    bytes_sent: int = 0


class _Log:
    """Requests and how much of each answer was sent. What a client has received was counted before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[_LogRow] = []

    def begin(self, info: RequestInfo) -> _LogRow:
        row = _LogRow(info)
        with self._lock:
            self._rows.append(row)
        return row

    def snapshot(self) -> list[LoggedRequest]:
        with self._lock:
            rows = list(self._rows)
        return [LoggedRequest(**asdict(row.info), status=row.status, bytes_sent=row.bytes_sent) for row in rows]

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()


class _Listener(ThreadingHTTPServer):
    """One listening socket, with a thread that accepts and one for each connection; `close` leaves none of them."""

    daemon_threads = False  # so that server_close joins them
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: HubServer, origin: Origin) -> None:
        self.hub, self.origin = hub, origin
        self.closing = threading.Event()
        self.defects: list[BaseException] = []
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)
        self._acceptor = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, name=f"hub-server-{origin}"
        )
        self._acceptor.start()

    @property
    def url(self) -> str:
        return f"http://{self.server_name}:{self.server_port}"

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self._acceptor.join()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def server_bind(self) -> None:
        # HTTPServer's own would ask DNS for the name of the address.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        if self.origin == "cdn" and self.server_name == "127.0.0.1":
            self.server_name = "localhost"  # huggingface_hub 1.x sees another host only by its name, not by its port

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Without the usual shutdown before the close: a FIN would go out ahead of a fault's RST.
        with self._lock:
            self._connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError) and not self.closing.is_set():
            self.defects.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        request = _Request(
            origin=self.server.origin,
            method=self.command,
            target=self.path,
            headers=self.headers,
            body=self._body(),
        )
        reply = hub._answer(request)
        info = RequestInfo(
            origin=request.origin,
            method=request.method,
            path=request.path,
            repo=reply.repo,
            file=reply.file,
            range=reply.range,
            had_authorization="Authorization" in request.headers,
            user_agent=request.headers.get("User-Agent", ""),
        )
        fault = hub.fault(info) if hub.fault is not None else None
        self._send(info, _with_fault(reply, fault), fault)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _send(self, info: RequestInfo, reply: _Reply, fault: Fault | None) -> None:
        length = reply.body.end - reply.body.start
        to_send = 0 if self.command == "HEAD" else length
        cut = to_send
        row = self.server.hub._log.begin(info)
        if isinstance(fault, Reset | Stall | Truncate):
            if fault.after_bytes is not None and to_send > 0:
                cut = min(fault.after_bytes, to_send)
            elif not interrupt(self, fault, self.server.closing):
                return
            else:
                fault = None  # over before the headers
        row.status = reply.status
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self._send_body(reply.body, 0, cut, row)
        if interrupt(self, fault, self.server.closing):
            self._send_body(reply.body, cut, to_send, row)

    def _send_body(self, body: _Body, skip: int, stop: int, row: _LogRow) -> None:
        for piece in body.pieces(skip, stop):
            row.bytes_sent += len(piece)
            try:
                self.wfile.write(piece)
            except OSError:
                row.bytes_sent -= len(piece)
                raise


def interrupt(handler: BaseHTTPRequestHandler, fault: Fault | None, closing: threading.Event) -> bool:
    """Do to the handler's connection what the fault says. Whether the answer goes on after it."""
    match fault:
        case Stall():
            closing.wait(fault.seconds)
            handler.close_connection = closing.is_set()
            return not handler.close_connection
        case Reset():
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            return False
        case Truncate():
            handler.close_connection = True
            return False
    return True


# ---- standalone ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.hub", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME[@REVISION]=FOLDER", required=True)
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME=TOKEN")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(arguments)
    tokens = dict(item.split("=", 1) for item in options.gated)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with HubServer(port=options.port) as hub:
        for item in options.repo:
            name, folder = item.split("=", 1)
            repo_id, _, revision = name.partition("@")
            hub.add_repo(repo_id, Path(folder), revision=revision or "main", gated_token=tokens.get(repo_id))
        print(hub.endpoint, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
