"""Checkpoints named by URL: what such a name may be. Pure.

A URL says where a checkpoint lies, never how to get in: it goes into plans, logs and names of models. So one that
carries a password, a key or a signature is refused, and is not quoted by the refusal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from ...proto.v1.errors import InvalidRequestError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]]*)(:\d{1,5})?")
_FILE_SCHEMES = {"file", "local"}
# The host may carry a user's or a container's name here: sftp://user@host, abfs://container@account.
_NAMED_HOSTS = {"abfs", "abfss", "az", "adl", "wasb", "wasbs", "sftp", "ssh", "ftp", "ftps", "smb", "hdfs", "webhdfs"}
_HOSTLESS = {"memory"}
_HUB_HOSTS = {"huggingface.co", "hf.co", "www.huggingface.co"}
_REMEDY = "give each node its credentials in its environment (AWS_ACCESS_KEY_ID and the like), and the bare URL here"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointUrl:
    """scheme://host/path; `path` has no slash at either end, and may be empty."""

    scheme: str
    host: str
    path: str

    @property
    def text(self) -> str:
        return f"{self.root}/{self.path}" if self.path else self.root

    @property
    def root(self) -> str:
        """Without the path: the bucket, the server."""
        return f"{self.scheme}://{self.host}"

    @property
    def is_file(self) -> bool:
        return self.scheme in _FILE_SCHEMES

    @property
    def folder(self) -> str:
        """What a file:// URL names."""
        assert self.is_file
        return "/" + unquote(self.path)


def is_url(text: str) -> bool:
    return "://" in text


def parse_url(text: str) -> CheckpointUrl:
    """Raises InvalidRequestError for what is no URL of a folder of files, or holds what should stay secret."""
    match = _SCHEME.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError(
            f"{text.partition('://')[0][:40]!r} is no URL's scheme: name a URL (s3://bucket/folder), a repository "
            "(org/name) or a folder"
        )
    scheme, rest = match[1].lower(), match[2]
    if "?" in rest or "#" in rest:
        raise InvalidRequestError(f"a {scheme}:// URL with a query or a fragment is refused (a signature?): {_REMEDY}")
    host, _, path = rest.partition("/")
    user, at, name = host.rpartition("@")
    # A key may hold slashes: then its beginning stands here, as what can be no port.
    if ":" in user or (at and scheme not in _NAMED_HOSTS) or not _HOST.fullmatch(name):
        raise InvalidRequestError(f"a {scheme}:// URL with a name or a password before its host is refused: {_REMEDY}")
    if not rest.isprintable() or " " in host:
        raise InvalidRequestError(f"a {scheme}:// URL with spaces in its host, or unprintable characters, is refused")
    path = path.strip("/") if scheme in _FILE_SCHEMES or not host else path.rstrip("/")
    if scheme in _FILE_SCHEMES:
        if host not in ("", "localhost"):
            raise InvalidRequestError(f"{scheme}://{host[:80]} is on another machine: write {scheme}:///folder")
        host = ""
    elif not host and not (scheme in _HOSTLESS and path):
        raise InvalidRequestError(f"{scheme}:// names no bucket or server: write {scheme}://bucket/folder")
    if ".." in path.split("/"):
        raise InvalidRequestError(f"{scheme}://{host}/{path[:200]} holds '..': write the whole path")
    if scheme == "hf" or host.lower() in _HUB_HOSTS:
        raise InvalidRequestError(
            f"{scheme}://{host} is the Hub: name the repository as org/name, and its revision beside (revision=…)"
        )
    return CheckpointUrl(scheme=scheme, host=host, path=path)
