"""Sources against real files and a real HTTP server, whole and failing."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


class FailingDisk:
    """Takes the place of `os.preadv`: fails as scripted, one errno a call (0: a short read), and then goes well."""

    def __init__(self, *script: int) -> None:
        self.script, self.starts, self.descriptors = list(script), [], []
        self._preadv = os.preadv

    def __call__(self, descriptor: int, views: list[memoryview], at: int) -> int:
        self.starts.append(at)
        self.descriptors.append(os.fstat(descriptor).st_ino)
        number = self.script.pop(0) if self.script else None
        if number:
            raise OSError(number, os.strerror(number))
        return self._preadv(descriptor, [views[0][:100_000]] if number == 0 else views, at)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET])
def test_a_disk_that_falters_is_read_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps, number: int
) -> None:
    """From the byte reached; and a progress renews the attempts."""
    disk = FailingDisk(*[number] * 5, 0, *[number] * 5, 0, number)
    monkeypatch.setattr(os, "preadv", disk)
    assert read(FolderSource(folder, sleep=sleeps)) == CONTENT
    assert disk.starts == [*[0] * 6, *[100_000] * 6, 200_000, 200_000]
    assert len(sleeps) == 11
    assert sleeps[:5] == sorted(sleeps[:5])


def test_a_failing_disk_is_a_source_error(folder: Path, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps) -> None:
    source = FolderSource(folder, sleep=sleeps)
    monkeypatch.setattr(os, "preadv", FailingDisk(0, *[errno.EIO] * 99))
    with pytest.raises(
        SourceError,
        match=rf"reading bytes 0 to 300000 of {folder}/model\.safetensors failed 6 times in a row, last: "
        r"Input/output error \(EIO\); check the disk or the mount",
    ):
        read(source)
    assert len(sleeps) == 5


@pytest.mark.parametrize("name", ["stat", "open", "fstat"])
def test_a_disk_may_falter_before_it_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps, name: str
) -> None:
    source, right = FolderSource(folder, sleep=sleeps), getattr(os, name)
    pending = [errno.ESTALE, errno.EHOSTDOWN]

    def falter(*arguments: Any, **more: Any) -> Any:
        if pending:
            raise OSError(pending[0], os.strerror(pending.pop(0)))
        return right(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, falter)
        assert read(source) == CONTENT
    assert len(sleeps) == 2


def test_no_permission_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps) -> None:
    source = FolderSource(folder, sleep=sleeps)
    monkeypatch.setattr(os, "preadv", FailingDisk(*[errno.EACCES] * 9))  # root would be let in by a file's mode
    with pytest.raises(SourceError, match=rf"Permission denied \(EACCES\); .* user {os.geteuid()}, .* no permission"):
        read(source)
    assert sleeps == []


def test_a_file_that_is_replaced_between_attempts_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps
) -> None:
    def replace(seconds: float) -> None:
        (folder / "new").write_bytes(CONTENT[::-1])
        os.utime(folder / "new", ns=(1, 1))
        (folder / "new").replace(folder / FILE)

    monkeypatch.setattr(os, "preadv", FailingDisk(0, errno.ESTALE))
    with pytest.raises(CorruptCheckpointError, match="changed since the load began"):
        read(FolderSource(folder, sleep=replace))


def test_the_wait_for_a_disk_can_be_cancelled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Cancel()
    monkeypatch.setattr(os, "preadv", FailingDisk(*[errno.EIO] * 99))
    timer = threading.Timer(0.1, cancel.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(LoadCancelledError):
        read(FolderSource(folder, attempts=99), cancel=cancel)
    assert time.monotonic() - started < 5
    timer.join()


_READ_WITH_A_FAILING_DISK = """
import sys, hashlib, json
from pathlib import Path
from shardlift.worker.sources import FolderSource
sleeps = []
source = FolderSource(Path(sys.argv[1]), sleep=sleeps.append)
version = source.stat(sys.argv[2])
buffer = bytearray(version.size_bytes)
try:
    source.read_into(sys.argv[2], 0, memoryview(buffer), version)
    print(json.dumps([hashlib.sha256(buffer).hexdigest(), len(sleeps)]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="needs gcc, and Linux")
def test_below_python_the_disk_fails_just_so(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same by the system's calls themselves, so that what Python makes of them is tested too."""
    library = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    code = Path(__file__).parent / "support" / "failing_disk.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, code, "-ldl"], check=True, timeout=60)

    def run(*script: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", _READ_WITH_A_FAILING_DISK, folder, FILE],
            env=os.environ
            | {"LD_PRELOAD": str(library), "FAILING_DISK_NAME": FILE, "FAILING_DISK_SCRIPT": ",".join(script)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)

    whole = hashlib.sha256(CONTENT).hexdigest()
    assert run() == [whole, 0]
    # EIO, then 70,000 bytes and a stale handle, an open that times out, a reset.
    assert run("5", "0", "116", "o110", "104") == [whole, 4]
    kind, text = run("0", *["5"] * 6)
    assert kind == "SourceError"
    assert "failed 6 times in a row, last: Input/output error (EIO)" in text
    kind, text = run("o13")
    assert kind == "SourceError"
    assert "no permission" in text
    assert run("o2")[0] == "CheckpointNotFoundError"


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
    version = source.stat(FILE)
    hub.clear()
    hub.clock = lambda: time.time() + 4 * 7200
    buffer = bytearray(10)
    source.read_into(FILE, 20, memoryview(buffer), version)
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


def test_a_name_that_nobody_knows_is_said(sleeps: Sleeps) -> None:
    source = HubSource(REPO, "0" * 40, endpoint="http://no-such-host.invalid", sleep=sleeps)
    with pytest.raises(
        SourceError, match=r"failed 6 times in a row, last: the name no-such-host\.invalid can't be resolved \("
    ):
        source.stat(FILE)
    assert len(sleeps) == 5


# -- the cache


@pytest.fixture
def cached(hub: HubServer, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache that huggingface_hub itself has filled, and the commit in it."""
    header = b'{"t":{"dtype":"U8","shape":[300000],"data_offsets":[0,300000]}}'
    (folder / "sound.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + CONTENT)
    commit, cache = hub.add_repo(REPO, folder), tmp_path_factory.mktemp("cache")
    huggingface_hub.snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=cache, token=False, max_workers=1)
    hub.clear()
    return cache, commit


def cached_path(cache: Path, commit: str, file: str) -> Path:
    return cache / "models--org--name" / "snapshots" / commit / file


def test_what_is_cached_is_not_asked_for(hub: HubServer, folder: Path, cached: tuple[Path, str]) -> None:
    cache, commit = cached
    uncached = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache / "none"))
    versions = {file: uncached.stat(file) for file in ("sound.safetensors", SMALL)}
    hub.clear()
    spec = SourceSpec(kind="hub", location=REPO, commit=commit, endpoint=hub.endpoint, cache_dir=str(cache))
    source = open_source(spec, None)
    assert source.link == "the Hub (127.0.0.1)"
    for file, version in versions.items():
        assert source.stat(file) == version
        buffer = bytearray(version.size_bytes)
        source.read_into(file, 0, memoryview(buffer), version)
        assert buffer == (folder / file).read_bytes()
    assert hub.requests == []
    assert source.link == "the Hub's cache on this machine"


def test_a_subfolder_is_cached_too(hub: HubServer, cached: tuple[Path, str]) -> None:
    cache, commit = cached
    version = HubSource(REPO, commit, endpoint=hub.endpoint, subfolder="sub").stat(FILE)
    hub.clear()
    source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache), subfolder="sub")
    source.read_into(FILE, 0, memoryview(buffer := bytearray(9)), version)
    assert buffer == CONTENT[::-1][:9]
    assert hub.requests == []


def test_the_default_cache_is_huggingface_hubs(
    hub: HubServer, cached: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = cached
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert HubSource(REPO, commit, endpoint=hub.endpoint).stat(SMALL).size_bytes == 23
    assert hub.requests == []


@pytest.mark.parametrize("damage", [b"", CONTENT[:1000]], ids=["empty", "cut short"])
def test_a_damaged_cache_is_left_alone(hub: HubServer, folder: Path, cached: tuple[Path, str], damage: bytes) -> None:
    cache, commit = cached
    for file in ("sound.safetensors", SMALL):
        whole = (folder / file).read_bytes()
        cached_path(cache, commit, file).resolve().write_bytes(damage)
        source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache))
        version = source.stat(file)  # as the driver does
        assert version.size_bytes == len(whole)
        assert read(source, 3, 20, file) == whole[3:20]
        worker = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache))
        worker.read_into(file, 3, memoryview(buffer := bytearray(17)), version)
        assert buffer == whole[3:20]
        assert worker.link == "the Hub (127.0.0.1)"
    assert {request.file for request in hub.requests if request.method == "GET"} == {"sound.safetensors", SMALL}


def test_a_small_file_of_other_content_is_left_alone(hub: HubServer, cached: tuple[Path, str]) -> None:
    """Of the right size: its hash is its name."""
    cache, commit = cached
    blob = cached_path(cache, commit, SMALL).resolve()
    blob.write_bytes(blob.read_bytes().replace(b"llama", b"LLAMA"))
    source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache))
    source.stat(SMALL)
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_another_version_in_the_cache_is_left_alone(hub: HubServer, cached: tuple[Path, str]) -> None:
    cache, commit = cached
    link = cached_path(cache, commit, FILE)
    blob = link.resolve()
    blob.rename(blob.with_name("0" * 64))
    link.unlink()
    link.symlink_to(Path("..") / ".." / "blobs" / ("0" * 64))
    source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache))
    source.read_into(FILE, 0, memoryview(bytearray(9)), HubSource(REPO, commit, endpoint=hub.endpoint).stat(FILE))
    assert [request.origin for request in hub.requests] == ["hub", "hub", "cdn"]


def test_a_cache_without_links_counts_by_size(hub: HubServer, cached: tuple[Path, str]) -> None:
    cache, commit = cached
    link = cached_path(cache, commit, FILE)
    blob = link.resolve()
    link.unlink()
    blob.rename(link)
    source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache))
    assert read(source) == CONTENT
    assert [request.method for request in hub.requests] == ["HEAD"]  # for the version, which such a cache doesn't tell


def test_a_cache_that_fails_is_replaced_by_the_hub(
    hub: HubServer, cached: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps
) -> None:
    cache, commit = cached
    source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache), sleep=sleeps)
    version = HubSource(REPO, commit, endpoint=hub.endpoint).stat(FILE)
    buffer = bytearray(len(CONTENT))
    source.read_into(FILE, 0, memoryview(buffer)[:1000], version)
    monkeypatch.setattr(os, "preadv", FailingDisk(*[errno.EIO] * 99))
    source.read_into(FILE, 1000, memoryview(buffer)[1000:2000], version)
    cached_path(cache, commit, FILE).resolve().unlink()
    source.read_into(FILE, 2000, memoryview(buffer)[2000:], version)
    assert buffer == CONTENT
    assert hub.ranges(FILE) == [(1000, 2000), (2000, len(CONTENT))]
    assert source.link == "the Hub (127.0.0.1) and its cache on this machine"


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "out of reach"])
def test_offline_the_cache_is_all_there_is(
    hub: HubServer, cached: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps, how: str
) -> None:
    cache, commit = cached
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    source = HubSource(
        REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache), is_cached_only=how == "out of reach", sleep=sleeps
    )
    assert read(source, 0, 5, SMALL) == b'{"mod'
    with pytest.raises(CheckpointNotFoundError, match=f"none is not in the Hub's cache .* {how}"):
        source.stat("none")
    assert hub.requests == []
    assert sleeps == []


def test_what_the_cache_knows_to_be_missing_is_not_asked_for(hub: HubServer, cached: tuple[Path, str]) -> None:
    cache, commit = cached
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        huggingface_hub.hf_hub_download(REPO, "none.json", endpoint=hub.endpoint, cache_dir=cache, token=False)
    hub.clear()
    source = HubSource(REPO, commit, endpoint=hub.endpoint, cache_dir=str(cache))
    with pytest.raises(CheckpointNotFoundError, match=r"none\.json does not exist, by the Hub's cache"):
        source.stat("none.json")
    assert hub.requests == []


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
    ("text", "redacted"),
    [
        ("at https://cdn/x?Signature=s&b=c twice", "at https://cdn/x?… twice"),
        ("http://me:hunter2@host/x", "http://…@host/x"),
        ("s3://AKIA:ab/c+d@bucket/x", "s3://…@bucket/x"),
        ("sftp://me@host/x", "sftp://…@host/x"),
        ("https://host/x and me@host", "https://host/x and me@host"),
        ('"http://127.0.0.1:9/a/b"', '"http://127.0.0.1:9/a/b"'),
    ],
)
def test_secrets_are_taken_out_of_urls(text: str, redacted: str) -> None:
    assert answers.redact(text) == redacted


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
