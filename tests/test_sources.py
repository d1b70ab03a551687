"""Sources against real files and a real HTTP server, whole and failing."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlift.proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GatedCheckpointError,
    InvalidRequestError,
    LoadCancelledError,
    SourceError,
)
from shardlift.worker.records import FileVersion, SourceSpec
from shardlift.worker.sources import Cancel, FolderSource, HubSource, Source, answers, open_source
from tests.support.hub import Etag, Fault, HubServer, IgnoreRange, RequestInfo, Reset, Stall, Status, Truncate

FILE = "model.safetensors"
SMALL = "config.json"  # answered by the Hub itself, without a CDN
REPO = "org/name"
TOKEN = "hf_secret"
CONTENT = bytes(index * index % 251 for index in range(300_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(CONTENT)
    (tmp_path / SMALL).write_bytes(b'{"model_type": "llama"}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / FILE).write_bytes(CONTENT[::-1])
    return tmp_path


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    huggingface_hub.close_session()  # its pool would keep connections to a server that is gone


class Sleeps(list[float]):
    """Takes the place of sleep: notes how long, and returns at once."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
def source(hub: HubServer, folder: Path, sleeps: Sleeps) -> HubSource:
    commit = hub.add_repo(REPO, folder)
    return HubSource(REPO, commit, endpoint=hub.endpoint, token=TOKEN, sleep=sleeps, connect_s=2, stall_s=2)


def read(source: Source, start: int = 0, end: int = len(CONTENT), file: str = FILE, **more: Cancel) -> bytes:
    buffer = bytearray(end - start)
    source.read_into(file, start, memoryview(buffer), source.stat(file), **more)
    return bytes(buffer)


def faults(*sequence: Fault | None, origin: str = "cdn", method: str = "GET") -> Callable[[RequestInfo], Fault | None]:
    """The next fault for each request to `origin`, and none when they are used up."""
    pending = iter(sequence)

    def fault(request: RequestInfo) -> Fault | None:
        return next(pending, None) if (request.origin, request.method) == (origin, method) else None

    return fault


def always(fault: Fault, origin: str = "cdn", method: str = "GET") -> Callable[[RequestInfo], Fault | None]:
    return lambda request: fault if (request.origin, request.method) == (origin, method) else None


# ---- a folder --------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_ranges(folder: Path) -> None:
    source = FolderSource(folder)
    assert source.stat(FILE).size_bytes == len(CONTENT)
    assert source.stat(FILE) == source.stat(FILE)
    assert read(source) == CONTENT
    assert read(source, 1000, 1001) == CONTENT[1000:1001]
    assert read(source, 5, 5) == b""


def test_a_folder_fills_the_buffer_that_it_is_given(folder: Path) -> None:
    buffer = bytearray(b"-" * 30)
    source = FolderSource(folder)
    source.read_into(FILE, 7, memoryview(buffer)[10:20], source.stat(FILE))
    assert buffer == b"-" * 10 + CONTENT[7:17] + b"-" * 10


def test_a_missing_file_or_folder_is_not_found(folder: Path) -> None:
    for source, file in (
        (FolderSource(folder), "none"),
        (FolderSource(folder / "none"), FILE),
        (FolderSource(folder), "sub"),
    ):
        with pytest.raises(CheckpointNotFoundError, match=str(folder)):
            source.stat(file)
    with pytest.raises(CheckpointNotFoundError, match=f"no file {folder}/none"):
        FolderSource(folder).read_into("none", 0, memoryview(bytearray(1)), FileVersion(size_bytes=1, etag=""))


def test_a_changed_file_is_refused(folder: Path) -> None:
    source = FolderSource(folder)
    version = source.stat(FILE)
    (folder / FILE).write_bytes(CONTENT[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"changed since the load began: 300000 bytes .* 299999 bytes"):
        source.read_into(FILE, 0, memoryview(bytearray(10)), version)


def test_a_file_that_shrinks_meanwhile_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(folder)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CorruptCheckpointError, match="ends at byte 0, before byte 300000"):
        read(source)


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:70_001]], at))
    assert read(FolderSource(folder), 3) == CONTENT[3:]


def test_a_failing_disk_is_a_source_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(5, "Input/output error")

    source = FolderSource(folder)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(SourceError, match=r"model\.safetensors failed: Input/output error"):
        read(source)


