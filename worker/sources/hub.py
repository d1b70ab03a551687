"""A checkpoint on the Hugging Face Hub, or on a server that speaks like it.

The Hub names a file's version and where its bytes lie: for large files a signed URL on another origin (the "CDN"),
which expires. The token goes to the Hub's own origin alone. The client is huggingface_hub's shared one, so its proxies
and certificates hold; nothing here imports httpx, whose name differs between huggingface_hub's versions.

A file of the commit that is whole in huggingface_hub's cache on this machine is read from there.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from urllib.parse import urljoin

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported, but not by `as`

from ...proto.v1.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GatedCheckpointError,
    SourceError,
)
from ..records import FileVersion, HubToken
from . import answers
from .base import Cancel, check_name, check_range
from .disk import DiskReader
from .hub_cache import CachedFile, HubCache
from .once import OncePerFile
from .patience import ATTEMPTS, Failure, Patience, Sleep, cause_of

# HfHubHTTPError(HTTPError, OSError): httpx's base of all transport errors, by whichever name httpx goes. A RuntimeError
# is what the shared client raises when huggingface_hub replaced it in this very moment.
_HTTP_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
TRANSIENT = (_HTTP_ERROR, OSError, RuntimeError)

logger = logging.getLogger(__name__)

_CACHE_ATTEMPTS = 2  # the network is there, too
_REMEDY_TOKEN = "accept its terms on the Hub, and pass token=… or set HF_TOKEN to one that may read it"


def why_no_hub(local_files_only: bool) -> tuple[str, str]:
    """Why the Hub is not asked, where it isn't, and what would change that."""
    if local_files_only:
        return "local_files_only=True keeps the Hub from being asked", "leave it out"
    return "HF_HUB_OFFLINE is set", "unset it"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Located:
    version: FileVersion
    url: str

    def __repr__(self) -> str:
        return f"_Located({self.version!r}, {answers.redact(self.url)!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure(Failure):
    """A request's: `is_stale` has the location asked for again."""

    moved_to: str = ""


