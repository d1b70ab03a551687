"""Checkpoints in object stores and on web servers: a real S3 server, a real HTTP server, and fsspec's memory."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlift.cluster import requests
from shardlift.cluster.checkpoint import CheckpointRequest, read_checkpoint, resolve_source
from shardlift.proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GatedCheckpointError,
    InvalidRequestError,
    LoadCancelledError,
    ShardliftError,
    SourceError,
)
from shardlift.worker.records import FileVersion, SourceSpec
from shardlift.worker.sources import Cancel, RemoteSource, Source, open_source
from shardlift.worker.sources.store_errors import Meaning, judge
from shardlift.worker.sources.urls import parse_url
from tests.support.hub import Fault, Reset, Stall, Status, Truncate
from tests.support.s3 import BUCKET, CREDENTIALS, S3Request, S3Server

FILE, KEY = "model.safetensors", "folder/model.safetensors"
URL = f"s3://{BUCKET}/folder"
CONTENT = bytes(index * index % 251 for index in range(300_000))
SECRET = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's environment leading to it."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    running.fault = None
    running.put(KEY, CONTENT)
    running.put("folder/config.json", b'{"model_type": "llama"}')
    running.requests.clear()
    return running


class Sleeps(list[float]):
    """Takes the place of sleep: notes how long, and returns at once."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
def source(s3: S3Server, sleeps: Sleeps) -> Iterator[RemoteSource]:
    opened = RemoteSource(URL, sleep=sleeps, connect_s=2, stall_s=2, piece_bytes=100_000)
    yield opened
    opened.close()


def read(source: Source, start: int = 0, end: int = len(CONTENT), file: str = FILE, **more: Cancel) -> bytes:
    buffer = bytearray(end - start)
    source.read_into(file, start, memoryview(buffer), source.stat(file), **more)
    return bytes(buffer)


def gets(*sequence: Fault | None) -> Callable[[S3Request], Fault | None]:
    """The next fault for each read of the file, and none when they are used up."""
    pending = iter(sequence)
    return lambda request: next(pending, None) if (request.method, request.key) == ("GET", KEY) else None


def always(fault: Fault, method: str = "GET") -> Callable[[S3Request], Fault | None]:
    return lambda request: fault if (request.method, request.key) == (method, KEY) else None


def refusal(act: Callable[[], object]) -> tuple[type[Exception], str]:
    """What `act` is refused with; as a line that tells no secret, and neither does its traceback."""
    with pytest.raises(ShardliftError) as caught:
        act()
    text = str(caught.value)
    whole = "".join(traceback.format_exception(caught.value))
    assert "\n" not in text
    assert len(text) < 600
    for secret in (SECRET, CREDENTIALS["AWS_ACCESS_KEY_ID"], "Signature=", "hunter2"):
        assert secret not in whole
    return type(caught.value), text


# ---- S3 --------------------------------------------------------------------------------------------------------------


def test_an_object_is_read_by_ranges(s3: S3Server, source: RemoteSource) -> None:
    version = source.stat(FILE)
    assert version.size_bytes == len(CONTENT)
    assert len(version.etag) == 32
    assert read(source) == CONTENT
    assert read(source, 1000, 1001) == CONTENT[1000:1001]
    assert read(source, 5, 5) == b""
    assert s3.ranges(KEY) == [(0, 100_000), (100_000, 200_000), (200_000, 300_000), (1000, 1001)]
    source.verify(FILE, version)
    assert source.link == f"s3://{BUCKET}"


def test_a_subfolder_and_an_empty_prefix(s3: S3Server) -> None:
    for location, subfolder in (
        (f"s3://{BUCKET}", "folder"),
        (f"s3://{BUCKET}/folder/", ""),
        (f"S3://{BUCKET}", "folder/"),
    ):
        source = open_source(SourceSpec(kind="url", location=location, subfolder=subfolder), None)
        assert read(source) == CONTENT
        source.close()
    s3.put("top.json", b"{}")
    source = RemoteSource(f"s3://{BUCKET}/")
    assert read(source, 0, 2, "top.json") == b"{}"
    source.close()


