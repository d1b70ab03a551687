"""Stores that fsspec can read: everything that is asked of fsspec and of its file systems is in this file.

fsspec remembers listings, and one file system for each set of arguments; a load must see what is there now, and must
not share a connection that somebody else closes. So each store has a file system of its own, without listings.
Credentials and endpoints are the process's own: AWS_*, GOOGLE_*, AZURE_*, or FSSPEC_<SCHEME>_<ARGUMENT>.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol
from urllib.parse import quote

from ...proto.v1.errors import InvalidRequestError, SourceError, one_line
from . import answers
from .base import Cancel
from .patience import cause_of
from .store_errors import AnswerError, Meaning
from .urls import CheckpointUrl

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_NOT_STORES = {
    "data",
    "reference",
    "simplecache",
    "filecache",
    "blockcache",
    "cached",
    "dir",
    "zip",
    "tar",
    "libarchive",
}
_UNQUOTED = "/%:@!$&'()*+,;=~"
_GRACE_S = 10.0  # for the loop's own time limit to be kept, before it is given up
_CLOSE_S = 2.0


class Store(Protocol):
    """Safe to call from several threads. Raises the library's own errors, which `store_errors.judge` reads."""

    def info(self, path: str, cancel: Cancel) -> Mapping[str, Any]: ...

    def read(self, path: str, start: int, end: int, etag: str, cancel: Cancel) -> bytes:
        """The bytes [start, end), or fewer; `etag` is the version's, for stores that tell it with each answer."""
        ...

    def close(self) -> None: ...


def open_store(url: CheckpointUrl, *, connect_s: float, stall_s: float, limit_s: float) -> Store:
    """The store that `url` lies in.

    Args:
        connect_s, stall_s: limits on connecting and on waiting for the next bytes, where the library has them.
        limit_s: limit on one answer, whole.

    Raises:
        InvalidRequestError: an unknown scheme, or a package that isn't installed here.
        SourceError: the library can't set itself up.
    """
    kind = _class(url.scheme)
    options = {**kind._get_kwargs_from_urls(url.text), **_options(url.scheme, connect_s, stall_s)}
    if not kind.async_impl:
        return _SyncStore(kind, options)
    try:
        filesystem = kind(**options, skip_instance_cache=True)
    except Exception as error:  # each library has its own
        raise SourceError(f"{url.root} can't be opened: {cause_of(error)}; check this node's environment") from None
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs': ours know how far a read came, and what ends it
    store = _HttpStore if url.scheme in ("http", "https") else _AsyncStore
    return store(filesystem, limit_s)


def _class(scheme: str) -> Any:
    import fsspec

    try:
        if scheme in _NOT_STORES:
            raise ValueError
        return fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise InvalidRequestError(
            f"{scheme}:// is no store that can be read: name one of s3://, gs://, abfs://, https://, or a folder or a "
            "repository (org/name)"
        ) from None
    except ImportError as error:
        remedy = (
            f"pip install 'shardlift[{_EXTRAS[scheme]}]'"
            if scheme in _EXTRAS
            else f"install its fsspec package ({one_line(error, 120)})"
        )
        raise InvalidRequestError(
            f"{scheme}:// needs a package that is not installed here: {remedy}, on every node"
        ) from None


def _options(scheme: str, connect_s: float, stall_s: float) -> dict[str, Any]:
    """Arguments of the file system. What FSSPEC_* sets beside them stays; one argument replaces one there, whole."""
    from fsspec.config import conf

    def given(name: str) -> Mapping[str, Any]:
        value = conf.get(scheme, {}).get(name)
        return value if isinstance(value, Mapping) else {}

    if scheme in ("s3", "s3a"):
        ours = {
            "connect_timeout": connect_s,
            "read_timeout": stall_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        return {"use_listings_cache": False, "config_kwargs": {**ours, **given("config_kwargs")}}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=stall_s)
        ours = {"timeout": timeout, "trust_env": True}  # proxies, as the Hub's client has them
        return {"use_listings_cache": False, "client_kwargs": {**ours, **given("client_kwargs")}}
    return {}