class HubSource:
    """Files of one commit of `repo_id`, read by ranges.

    Args:
        token: as in huggingface_hub: None takes the one saved on this machine, if any.
        attempts: requests in a row that may fail, without a byte gained, before `SourceError`.
        connect_s, stall_s: limits on connecting, and on waiting for the next bytes.
        cache_dir: the Hub's cache on this machine; "" for huggingface_hub's own.
        is_cached_only: the Hub can't be asked: what `stat` doesn't find in the cache doesn't exist. Bytes are asked
            for all the same where the cache lacks them: another machine's cache may hold less, and its network more.
        local_files_only: nor are bytes: what the cache lacks is a SourceError.
        sleep: waits between attempts; by default a sleep that a `Cancel` ends.
    """

    def __init__(
        self,
        repo_id: str,
        commit: str,
        *,
        subfolder: str = "",
        endpoint: str | None = None,
        token: HubToken = None,
        cache_dir: str = "",
        is_cached_only: bool = False,
        local_files_only: bool = False,
        attempts: int = ATTEMPTS,
        connect_s: float = 10.0,
        stall_s: float = 20.0,
        sleep: Sleep | None = None,
    ) -> None:
        from ... import __version__

        self._repo_id, self._commit, self._subfolder = repo_id, commit, subfolder
        self._endpoint, self._token = endpoint or None, token
        self._attempts, self._connect_s, self._stall_s, self._sleep = attempts, connect_s, stall_s, sleep
        self._hub_origin = answers.origin(self._url("config.json"))
        self._library: dict[str, Any] = {"library_name": "shardlift", "library_version": __version__}
        self._hub_headers = build_hf_headers(token=token, **self._library)
        self._cdn_headers = build_hf_headers(token=False, **self._library)
        self._lock = threading.Lock()
        self._located = OncePerFile[_Located]()
        self._etags: dict[tuple[str, object], str] = {}  # by file and origin: a CDN's tags need not be the Hub's
        self._sockets = _Sockets()
        self._is_cached_only = is_cached_only or local_files_only
        self._local_files_only = local_files_only
        self._cache = HubCache(
            repo_id,
            commit,
            subfolder=subfolder,
            cache_dir=cache_dir,
            reader=DiskReader(attempts=min(attempts, _CACHE_ATTEMPTS), sleep=sleep),
        )
        self._cached: dict[str, CachedFile | None] = {}  # None: not there, or not to be believed
        self._network_bytes = self._cache_bytes = 0
        _redact_logs()

    def __repr__(self) -> str:
        return f"HubSource({self._repo_id!r}, {self._commit!r})"

    @property
    def link(self) -> str:
        """By what was read so far."""
        host = self._hub_origin[1] if self._hub_origin is not None else "no address"
        network, cache = f"the Hub ({host})", "the Hub's cache on this machine"
        with self._lock:
            if not self._cache_bytes:
                return network
            return f"{network} and its cache on this machine" if self._network_bytes else cache

    def stat(self, file: str) -> FileVersion:
        cached = self._cache.find_whole(file)
        if cached is not None and (cached.version.etag or self._is_offline):
            return cached.version
        if self._cache.lacks(file):
            raise CheckpointNotFoundError(
                f"{self._label(file)} does not exist, by the Hub's cache ({self._cache.folder}); check its name"
            )
        if self._is_offline and self._cache.has_snapshot():
            raise CheckpointNotFoundError(
                f"{self._label(file)} is not in the Hub's cache ({self._cache.folder}), and the Hub can't be asked: "
                f"{'it was out of reach' if self._may_ask else why_no_hub(self._local_files_only)[0]}"
            )
        patience = self._patience(f"the size of {self._label(file)}", Cancel())
        located = self._resolve(file, patience)
        self._located.put(file, located)
        return located.version

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        check_range(file, start, len(buffer), version)
        end, cancel = start + len(buffer), cancel or Cancel()
        if self._read_cached(file, start, buffer, version, cancel):
            return
        patience = self._patience(f"bytes {start} to {end} of {self._label(file)}", cancel)
        located = None
        while start < end:
            located = located or self._locate(file, version, patience)
            cancel.check(file)
            flight = _Flight(self._sockets, cancel)
            failure = self._get(file, located, start, buffer[len(buffer) - (end - start) :], flight)
            cancel.check(file)
            start += flight.received_bytes
            with self._lock:
                self._network_bytes += flight.received_bytes
            patience.gained(flight.received_bytes)
            if start < end:
                assert failure is not None
                stale, located = located, self._moved(file, located, failure)
                if located is None:
                    self._located.forget(file, stale)
                patience.failed(failure)

    def verify(self, file: str, version: FileVersion) -> None:
        """Each answer has told its version, and a commit's files never change."""

    def close(self) -> None:
        """The client and its connections are huggingface_hub's, and stay."""

    # -- the cache

    @property
    def _is_offline(self) -> bool:
        return self._is_cached_only or constants.HF_HUB_OFFLINE

    @property
    def _may_ask(self) -> bool:
        return not self._local_files_only and not constants.HF_HUB_OFFLINE

    def _read_cached(self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel) -> bool:
        """Fill the buffer from the cache; False if that isn't possible."""
        with self._lock:
            is_known, cached = file in self._cached, self._cached.get(file)
        if not is_known:
            cached = self._cache.find(file)
            if cached is not None and not cached.version.is_same(version):
                logger.info("%s is cached as %s; %s is fetched", self._label(file), cached.version, version)
                cached = None
            with self._lock:
                self._cached[file] = cached
        if cached is None or not cached.version.is_same(version):
            return False
        try:
            self._cache.read_into(cached, start, buffer, cancel)
        except (CheckpointError, SourceError) as error:
            logger.warning("%s; it is fetched from the Hub instead", error)
            with self._lock:
                self._cached[file] = None
            return False
        with self._lock:
            self._cache_bytes += len(buffer)
        return True

    # -- where a file lies

    def _url(self, file: str) -> str:
        return hf_hub_url(
            self._repo_id,
            check_name(file),
            subfolder=self._subfolder or None,
            revision=self._commit,
            endpoint=self._endpoint,
        )

    def _label(self, file: str) -> str:
        folder = f"{self._subfolder}/" if self._subfolder else ""
        return f"{self._repo_id}@{self._commit[:12]}/{folder}{file}"

    def _locate(self, file: str, version: FileVersion, patience: Patience) -> _Located:
        located = self._located.get(file, lambda: self._resolve(file, patience))
        if not located.version.is_same(version):
            self._changed(file, f"{version} when the load began, {located.version} now")
        return located

    def _moved(self, file: str, located: _Located, failure: _Failure) -> _Located | None:
        """Where to read on after the failure; None if the Hub has to be asked."""
        if failure.is_stale:
            return None
        if failure.moved_to:
            located = replace(located, url=urljoin(located.url, failure.moved_to))
            self._located.put(file, located)
        return located

    def _resolve(self, file: str, patience: Patience) -> _Located:
        """Ask the Hub for the file's version and location, as often as `patience` allows."""
        if not self._may_ask:
            why, remedy = why_no_hub(self._local_files_only)
            raise SourceError(
                f"{self._label(file)} is not whole in this machine's cache of it ({self._cache.folder}), and {why}: "
                f"{remedy}, or pass a folder that every node sees"
            )
        url = self._url(file)
        while True:
            patience.check(file)
            try:
                metadata = get_hf_file_metadata(
                    url, token=self._token, timeout=self._stall_s, endpoint=self._endpoint, **self._library
                )
            except HfHubHTTPError as error:
                status, headers = error.response.status_code, error.response.headers
                if not answers.is_transient(status):
                    self._refused(file, status, error)
                patience.failed(_Failure(cause=f"HTTP {status}", wait_s=_wait_s(headers), error=error))
            except TRANSIENT as error:
                patience.failed(_Failure(cause=cause_of(error, self._host(url)), error=error))
            else:
                if metadata.size is None or not metadata.etag:
                    raise SourceError(
                        f"the server gives no size or no ETag for {self._label(file)}: is its endpoint a real Hub?"
                    )
                version = FileVersion(size_bytes=metadata.size, etag=metadata.etag)
                return _Located(version=version, url=urljoin(url, metadata.location))

    def _refused(self, file: str, status: int, error: BaseException | None = None) -> NoReturn:
        """What the Hub itself answers for good. Its own text is not quoted: it carries URLs."""
        label = self._label(file)
        if isinstance(error, GatedRepoError) or status in (401, 403):
            raise GatedCheckpointError(
                f"the Hub answered {status} for {label}: gated, private, or not there; {_REMEDY_TOKEN}"
            ) from None
        if status == 404:
            raise CheckpointNotFoundError(
                f"the Hub answered 404 for {label}: no such repository, revision or file; check all three names"
            ) from None
        raise SourceError(f"the Hub answered {status} for {label}, which no retry mends") from None

    def _changed(self, file: str, how: str) -> NoReturn:
        raise CorruptCheckpointError(f"{self._label(file)} changed since the load began: {how}; load it again")

    # -- one request

    def _get(self, file: str, located: _Located, start: int, buffer: memoryview, flight: _Flight) -> _Failure | None:
        """Ask for the buffer's bytes, from `start` on; count in `flight` those that came. None if all did."""
        host = answers.origin(located.url)
        if host is None:
            return _Failure(cause="the Hub gave a location that is no http URL", is_stale=True)
        is_hub = host == self._hub_origin
        headers = {
            **(self._hub_headers if is_hub else self._cdn_headers),
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{start + len(buffer) - 1}",
        }
        try:
            with (
                flight,
                get_session().stream(
                    "GET",
                    located.url,
                    headers=headers,
                    follow_redirects=False,
                    timeout=(self._connect_s, self._stall_s, self._stall_s, self._stall_s),
                    extensions={"trace": flight.trace},
                ) as response,
            ):
                flight.saw(response.extensions.get("network_stream"))
                failure = self._judge(file, located, response.status_code, response.headers, start, len(buffer), is_hub)
                if failure is not None:
                    return failure
                self._check_etag(file, located, host, response.headers)
                for piece in response.iter_raw():
                    if not flight.store(buffer, piece):
                        return _Failure(cause="the server sent more bytes than asked")
        except TRANSIENT as error:
            return _Failure(cause=cause_of(error, host[1]), error=error)
        if flight.received_bytes < len(buffer):
            return _Failure(cause="the answer ended early")
        return None

    def _judge(
        self,
        file: str,
        located: _Located,
        status: int,
        headers: Mapping[str, str],
        start: int,
        byte_count: int,
        is_hub: bool,
    ) -> _Failure | None:
        """None if the answer's body is the bytes asked for."""
        size = located.version.size_bytes
        if status == 206:
            span = answers.parse_content_range(headers.get("content-range", ""))
            if span is not None and span.total_bytes not in (None, size):
                self._changed(file, f"{size} bytes then, {span.total_bytes} now")
            if span is None or (span.start, span.end) != (start, start + byte_count):
                return _Failure(cause=f"HTTP 206 with Content-Range {headers.get('content-range', 'missing')[:60]!r}")
        elif status == 200:
            if (start, byte_count) != (0, size) or headers.get("content-length", str(size)) != str(size):
                return _Failure(cause="HTTP 200 in place of 206: the server ignores ranges")
        elif status == 416:
            self._changed(file, f"it no longer has bytes {start} to {start + byte_count}")
        elif status in (301, 302, 303, 307, 308) and headers.get("location"):
            return _Failure(cause=f"HTTP {status}", moved_to=headers["location"], wait_s=0.0)
        elif answers.is_transient(status):
            return _Failure(cause=f"HTTP {status}", wait_s=_wait_s(headers))
        elif is_hub:
            self._refused(file, status)
        else:
            return _Failure(cause=f"HTTP {status} from the CDN", is_stale=True)
        if headers.get("content-encoding", "identity") != "identity":
            return _Failure(cause=f"Content-Encoding {headers['content-encoding'][:20]!r}, which was not asked for")
        return None

    def _check_etag(self, file: str, located: _Located, host: object, headers: Mapping[str, str]) -> None:
        """The Hub's tag (X-Linked-Etag) is the version's. A CDN's may be another hash: it must only stay as it was."""
        linked, etag = (answers.normalize_etag(headers.get(name)) for name in ("x-linked-etag", "etag"))
        if linked and linked != located.version.etag:
            self._changed(file, f"ETag {located.version.etag} then, {linked[:80]} now")
        if etag:
            with self._lock:
                pinned = self._etags.setdefault((file, host), etag)
            if etag != pinned:
                self._changed(file, f"ETag {pinned[:80]} then, {etag[:80]} now")

    def _patience(self, what: str, cancel: Cancel) -> Patience:
        return Patience(what, self._attempts, sleep=self._sleep, cancel=cancel)

    @staticmethod
    def _host(url: str) -> str:
        found = answers.origin(url)
        return found[1] if found is not None else ""