def test_a_cancelled_read_of_a_folder_ends(folder: Path) -> None:
    cancel = Cancel()
    cancel.set()
    with pytest.raises(LoadCancelledError):
        read(FolderSource(folder), cancel=cancel)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../b", "", "a\\..\\b", "a\nb"])
def test_names_that_lead_out_are_refused(folder: Path, file: str) -> None:
    for source in (FolderSource(folder), HubSource(REPO, "main", endpoint="http://127.0.0.1:1")):
        with pytest.raises(CorruptCheckpointError, match="leads out of the checkpoint"):
            source.stat(file)


def test_a_range_beyond_the_file_is_refused(folder: Path, source: HubSource) -> None:
    for each in (source, FolderSource(folder)):
        with pytest.raises(CorruptCheckpointError, match="bytes 299999 to 300001 are wanted of a file of 300000"):
            read(each, len(CONTENT) - 1, len(CONTENT) + 1)


def test_a_spec_opens_its_source(folder: Path, hub: HubServer) -> None:
    commit = hub.add_repo(REPO, folder)
    hub_spec = SourceSpec(kind="hub", location=REPO, commit=commit, endpoint=hub.endpoint, subfolder="sub")
    folder_spec = SourceSpec(kind="folder", location=str(folder), subfolder="sub")
    for spec in (hub_spec, folder_spec):
        source = open_source(spec, None)
        assert read(source) == CONTENT[::-1]
        source.close()
    with pytest.raises(InvalidRequestError, match="no source of kind 'tape'"):
        open_source(SourceSpec(kind="tape", location="x"), None)


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_is_read_by_ranges(hub: HubServer, source: HubSource) -> None:
    version = source.stat(FILE)
    assert version.size_bytes == len(CONTENT)
    assert len(version.etag) == 64
    assert read(source) == CONTENT
    assert read(source, 1000, 1001) == CONTENT[1000:1001]
    assert hub.ranges(FILE) == [(0, len(CONTENT)), (1000, 1001)]
    assert hub.bytes_sent() == len(CONTENT) + 1