class _SyncStore:
    """A file system that blocks: one for each thread, since few of them are safe to share."""

    def __init__(self, kind: Any, options: Mapping[str, Any]) -> None:
        self._kind, self._options = kind, options
        self._own = threading.local()

    def info(self, path: str, cancel: Cancel) -> Mapping[str, Any]:
        filesystem = self._filesystem()
        filesystem.invalidate_cache()
        found: Mapping[str, Any] = filesystem.info(filesystem._strip_protocol(path))
        return found

    def read(self, path: str, start: int, end: int, etag: str, cancel: Cancel) -> bytes:
        filesystem = self._filesystem()
        return bytes(filesystem.cat_file(filesystem._strip_protocol(path), start=start, end=end))

    def close(self) -> None:
        """Each thread's ends with it."""

    def _filesystem(self) -> Any:
        if not hasattr(self._own, "filesystem"):
            self._own.filesystem = self._kind(**self._options, skip_instance_cache=True)
        return self._own.filesystem


class _AsyncStore:
    """A file system that runs on fsspec's event loop: a read that blocks is cancelled there."""

    def __init__(self, filesystem: Any, limit_s: float) -> None:
        self._filesystem, self._limit_s = filesystem, limit_s
        self._refresh = {"refresh": True} if "refresh" in inspect.signature(filesystem._info).parameters else {}

    def info(self, path: str, cancel: Cancel) -> Mapping[str, Any]:
        self._filesystem.invalidate_cache()
        found: Mapping[str, Any] = self._run(self._filesystem._info(self._path(path), **self._refresh), cancel)
        return found

    def read(self, path: str, start: int, end: int, etag: str, cancel: Cancel) -> bytes:
        return bytes(self._run(self._filesystem._cat_file(self._path(path), start=start, end=end), cancel))

    def close(self) -> None:
        """Ends its connections; without that, the loop would complain of them when they are collected."""
        session = getattr(self._filesystem, "_s3creator", None) or getattr(self._filesystem, "_session", None)
        leave = getattr(session, "__aexit__", None)
        if leave is None:
            return
        try:
            future = asyncio.run_coroutine_threadsafe(leave(None, None, None), self._filesystem.loop)
            future.result(_CLOSE_S)
        except Exception:
            return  # nothing was promised, and a load that is over must not fail by it

    def _path(self, path: str) -> str:
        return str(self._filesystem._strip_protocol(path))

    def _run(self, work: Coroutine[Any, Any, Any], cancel: Cancel) -> Any:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, self._limit_s), self._filesystem.loop)
        try:
            with cancel.calling(future.cancel):
                if cancel.is_set:
                    future.cancel()
                return future.result(self._limit_s + _GRACE_S)
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            raise AnswerError("the read was broken off", meaning=Meaning.TRANSIENT) from None
        finally:
            future.cancel()  # for whatever else ended the wait


class _HttpStore(_AsyncStore):
    """Plain HTTP. From a server that ignores ranges fsspec would take the whole file into memory: this looks first."""

    def read(self, path: str, start: int, end: int, etag: str, cancel: Cancel) -> bytes:
        return bytes(self._run(self._read(path, start, end, etag), cancel))

    def _path(self, path: str) -> str:
        scheme, _, rest = path.partition("://")
        host, _, name = rest.partition("/")
        return f"{scheme}://{host}/{quote(name, safe=_UNQUOTED)}"

    async def _read(self, path: str, start: int, end: int, etag: str) -> bytearray:
        session = await self._filesystem.set_session()
        arguments = dict(self._filesystem.kwargs)
        headers = {**arguments.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        url = self._filesystem.encode_url(self._path(path))
        data = bytearray()
        async with session.get(url, headers=headers, **arguments) as response:
            _check_answer(response.status, response.headers, start, end, etag)
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > end - start:
                    raise AnswerError("the server sent more bytes than asked", meaning=Meaning.TRANSIENT)
        return data


def _check_answer(status: int, headers: Mapping[str, str], start: int, end: int, etag: str) -> None:
    if status == 206:
        span = answers.parse_content_range(headers.get("Content-Range", ""))
        if span is None or (span.start, span.end) != (start, end):
            raise AnswerError(
                f"HTTP 206 with Content-Range {headers.get('Content-Range', 'missing')[:60]!r}",
                meaning=Meaning.TRANSIENT,
            )
    elif status == 200:
        if start or headers.get("Content-Length") != str(end):
            raise AnswerError(
                "HTTP 200 in place of 206: the server ignores ranges, so it can't be loaded from",
                meaning=Meaning.LASTING,
            )
    else:
        raise AnswerError(f"HTTP {status}", status=status)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise AnswerError(
            f"Content-Encoding {headers['Content-Encoding'][:20]!r}, which was not asked for", meaning=Meaning.LASTING
        )
    found = answers.normalize_etag(headers.get("ETag"))
    if found and etag and found != etag:
        raise AnswerError(f"ETag {etag[:80]} then, {found[:80]} now", meaning=Meaning.CHANGED)