def _wait_s(headers: Mapping[str, str]) -> float | None:
    return answers.retry_after_s(headers, time.time())


# ---- breaking off ----------------------------------------------------------------------------------------------------


class _Sockets:
    """The sockets that a source's requests were seen on. Each belongs to the client's pool, and stays there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._busy: dict[_Flight, socket.socket] = {}

    def use(self, flight: _Flight, found: socket.socket) -> None:
        with self._lock:
            self._seen.add(found)
            self._busy[flight] = found

    def release(self, flight: _Flight) -> None:
        with self._lock:
            self._busy.pop(flight, None)

    def of(self, flight: _Flight) -> list[socket.socket]:
        """The flight's own; or, as long as it isn't known, every one that no other flight uses."""
        with self._lock:
            if flight in self._busy:
                return [self._busy[flight]]
            busy = set(self._busy.values())
            return [found for found in self._seen if found not in busy]


class _Flight:
    """One request, and the means to break it off from another thread, wherever it blocks.

    Closing a response doesn't wake the thread that reads it; shutting its socket down does. Which socket that is, the
    client tells when it connects (the `trace` extension) and when the answer begins (`network_stream`). A request that
    waits for its answer on a reused connection can be on any idle one, so then all of those are shut down: the pool
    replaces them.
    """

    def __init__(self, sockets: _Sockets, cancel: Cancel) -> None:
        self._sockets, self._cancel = sockets, cancel
        self._calling = cancel.calling(self.abort)
        self.received_bytes = 0

    def __enter__(self) -> None:
        self._calling.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._calling.__exit__(*exception)
        self._sockets.release(self)

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.saw(info.get("return_value"))

    def saw(self, stream: Any) -> None:
        found = stream.get_extra_info("socket") if stream is not None else None
        if isinstance(found, socket.socket):
            self._sockets.use(self, found)
            if self._cancel.is_set:
                self.abort()

    def abort(self) -> None:
        for found in self._sockets.of(self):
            try:
                socket.socket.shutdown(found, socket.SHUT_RDWR)  # not SSLSocket's: it takes TLS away from the reader
            except OSError:
                continue  # closed already

    def store(self, buffer: memoryview, piece: bytes) -> bool:
        """Append the piece; False if it doesn't fit."""
        end = self.received_bytes + len(piece)
        if end > len(buffer):
            return False
        buffer[self.received_bytes : end] = piece
        self.received_bytes = end
        return True


# ---- logs ------------------------------------------------------------------------------------------------------------


class _RedactQueries(logging.Filter):
    """httpx logs every URL at INFO, and its transport every header at DEBUG: signed URLs among them."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        redacted = answers.redact(message)
        if redacted != message:
            record.msg, record.args = redacted, ()
        return True


_REDACT_QUERIES = _RedactQueries()


def _redact_logs() -> None:
    for client in ("httpx", "httpx2", "huggingface_hub.utils._http"):
        logging.getLogger(client).addFilter(_REDACT_QUERIES)  # adding it again changes nothing
    for transport in ("httpcore", "httpcore2"):
        for part in ("connection", "http11", "http2", "proxy"):
            logging.getLogger(f"{transport}.{part}").addFilter(_REDACT_QUERIES)