def test_the_location_is_asked_for_once(hub: HubServer, source: HubSource) -> None:
    version = source.stat(FILE)
    threads = [
        threading.Thread(target=source.read_into, args=(FILE, start, memoryview(bytearray(1000)), version))
        for start in range(0, 10_000, 1000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [request.origin for request in hub.requests].count("hub") == 1
    assert sorted(hub.ranges(FILE)) == [(start, start + 1000) for start in range(0, 10_000, 1000)]


def test_the_token_goes_to_the_hub_alone(hub: HubServer, folder: Path) -> None:
    commit = hub.add_repo("org/gated", folder, gated_token=TOKEN)
    source = HubSource("org/gated", commit, endpoint=hub.endpoint, token=TOKEN)
    assert read(source) == CONTENT
    assert read(source, 0, 5, SMALL) == b'{"mod'
    seen = {(request.origin, request.file, request.had_authorization) for request in hub.requests}
    assert seen == {("hub", FILE, True), ("cdn", FILE, False), ("hub", SMALL, True)}
    assert all(request.user_agent.startswith("shardlift/") for request in hub.requests)


def test_a_redirect_off_the_hub_leaves_the_token_behind(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    """A HEAD that shows no location, then a GET that redirects to one: here, to one that isn't there."""
    version = source.stat(SMALL)
    elsewhere = Status(302, {"Location": f"{hub.cdn_endpoint}/elsewhere?Signature=secret"})
    hub.clear()
    hub.fault = faults(elsewhere, origin="hub")
    buffer = bytearray(5)
    source.read_into(SMALL, 0, memoryview(buffer), version)
    assert buffer == b'{"mod'
    assert [(request.origin, request.method, request.had_authorization) for request in hub.requests] == [
        ("hub", "GET", True),
        ("cdn", "GET", False),
        ("hub", "HEAD", True),
        ("hub", "GET", True),
    ]


def test_without_its_token_a_gated_checkpoint_says_what_to_do(hub: HubServer, folder: Path) -> None:
    commit = hub.add_repo("org/gated", folder, gated_token=TOKEN)
    for token, status in ((None, 401), ("hf_wrong", 403)):
        with pytest.raises(GatedCheckpointError, match=rf"answered {status} for org/gated@.*pass token=") as caught:
            HubSource("org/gated", commit, endpoint=hub.endpoint, token=token or False).stat(FILE)  # type: ignore[arg-type]
        assert "hf_wrong" not in str(caught.value)


def test_what_the_hub_lacks_is_not_found(hub: HubServer, source: HubSource) -> None:
    for repo_id, commit, file in ((REPO, "0" * 40, FILE), ("org/none", "0" * 40, FILE), (REPO, "main", "none")):
        with pytest.raises(CheckpointNotFoundError, match=f"answered 404 for {repo_id}@.*/{file}: "):
            HubSource(repo_id, commit, endpoint=hub.endpoint).stat(file)


# -- faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        Status(500),
        Status(429),
        Status(408),
        Reset(None),
        Reset(0),
        Reset(100_000),
        Truncate(None),
        Truncate(100_000),
        IgnoreRange(),
        Status(206, {"Content-Range": "bytes 0-9/300000"}),
        Status(206, {"Content-Range": "bytes 7-9"}),
        Status(206),
        Status(204),
    ],
    ids=repr,
)
def test_a_passing_fault_goes_unnoticed(hub: HubServer, source: HubSource, sleeps: Sleeps, fault: Fault) -> None:
    hub.fault = faults(fault)
    assert read(source, 7, 250_000) == CONTENT[7:250_000]
    assert len(sleeps) <= 1


def test_a_read_goes_on_where_it_broke_off(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    hub.fault = faults(Truncate(100_000), Truncate(100_000))
    assert read(source) == CONTENT
    assert hub.ranges(FILE) == [(0, 300_000), (100_000, 300_000), (200_000, 300_000)]
    assert hub.bytes_sent() == len(CONTENT)


def test_progress_renews_the_attempts(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    """30,000 bytes a connection: more than six connections, never six without progress."""
    hub.fault = always(Truncate(30_000))
    assert read(source) == CONTENT
    assert len(hub.ranges(FILE)) == 10
    assert max(sleeps) < 4.0


def test_a_trickle_is_no_progress(hub: HubServer, source: HubSource) -> None:
    hub.fault = always(Truncate(10))
    with pytest.raises(SourceError, match="failed 6 times in a row"):
        read(source)


def test_a_stalled_read_is_asked_for_again(hub: HubServer, folder: Path, sleeps: Sleeps) -> None:
    source = HubSource(REPO, hub.add_repo(REPO, folder), endpoint=hub.endpoint, sleep=sleeps, stall_s=0.1)
    hub.fault = faults(Stall(100_000, 30), Stall(None, 30))
    assert read(source) == CONTENT
    assert hub.ranges(FILE)[-1][0] > 0


def test_an_expired_location_is_asked_for_again_at_once(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    assert read(source, 0, 10) == CONTENT[:10]
    hub.clock = lambda: time.time() + 7200
    assert read(source, 10, 20) == CONTENT[10:20]  # stat asks anew
    hub.clear()
    hub.clock = lambda: time.time() + 4 * 7200
    buffer = bytearray(10)
    source.read_into(
        FILE, 20, memoryview(buffer), FileVersion(size_bytes=len(CONTENT), etag=source._located[FILE].version.etag)
    )
    assert buffer == CONTENT[20:30]
    assert [(request.origin, request.status) for request in hub.requests] == [("cdn", 403), ("hub", 302), ("cdn", 206)]
    assert sleeps == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_cdn_that_refuses_is_asked_through_the_hub(hub: HubServer, source: HubSource, status: int) -> None:
    hub.fault = faults(Status(status), Status(status))
    assert read(source) == CONTENT
    assert [request.method for request in hub.requests] == ["HEAD", "GET"] * 3


def test_retry_after_is_honoured(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    hub.fault = faults(Status(429, {"Retry-After": "17"}), Status(503, {"ratelimit": '"api";r=0;t=5'}))
    assert read(source) == CONTENT
    assert sleeps == [17.0, 5.0]


def test_the_hub_itself_may_falter(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    hub.fault = faults(Status(502), Reset(None), Status(429, {"Retry-After": "3"}), origin="hub", method="HEAD")
    assert read(source, 0, 9) == CONTENT[:9]
    assert sleeps[-1] == 3.0
    assert len(sleeps) == 3


def test_a_whole_small_file_may_come_as_200(hub: HubServer, source: HubSource) -> None:
    hub.fault = always(IgnoreRange())
    assert read(source) == CONTENT


# -- faults that stay


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Status(503), "HTTP 503"),
        (Status(403), "HTTP 403 from the CDN"),
        (IgnoreRange(), "HTTP 200 in place of 206: the server ignores ranges"),
        (Truncate(0), "RemoteProtocolError|ended early"),
        (Reset(0), "ReadError"),
        (Status(302, {"Location": "/there?Signature=secret"}), "HTTP 302"),
        (Status(302, {"Location": "ftp://there"}), "the Hub gave a location that is no http URL"),
    ],
    ids=repr,
)
def test_a_lasting_fault_ends_with_its_cause(
    hub: HubServer, source: HubSource, sleeps: Sleeps, fault: Fault, cause: str
) -> None:
    hub.fault = always(fault)
    with pytest.raises(
        SourceError, match=rf"bytes 10 to 20 of {REPO}@\w+/{FILE} failed 6 times in a row, last: ({cause})"
    ) as caught:
        read(source, 10, 20)
    assert len([request for request in hub.requests if request.origin == "cdn"]) <= 6
    assert len(sleeps) <= 5
    assert_no_secrets("".join(traceback.format_exception(caught.value)))


def test_a_hub_that_is_gone_is_a_source_error(folder: Path, sleeps: Sleeps) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(SourceError, match=r"failed 6 times in a row, last: ConnectError: .*refused"):
            HubSource(REPO, "main", endpoint=endpoint, sleep=sleeps).stat(FILE)
    assert len(sleeps) == 5
    assert sleeps == sorted(sleeps)


def test_a_hub_that_rejects_the_request_is_not_asked_again(hub: HubServer, source: HubSource, sleeps: Sleeps) -> None:
    hub.fault = always(Status(400), origin="hub", method="HEAD")
    with pytest.raises(SourceError, match="answered 400 for"):
        source.stat(FILE)
    assert sleeps == []


def test_a_server_that_is_no_hub_is_refused(hub: HubServer, source: HubSource) -> None:
    hub.fault = always(Status(200), origin="hub", method="HEAD")
    with pytest.raises(SourceError, match="no size or no ETag"):
        source.stat(FILE)


def test_offline_mode_is_said(source: HubSource, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        source.stat(FILE)
    assert sleeps == []


# -- a file that changes


def test_another_version_than_the_drivers_is_refused(hub: HubServer, source: HubSource) -> None:
    version = source.stat(FILE)
    for other in (
        FileVersion(size_bytes=version.size_bytes, etag="0" * 64),
        FileVersion(size_bytes=299_999, etag=version.etag),
    ):
        with pytest.raises(CorruptCheckpointError, match="changed since the load began"):
            source.read_into(FILE, 0, memoryview(bytearray(10)), other)
    assert hub.bytes_sent() == 0


def test_an_etag_that_changes_on_the_cdn_is_refused(hub: HubServer, source: HubSource) -> None:
    version = source.stat(FILE)
    hub.fault = always(Etag('"another-hash-of-the-same-bytes"'))
    for start in (0, 10):  # the CDN may tag in its own way
        source.read_into(FILE, start, memoryview(bytearray(10)), version)
    hub.fault = always(Etag('W/"changed"'))
    with pytest.raises(CorruptCheckpointError, match="ETag another-hash-of-the-same-bytes then, changed now"):
        source.read_into(FILE, 20, memoryview(bytearray(10)), version)


def test_an_etag_that_changes_on_the_hub_is_refused(hub: HubServer, source: HubSource) -> None:
    version = source.stat(FILE)
    hub.fault = lambda request: Status(403) if request.origin == "cdn" else Etag('"changed"')
    with pytest.raises(CorruptCheckpointError, match="etag='changed'"):
        source.read_into(FILE, 0, memoryview(bytearray(10)), version)


@pytest.mark.parametrize(
    "fault", [Status(206, {"Content-Range": "bytes 0-9/299999"}), Status(416, {"Content-Range": "bytes */5"})], ids=repr
)
def test_a_size_that_changes_on_the_cdn_is_refused(hub: HubServer, source: HubSource, fault: Fault) -> None:
    hub.fault = always(fault)
    with pytest.raises(CorruptCheckpointError, match="changed since the load began"):
        read(source, 0, 10)


# -- breaking off


@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "reused connection"])
@pytest.mark.parametrize("after_bytes", [None, 0, 100_000])
def test_a_stalled_read_can_be_cancelled(hub: HubServer, folder: Path, after_bytes: int | None, warm: bool) -> None:
    source = HubSource(REPO, hub.add_repo(REPO, folder), endpoint=hub.endpoint, stall_s=60)
    version = source.stat(FILE)
    if warm:
        assert read(source, 0, 10) == CONTENT[:10]
    stalled, cancel, errors = threading.Event(), Cancel(), []

    def fault(request: RequestInfo) -> Fault | None:
        stalled.set()
        return Stall(after_bytes, 60)

    def run() -> None:
        try:
            source.read_into(FILE, 0, memoryview(bytearray(len(CONTENT))), version, cancel)
        except LoadCancelledError as error:
            errors.append(error)

    hub.fault = fault
    thread = threading.Thread(target=run)
    thread.start()
    assert stalled.wait(10)
    cancel.set()
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_the_wait_between_attempts_can_be_cancelled(hub: HubServer, folder: Path) -> None:
    source = HubSource(REPO, hub.add_repo(REPO, folder), endpoint=hub.endpoint)
    cancel = Cancel()
    hub.fault = always(Status(503, {"Retry-After": "100"}))
    timer = threading.Timer(0.1, cancel.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(LoadCancelledError):
        read(source, cancel=cancel)
    assert time.monotonic() - started < 5
    timer.join()


# -- secrets


def assert_no_secrets(text: str) -> None:
    for secret in ("Signature=", "Expires=", TOKEN):
        assert secret not in text


def test_neither_token_nor_signed_urls_are_logged_or_shown(
    hub: HubServer, source: HubSource, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert read(source) == CONTENT
    assert "/repos/org/name/" in caplog.text  # the CDN's URL is there, without its query
    assert_no_secrets(caplog.text)
    assert_no_secrets(repr(source) + repr(source._located))


# ---- what answers mean -----------------------------------------------------------------------------------------------


@given(start=st.integers(0, 2**60), size=st.integers(1, 2**40), total=st.none() | st.integers(1, 2**62))
def test_a_content_range_is_understood(start: int, size: int, total: int | None) -> None:
    text = f"bytes {start}-{start + size - 1}/{'*' if total is None else total}"
    assert answers.parse_content_range(text) == answers.Span(start=start, end=start + size, total_bytes=total)


@given(st.text(max_size=30) | st.from_regex(r"bytes [0-9*]*-?[0-9]*/?[0-9*]*", fullmatch=True))
def test_no_content_range_breaks_the_parser(text: str) -> None:
    span = answers.parse_content_range(text)
    assert span is None or text.strip().lower().startswith("bytes")


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 0 "}, 0.0),
        ({"retry-after": "99999"}, answers.RETRY_AFTER_LIMIT_S),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:30 GMT"}, 20.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:05 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
    ],
)
def test_how_long_the_server_asks_to_wait(headers: dict[str, str], wait_s: float | None) -> None:
    assert answers.retry_after_s(headers, now_s=10.0) == wait_s


@given(failures=st.integers(1, 10_000), random=st.floats(0, 1, exclude_max=True))
def test_backoff_grows_and_is_bounded(failures: int, random: float) -> None:
    wait_s = answers.backoff_s(failures, random)
    assert 0.25 <= wait_s <= 30.0
    assert wait_s <= answers.backoff_s(failures + 1, 0.0)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Hub.example/a?b", ("https", "hub.example", 443)),
        ("http://127.0.0.1:8080", ("http", "127.0.0.1", 8080)),
        ("http://[::1]:80/", ("http", "::1", 80)),
        ("http://host:99999/", None),
        ("http://host:x/", None),
        ("file:///etc/passwd", None),
        ("http:///path", None),
        ("http://[::1", None),
    ],
)
def test_origins(url: str, origin: tuple[str, str, int] | None) -> None:
    assert answers.origin(url) == origin