def test_many_threads_read_at_once(s3: S3Server, source: RemoteSource) -> None:
    version, results = source.stat(FILE), {}

    def run(start: int) -> None:
        buffer = bytearray(10_000)
        source.read_into(FILE, start, memoryview(buffer), version)
        results[start] = bytes(buffer)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(0, 300_000, 10_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {start: CONTENT[start : start + 10_000] for start in range(0, 300_000, 10_000)}
    assert [request.method for request in s3.requests].count("HEAD") == 1


def test_what_is_there_now_is_seen(s3: S3Server) -> None:
    """fsspec remembers file systems and listings; a source must not."""
    first, second = RemoteSource(URL), RemoteSource(URL)
    before = first.stat(FILE)
    s3.put(KEY, CONTENT[::-1])
    assert first.stat(FILE) != before
    assert read(second) == CONTENT[::-1]
    first.close()
    assert read(second, 0, 9) == CONTENT[::-1][:9]
    second.close()


def test_what_the_store_lacks_is_not_found(s3: S3Server, source: RemoteSource) -> None:
    for act in (
        lambda: source.stat("none"),
        lambda: read(source, 0, 1, "none"),
        lambda: source.read_into("none", 0, memoryview(bytearray(1)), FileVersion(size_bytes=1, etag="")),
        lambda: RemoteSource("s3://nosuchbucket/x").stat(FILE),
        lambda: RemoteSource(f"s3://{BUCKET}").stat("folder"),
    ):
        kind, text = refusal(act)
        assert kind is CheckpointNotFoundError
        assert "s3://" in text


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../b", "", "a\\..\\b", "a\nb"])
def test_names_that_lead_out_are_refused(source: RemoteSource, file: str) -> None:
    with pytest.raises(CorruptCheckpointError, match="leads out of the checkpoint"):
        source.stat(file)


def test_a_range_beyond_the_object_is_refused(source: RemoteSource) -> None:
    with pytest.raises(CorruptCheckpointError, match="bytes 299999 to 300001 are wanted of a file of 300000"):
        read(source, len(CONTENT) - 1, len(CONTENT) + 1)


# -- faults that pass


@pytest.mark.parametrize(
    "fault",
    [Status(500), Status(503), Status(429), Reset(None), Reset(0), Reset(50_000), Truncate(None), Truncate(50_000)],
    ids=repr,
)
def test_a_passing_fault_goes_unnoticed(s3: S3Server, source: RemoteSource, sleeps: Sleeps, fault: Fault) -> None:
    s3.fault = gets(None, fault)
    assert read(source) == CONTENT
    assert len(sleeps) <= 1  # aiohttp asks again by itself when a connection that it kept turns out to be dead
    # From the byte reached on: the first piece is not asked for again.
    assert s3.ranges(KEY) == [(0, 100_000), (100_000, 200_000), (100_000, 200_000), (200_000, 300_000)]


def test_progress_renews_the_attempts(s3: S3Server, source: RemoteSource, sleeps: Sleeps) -> None:
    s3.fault = gets(*[Status(503)] * 5, None, *[Reset(10)] * 5, None, *[Status(500)] * 5)
    assert read(source) == CONTENT
    assert len(sleeps) == 15


def test_a_stalled_read_is_asked_for_again(s3: S3Server, sleeps: Sleeps) -> None:
    source = RemoteSource(URL, sleep=sleeps, stall_s=1)
    s3.fault = gets(Stall(100_000, 30), Stall(None, 30))
    assert read(source) == CONTENT
    assert len(sleeps) >= 2
    source.close()


def test_the_time_of_a_piece_is_limited(s3: S3Server, sleeps: Sleeps) -> None:
    """Whatever the library's own limits are."""
    source = RemoteSource(URL, sleep=sleeps, stall_s=60, piece_s=2)
    s3.fault = gets(Stall(100_000, 30))
    assert read(source) == CONTENT
    assert len(sleeps) >= 1
    source.close()


def test_asking_for_the_size_may_falter(s3: S3Server, source: RemoteSource, sleeps: Sleeps) -> None:
    pending = iter([Status(503), Status(500)])
    s3.fault = lambda request: next(pending, None)
    assert source.stat(FILE).size_bytes == len(CONTENT)
    assert len(sleeps) == 2


# -- faults that stay


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(Status(503), "HTTP 503 SlowDown"), (Status(500), "HTTP 500 InternalError"), (Reset(0), "Error")],
    ids=repr,
)
def test_a_lasting_fault_ends_with_its_cause(
    s3: S3Server, source: RemoteSource, sleeps: Sleeps, fault: Fault, cause: str
) -> None:
    s3.fault = always(fault)
    kind, text = refusal(lambda: read(source, 10, 20))
    assert kind is SourceError
    assert f"reading bytes 10 to 20 of {URL}/{FILE} failed 6 times in a row, last: " in text
    assert cause in text
    # The library's own retries don't multiply ours.
    assert len(s3.ranges(KEY)) == 6
    assert len(sleeps) == 5


def test_a_store_that_is_gone(s3: S3Server, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint, words in (
        ("http://127.0.0.1:9", "EndpointConnectionError|ClientConnectorError|Could not connect"),
        ("http://no-such-host.invalid", "can't be resolved|no-such-host.invalid"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        source = RemoteSource(URL, sleep=sleeps)
        kind, text = refusal(lambda source=source: source.stat(FILE))
        source.close()
        assert kind is SourceError
        assert "failed 6 times in a row" in text
        assert re.search(words, text), text


def test_what_may_not_be_read_is_denied(s3: S3Server, source: RemoteSource, sleeps: Sleeps) -> None:
    s3.fault = lambda request: Status(403)
    for file in ("config.json", FILE):
        kind, text = refusal(lambda file=file: source.stat(file))
        assert kind is GatedCheckpointError
        assert "HTTP 403" in text
        assert "AWS_ACCESS_KEY_ID" in text
    assert sleeps == []


def test_a_store_that_hides_what_is_missing(s3: S3Server, source: RemoteSource) -> None:
    """Without the right to list, S3 answers 403 for what isn't there. What else is there tells the difference."""
    s3.fault = lambda request: Status(403) if request.key != "folder/config.json" else None
    kind, text = refusal(lambda: source.stat("generation_config.json"))
    assert kind is CheckpointNotFoundError
    assert "the right to list" in text
    version = FileVersion(size_bytes=len(CONTENT), etag="")
    kind, text = refusal(lambda: RemoteSource(URL).read_into(FILE, 0, memoryview(bytearray(9)), version))
    assert kind is CheckpointNotFoundError


def test_without_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    source = RemoteSource(URL, sleep=sleeps)
    kind, text = refusal(lambda: source.stat(FILE))
    source.close()
    assert kind is GatedCheckpointError
    assert "NoCredentialsError" in text
    assert "FSSPEC_S3_ANON=true" in text
    assert sleeps == []


# -- an object that changes


def test_an_object_that_is_replaced_is_refused(s3: S3Server, source: RemoteSource) -> None:
    version = source.stat(FILE)
    assert read(source, 0, 10) == CONTENT[:10]
    s3.put(KEY, CONTENT[::-1])
    with pytest.raises(
        CorruptCheckpointError, match=r"changed since the load began: 300000 bytes and version \w+ then"
    ):
        source.verify(FILE, version)


def test_another_version_than_the_drivers_is_refused(s3: S3Server, source: RemoteSource) -> None:
    version = RemoteSource(URL).stat(FILE)
    s3.put(KEY, CONTENT[::-1])
    with pytest.raises(CorruptCheckpointError, match="changed since the load began"):
        source.read_into(FILE, 0, memoryview(bytearray(10)), version)
    assert s3.ranges(KEY) == []


def test_an_object_that_shrinks_or_goes_is_refused(s3: S3Server, source: RemoteSource) -> None:
    version = source.stat(FILE)
    s3.put(KEY, CONTENT[:150_000])
    for start in (140_000, 200_000):  # ends early; isn't there
        with pytest.raises(CorruptCheckpointError, match=r"300000 bytes .* 150000 bytes"):
            source.read_into(FILE, start, memoryview(bytearray(50_000)), version)
    s3.client.delete_object(Bucket=BUCKET, Key=KEY)
    with pytest.raises(CheckpointNotFoundError):
        source.read_into(FILE, 0, memoryview(bytearray(10)), version)


# -- breaking off


@pytest.mark.parametrize("after_bytes", [None, 0, 100_000])
def test_a_stalled_read_can_be_cancelled(s3: S3Server, after_bytes: int | None) -> None:
    source = RemoteSource(URL, stall_s=60)
    version, stalled, cancel, errors = source.stat(FILE), threading.Event(), Cancel(), []

    def fault(request: S3Request) -> Fault | None:
        stalled.set()
        return Stall(after_bytes, 60)

    def run() -> None:
        try:
            source.read_into(FILE, 0, memoryview(bytearray(len(CONTENT))), version, cancel)
        except LoadCancelledError as error:
            errors.append(error)

    s3.fault = fault
    thread = threading.Thread(target=run)
    thread.start()
    assert stalled.wait(10)
    time.sleep(0.05)
    cancel.set()
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    source.close()


def test_the_wait_between_attempts_can_be_cancelled(s3: S3Server) -> None:
    source, cancel = RemoteSource(URL), Cancel()
    s3.fault = always(Status(503))
    timer = threading.Timer(0.1, cancel.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(LoadCancelledError):
        read(source, cancel=cancel)
    assert time.monotonic() - started < 5
    timer.join()
    source.close()


# -- secrets


def test_no_credential_is_logged_or_shown(s3: S3Server, source: RemoteSource, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert read(source) == CONTENT
    assert SECRET not in caplog.text + repr(source) + source.link


# ---- a whole checkpoint ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_and_loaded_as_from_a_folder(s3: S3Server, tmp_path: Path) -> None:
    from shardlift.worker.anatomy import Cut
    from shardlift.worker.loader import LoadProgress, load_stage
    from shardlift.worker.spec import StageSpec
    from tests.support.checkpoints import tiny

    folder = tiny("llama", tmp_path / "tiny", layers=3)
    s3.put_folder("org/tiny", folder)
    states = {}
    for path in (str(folder), f"s3://{BUCKET}/org/tiny/"):
        checkpoint = read_checkpoint(CheckpointRequest(path=path), None)
        assert set(checkpoint.versions) == {file.name for file in folder.glob("*.safetensors")}
        spec = StageSpec(
            model="m",
            load_id="l",
            index=0,
            num_stages=1,
            device="cpu",
            cut=Cut(first=0, end=3, num_layers=3),
            source=checkpoint.source,
            records=tuple(checkpoint.records.values()),
            versions=checkpoint.versions,
            config=checkpoint.config,
            generation_config=checkpoint.generation_config,
            quantization=None,
            dtype="float32",
            attn_implementation=None,
            secret="secret",
        )
        loaded = load_stage(spec, None, LoadProgress())
        states[checkpoint.source.kind] = loaded.stage.model.state_dict()
    assert set(states) == {"folder", "url"}
    assert list(states["folder"]) == list(states["url"])
    assert all(torch.equal(tensor, states["url"][key]) for key, tensor in states["folder"].items())


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class _Ranges(BaseHTTPRequestHandler):
    """Serves CONTENT as FILE, by ranges, with a tag."""

    protocol_version = "HTTP/1.1"
    etag = '"one"'
    status = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.status or self.path != f"/a%20folder/{FILE}":
            self.send_response(self.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        span = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        start, end = (int(span[0]), int(span[1]) + 1) if len(span) == 2 else (0, len(CONTENT))
        self.send_response(206 if len(span) == 2 else 200)
        self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(end - start))
        if len(span) == 2:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(CONTENT)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(CONTENT[start:end])

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    servers = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


Serve = Callable[[type[BaseHTTPRequestHandler]], str]


def test_http(serve: Serve, sleeps: Sleeps) -> None:
    class Handler(_Ranges):
        pass

    source = RemoteSource(f"{serve(Handler)}/a folder", sleep=sleeps, piece_bytes=100_000)
    version = source.stat(FILE)
    assert version == FileVersion(size_bytes=len(CONTENT), etag="one")
    assert read(source, 3) == CONTENT[3:]
    kind, text = refusal(lambda: source.stat("none"))
    assert kind is CheckpointNotFoundError
    Handler.etag = '"two"'
    with pytest.raises(CorruptCheckpointError, match=r"version one then, .* version two now"):
        source.read_into(FILE, 0, memoryview(bytearray(10)), version)
    Handler.status = 503
    kind, text = refusal(lambda: source.stat(FILE))
    assert kind is SourceError
    assert "HTTP 503" in text
    assert len(sleeps) == 5
    Handler.status = 401
    kind, text = refusal(lambda: source.stat(FILE))
    assert kind is GatedCheckpointError
    source.close()


def test_a_server_that_ignores_ranges_is_refused(serve: Serve, tmp_path: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / FILE).write_bytes(CONTENT)
    source = RemoteSource(serve(Handler))
    assert read(source) == CONTENT  # whole, as it came
    kind, text = refusal(lambda: read(source, 10, 20))
    assert kind is SourceError
    assert "ignores ranges" in text
    source.close()


# ---- other stores ----------------------------------------------------------------------------------------------------


def test_a_store_that_blocks(sleeps: Sleeps) -> None:
    """fsspec's memory: no ETag, no event loop."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/box/inner/" + FILE, CONTENT)
    source = RemoteSource("memory://box", subfolder="inner", piece_bytes=100_000, sleep=sleeps)
    version = source.stat(FILE)
    assert version.etag
    assert read(source, 3) == CONTENT[3:]
    cancel = Cancel()
    cancel.set()
    with pytest.raises(LoadCancelledError):
        source.read_into(FILE, 0, memoryview(bytearray(9)), version, cancel)
    memory.pipe_file("/box/inner/" + FILE, CONTENT[::-1])
    with pytest.raises(CorruptCheckpointError):
        source.verify(FILE, version)
    with pytest.raises(CheckpointNotFoundError):
        source.stat("none")
    source.close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gcsfs", "s3fs", "adlfs"):
        monkeypatch.setitem(sys.modules, module, None)
    kind, text = refusal(lambda: RemoteSource("gs://bucket/x"))
    assert kind is InvalidRequestError
    assert "pip install 'shardlift[gcs]', on every node" in text
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    kind, text = refusal(lambda: RemoteSource("s3://bucket/x"))
    assert kind is InvalidRequestError
    assert "pip install 'shardlift[s3]', on every node" in text
    kind, text = refusal(lambda: RemoteSource("abfs://box@account.dfs.core.windows.net/x"))
    assert kind is InvalidRequestError
    assert "abfs:// needs a package" in text


@pytest.mark.parametrize("url", ["nostore://bucket/x", "zip://x/y", "simplecache://x/y"])
def test_an_unknown_kind_of_store_is_refused(url: str) -> None:
    kind, text = refusal(lambda: RemoteSource(url))
    assert kind is InvalidRequestError
    assert "is no store that can be read" in text


# ---- what errors mean ------------------------------------------------------------------------------------------------


class _BotoError(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class _StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("with https://host/x?Signature=hunter2")
        self.status = status


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (_BotoError(400, "ExpiredToken"), Meaning.DENIED),
        (_BotoError(400, "RequestTimeout"), Meaning.TRANSIENT),
        (_BotoError(400, "AuthorizationHeaderMalformed"), Meaning.LASTING),
        (_BotoError(404, "NoSuchBucket"), Meaning.MISSING),
        (_BotoError(416, "InvalidRange"), Meaning.CHANGED),
        (_BotoError(503, "503"), Meaning.TRANSIENT),
        (_StatusError(429), Meaning.TRANSIENT),
        (_StatusError(403), Meaning.DENIED),
        (_StatusError(400), Meaning.LASTING),
        (NoCredentialsError("AKIA hunter2"), Meaning.DENIED),
        (TimeoutError(), Meaning.TRANSIENT),
        (ConnectionResetError(104, "reset"), Meaning.TRANSIENT),
        (OSError(5, "Input/output error"), Meaning.TRANSIENT),
        (OSError(22, "Invalid argument"), Meaning.LASTING),
        (FileNotFoundError("x"), Meaning.MISSING),
        (PermissionError("x"), Meaning.DENIED),
        (OSError("Forbidden: bucket/x\nhunter2 may not"), Meaning.DENIED),
        (ValueError("https://name:hunter2@host/x is odd"), Meaning.LASTING),
    ],
    ids=repr,
)
def test_errors_are_judged(error: Exception, meaning: Meaning) -> None:
    for wrapped in (error, _raised_from(error)):
        verdict = judge(wrapped)
        assert verdict.meaning is meaning
        assert "hunter2" not in verdict.cause
        assert "\n" not in verdict.cause


def _raised_from(error: Exception) -> Exception:
    try:
        raise OSError("translated") from error
    except OSError as translated:
        return translated


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole", "root"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b", "s3://bucket"),
        (" S3://bucket/a/b// ", "s3://bucket/a/b", "s3://bucket"),
        ("s3://bucket", "s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket", "s3://bucket"),
        ("s3://bucket/a//b@c:1", "s3://bucket/a//b@c:1", "s3://bucket"),
        ("https://host:8443/a b/c", "https://host:8443/a b/c", "https://host:8443"),
        ("http://[::1]:80/x", "http://[::1]:80/x", "http://[::1]:80"),
        ("abfs://box@account.dfs.core.windows.net/x", "abfs://box@account.dfs.core.windows.net/x", None),
        ("memory:///a/b", "memory:///a/b", "memory://"),
        ("memory://a/b", "memory://a/b", "memory://a"),
    ],
)
def test_urls(text: str, whole: str, root: str | None) -> None:
    url = parse_url(text)
    assert url.text == whole
    assert root in (None, url.root)
    assert parse_url(url.text) == url


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIATESTKEY:hunter2@bucket/x",
        "s3://AKIATESTKEY:hunter2/with+slash@bucket/x",
        "s3://hunter2@bucket/x",
        "https://me:hunter2@host/x",
        "https://host/x?X-Amz-Signature=hunter2",
        "https://host/x#hunter2",
        "sftp://me:hunter2@host/x",
        "s3://",
        "s3:///x",
        "://x",
        "simplecache::s3://bucket/x",
        "s3://bucket/a/../b",
        "file://elsewhere/x",
        "hf://org/name",
        "https://huggingface.co/org/name",
        "https://bad host/x",
        "s3://bucket/a\nb",
        "memory://",
    ],
)
def test_urls_that_are_refused(text: str) -> None:
    for act in (
        lambda: parse_url(text),
        lambda: resolve_source(CheckpointRequest(path=text), None),
        lambda: requests.model_name("", text),
        lambda: requests.model_name("given", text),
    ):
        kind, message = refusal(act)
        assert kind is InvalidRequestError
        assert "hunter2" not in message


@given(st.text(max_size=40))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        url = parse_url(text)
    except InvalidRequestError:
        return
    assert "@" not in url.host or url.scheme not in ("s3", "https")


def test_the_name_of_a_model_from_its_url() -> None:
    assert requests.model_name("", "s3://bucket/org/My-Model_1.5/") == "My-Model_1.5"
    assert requests.model_name("", "s3://bucket") == "bucket"
    assert requests.model_name("given", "s3://bucket/x") == "given"


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    quoted = str(folder).replace(" ", "%20")
    for text in (f"file://{quoted}", f"file://localhost{quoted}/", f"file://{folder}"):
        assert resolve_source(CheckpointRequest(path=text), None) == SourceSpec(kind="folder", location=str(folder))
    with pytest.raises(CheckpointNotFoundError, match="folder /no/such does not exist"):
        resolve_source(CheckpointRequest(path="file:///no/such"), None)


@pytest.mark.parametrize("subfolder", ["..", "a/../b", "a//b", "a\nb", "."])
def test_a_subfolder_stays_below(subfolder: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no path below"):
        resolve_source(CheckpointRequest(path="s3://bucket/x", subfolder=subfolder), None)


def test_urls_resolve_to_sources() -> None:
    assert resolve_source(CheckpointRequest(path="s3://bucket/x/", subfolder="/a/b/"), None) == SourceSpec(
        kind="url", location="s3://bucket/x", subfolder="a/b"
    )
