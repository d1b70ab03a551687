"""The hub that the tests use answers the real client as the real Hub does, and fails in the ways it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save_file

from tests.support.hub import (
    Etag,
    Fault,
    HubServer,
    IgnoreRange,
    RequestInfo,
    Reset,
    Stall,
    Status,
    Truncate,
    parse_range,
)

REPO = "org/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Two shards of about 100 kB, their index, a config and a file in a folder."""
    rng = np.random.default_rng(seed)
    (folder / "extra").mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(SHARDS):
        tensors = {f"layers.{number}.weight": rng.standard_normal((160, 160), dtype=np.float32)}
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": 2 * 160 * 160 * 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (folder / "extra" / "notes with space.txt").write_text("notes")
    return folder


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def fetch(url: str, method: str = "GET", *, timeout: float = 10, **headers: str) -> Answer:
    """One request over its own connection, with no redirect followed; `If_Match=` stands for the header `If-Match`."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    with contextlib.closing(connection):
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def cdn_url(hub: HubServer, file: str = SHARDS[0]) -> str:
    """A freshly signed URL of a large file, as `resolve` redirects to."""
    answer = fetch(hf_hub_url(REPO, file, endpoint=hub.endpoint), "HEAD")
    assert answer.status == 302
    return answer.headers["Location"]


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test looks up another host. `endpoint=` is not enough: for its user agent the client asks its default one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    look_up, elsewhere = socket.getaddrinfo, []

    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1", "localhost", b"localhost"):
            elsewhere.append(host)
            raise socket.gaierror(f"{host} is not this machine")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    yield
    assert elsewhere == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, checkpoint)
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=False)


# ---- the real client -------------------------------------------------------------------------------------------------


def test_model_info_names_the_commit_and_the_files(hub: HubServer, api: HfApi, checkpoint: Path) -> None:
    info = api.model_info(REPO, files_metadata=True)

    assert info.sha == hub.add_repo(REPO, checkpoint)  # the same folder gives the same commit
    assert info.gated is False
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert set(siblings) == {*SHARDS, "model.safetensors.index.json", "config.json", "extra/notes with space.txt"}
    shard = siblings[SHARDS[0]]
    assert shard.size == (checkpoint / SHARDS[0]).stat().st_size
    assert shard.lfs is not None
    assert shard.lfs.sha256 == hashlib.sha256((checkpoint / SHARDS[0]).read_bytes()).hexdigest()
    assert siblings["config.json"].lfs is None


def test_model_info_gives_only_what_expand_asks(api: HfApi) -> None:
    info = api.model_info(REPO, expand=["sha", "gated"])

    assert info.sha is not None
    assert info.siblings is None


def test_tree_and_paths_info(api: HfApi) -> None:
    top = [entry.path for entry in api.list_repo_tree(REPO)]
    assert "extra" in top
    assert "extra/notes with space.txt" not in top
    assert [entry.path for entry in api.list_repo_tree(REPO, "extra")] == ["extra/notes with space.txt"]
    assert "extra/notes with space.txt" in [entry.path for entry in api.list_repo_tree(REPO, recursive=True)]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))

    assert [entry.path for entry in api.get_paths_info(REPO, ["config.json", "absent", "extra"])] == [
        "config.json",
        "extra",
    ]


@pytest.mark.parametrize("file", ["config.json", "extra/notes with space.txt", SHARDS[0]])
def test_download_gives_the_file(hub: HubServer, checkpoint: Path, tmp_path: Path, file: str) -> None:
    path = hf_hub_download(REPO, file, endpoint=hub.endpoint, cache_dir=tmp_path, token="a-token")

    assert Path(path).read_bytes() == (checkpoint / file).read_bytes()
    assert {request.had_authorization for request in hub.requests if request.origin == "hub"} == {True}
    assert [request.had_authorization for request in hub.requests if request.origin == "cdn"] == (
        [False] if file in SHARDS else []
    )


def test_snapshot_download_gives_the_folder(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path, token=False, max_workers=2))

    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        assert (folder / path.relative_to(checkpoint)).read_bytes() == path.read_bytes()
    assert hub.bytes_sent() == sum((checkpoint / shard).stat().st_size for shard in SHARDS)


def test_metadata_of_a_large_file_points_to_the_cdn(hub: HubServer, checkpoint: Path) -> None:
    metadata = get_hf_file_metadata(hf_hub_url(REPO, SHARDS[1], endpoint=hub.endpoint), token=False)

    assert metadata.commit_hash == hub.add_repo(REPO, checkpoint)
    assert metadata.size == (checkpoint / SHARDS[1]).stat().st_size
    assert metadata.etag == hashlib.sha256((checkpoint / SHARDS[1]).read_bytes()).hexdigest()
    assert metadata.location.startswith(hub.cdn_endpoint)


def test_metadata_of_a_small_file(hub: HubServer, checkpoint: Path) -> None:
    metadata = get_hf_file_metadata(hf_hub_url(REPO, "config.json", endpoint=hub.endpoint), token=False)

    assert metadata.size == (checkpoint / "config.json").stat().st_size
    assert metadata.location.startswith(hub.endpoint)
    assert len(metadata.etag or "") == 40  # git's blob id


def test_safetensors_metadata_reads_headers_by_range(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    file = api.parse_safetensors_file_metadata(REPO, SHARDS[0])

    assert file.tensors["layers.0.weight"].shape == [160, 160]
    assert hub.ranges(SHARDS[0]) == [(0, 100_001)]


def test_repository_without_organization(hub: HubServer, api: HfApi, checkpoint: Path, tmp_path: Path) -> None:
    commit = hub.add_repo("single", checkpoint)

    assert api.model_info("single").sha == commit
    assert api.model_info("single", revision="main").sha == commit
    assert Path(hf_hub_download("single", SHARDS[0], endpoint=hub.endpoint, cache_dir=tmp_path, token=False)).is_file()


def test_revisions_resolve_to_their_commits(hub: HubServer, api: HfApi, checkpoint: Path, tmp_path: Path) -> None:
    first = hub.add_repo(REPO, checkpoint, revisions={"v1.0": "main"})
    second = hub.add_repo(
        REPO, write_checkpoint(tmp_path / "second", seed=1), revision="v2", revisions={"refs/pr/1": "v2"}
    )

    assert first != second
    for revision, commit in {"main": first, first: first, "v1.0": first, "v2": second, "refs/pr/1": second}.items():
        assert api.model_info(REPO, revision=revision).sha == commit
        metadata = get_hf_file_metadata(
            hf_hub_url(REPO, "config.json", revision=revision, endpoint=hub.endpoint), token=False
        )
        assert metadata.commit_hash == commit
    path = hf_hub_download(
        REPO, "config.json", revision="v2", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False
    )
    assert json.loads(Path(path).read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("org/absent@main/config.json", RepositoryNotFoundError),
        (f"{REPO}@absent/config.json", RevisionNotFoundError),
        (f"{REPO}@{'0' * 40}/config.json", RevisionNotFoundError),
        (f"{REPO}@main/absent.json", RemoteEntryNotFoundError),
        (f"{REPO}@main/absent.safetensors", RemoteEntryNotFoundError),
    ],
)
def test_an_absent_file_raises_the_clients_error(
    hub: HubServer, tmp_path: Path, url: str, error: type[Exception]
) -> None:
    repo, _, rest = url.partition("@")
    revision, _, file = rest.partition("/")
    with pytest.raises(error):
        hf_hub_download(repo, file, revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path, token=False)


def test_an_absent_repository_or_revision_raises_the_clients_error(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="absent")


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("wrong", 403)])
def test_gated_files_need_the_token(
    hub: HubServer, checkpoint: Path, tmp_path: Path, token: str | bool, status: int
) -> None:
    hub.add_repo("org/gated", checkpoint, gated_token="right")

    for file in ("config.json", SHARDS[0]):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("org/gated", file, endpoint=hub.endpoint, cache_dir=tmp_path, token=token)
        assert caught.value.response.status_code == status
        path = hf_hub_download("org/gated", file, endpoint=hub.endpoint, cache_dir=tmp_path / "ok", token="right")
        assert Path(path).read_bytes() == (checkpoint / file).read_bytes()
    assert HfApi(endpoint=hub.endpoint, token=False).model_info("org/gated").gated == "manual"


# ---- the CDN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=8-107", 8, 108),
        ("bytes=1000-", 1000, None),
        ("bytes=-16", -16, None),
        ("bytes=-99999999", 0, None),
        ("bytes=100-99999999", 100, None),
    ],
)
def test_a_range_answers_206(hub: HubServer, checkpoint: Path, header: str, start: int, end: int | None) -> None:
    content = (checkpoint / SHARDS[0]).read_bytes()
    wanted = content[start:end]
    first = start % len(content)

    answer = fetch(cdn_url(hub), Range=header)

    assert answer.status == 206
    assert answer.body == wanted
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(content)}"
    assert answer.headers["Content-Length"] == str(len(wanted))
    assert answer.headers["ETag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert hub.ranges(SHARDS[0]) == [(first, first + len(wanted))]
    assert hub.bytes_sent(REPO) == len(wanted)


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=-0"])
def test_a_range_beyond_the_file_answers_416(hub: HubServer, checkpoint: Path, header: str) -> None:
    answer = fetch(cdn_url(hub), Range=header)

    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{(checkpoint / SHARDS[0]).stat().st_size}"
    assert hub.bytes_sent() == 0


@pytest.mark.parametrize("header", [None, "bytes=5-4", "bytes=-", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b"])
def test_what_is_no_single_range_gives_the_whole_file(hub: HubServer, checkpoint: Path, header: str | None) -> None:
    answer = fetch(cdn_url(hub), Range=header) if header else fetch(cdn_url(hub))

    assert answer.status == 200
    assert answer.body == (checkpoint / SHARDS[0]).read_bytes()


def test_an_empty_file_has_no_range() -> None:
    assert parse_range(None, 0) is None
    with pytest.raises(ValueError, match="no byte"):
        parse_range("bytes=0-", 0)


def test_preconditions(hub: HubServer) -> None:
    url = cdn_url(hub)
    etag = fetch(url, "HEAD").headers["ETag"]

    assert fetch(url, If_Match=etag, Range="bytes=0-3").status == 206
    assert fetch(url, If_Match='"other"', Range="bytes=0-3").status == 412
    assert fetch(url, If_Range=etag, Range="bytes=0-3").status == 206
    assert fetch(url, If_Range='"other"', Range="bytes=0-3").status == 200


def test_head_has_the_length_and_no_body(hub: HubServer, checkpoint: Path) -> None:
    answer = fetch(cdn_url(hub), "HEAD")

    assert answer.status == 200
    assert int(answer.headers["Content-Length"]) == (checkpoint / SHARDS[0]).stat().st_size
    assert hub.bytes_sent() == 0


def test_the_cdn_refuses_authorization(hub: HubServer) -> None:
    assert fetch(cdn_url(hub), Authorization="Bearer a-token").status == 400
    assert hub.requests[-1].had_authorization


def test_the_cdn_refuses_what_is_not_signed(hub: HubServer) -> None:
    url = cdn_url(hub)

    assert fetch(url.partition("?")[0]).status == 403
    assert fetch(url[:-1] + ("0" if url[-1] != "0" else "1")).status == 403
    assert fetch(url.replace(SHARDS[0], SHARDS[1])).status == 403
    assert fetch(url.replace("Expires=", "Expires=9")).status == 403


def test_signed_urls_expire_and_resolving_again_helps(hub: HubServer) -> None:
    url = cdn_url(hub)
    assert fetch(url, Range="bytes=0-3").status == 206

    hub.clock = lambda: time.time() + hub.url_lifetime_s + 1

    assert fetch(url, Range="bytes=0-3").status == 403
    assert fetch(cdn_url(hub), Range="bytes=0-3").status == 206


def test_connections_are_kept_alive(hub: HubServer) -> None:
    parts = urlsplit(cdn_url(hub))
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    with contextlib.closing(connection):
        local_addresses = set()
        for start in range(3):
            connection.request("GET", f"{parts.path}?{parts.query}", headers={"Range": f"bytes={start}-{start}"})
            local_addresses.add(connection.sock.getsockname())
            assert connection.getresponse().read()
        assert len(local_addresses) == 1


def test_ranges_in_parallel_are_all_counted(hub: HubServer, checkpoint: Path) -> None:
    content = (checkpoint / SHARDS[0]).read_bytes()
    url = cdn_url(hub)
    starts = range(0, len(content), 3000)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: fetch(url, Range=f"bytes={start}-{start + 2999}").body, starts))

    assert b"".join(parts) == content
    assert hub.bytes_sent() == len(content)
    assert sorted(hub.ranges(SHARDS[0]))[-1] == (starts[-1], len(content))
    hub.clear()
    assert hub.requests == []


def test_an_unknown_page_is_not_found(hub: HubServer) -> None:
    assert fetch(f"{hub.endpoint}/api/datasets/{REPO}").status == 404
    assert fetch(f"{hub.cdn_endpoint}/{REPO}/resolve/main/config.json").status == 404


# ---- faults ----------------------------------------------------------------------------------------------------------


def fail_the_cdn(hub: HubServer, fault: Fault) -> str:
    """Make every CDN answer fail so, and return a URL to ask."""

    def decide(request: RequestInfo) -> Fault | None:
        return fault if request.origin == "cdn" else None

    hub.fault = decide
    return cdn_url(hub)


def test_status_fault(hub: HubServer) -> None:
    answer = fetch(fail_the_cdn(hub, Status(503, {"Retry-After": "1"})), Range="bytes=0-9")

    assert (answer.status, answer.body, answer.headers["Retry-After"]) == (503, b"", "1")
    assert hub.bytes_sent() == 0


@pytest.mark.parametrize("after_bytes", [None, 0, 1000])
def test_reset_fault(hub: HubServer, after_bytes: int | None) -> None:
    url = fail_the_cdn(hub, Reset(after_bytes))

    with pytest.raises(ConnectionResetError):
        fetch(url)
    assert hub.requests[-1].bytes_sent == (after_bytes or 0)
    assert hub.requests[-1].status == (0 if after_bytes is None else 200)


def test_truncate_fault(hub: HubServer, checkpoint: Path) -> None:
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(fail_the_cdn(hub, Truncate(1000)))

    assert caught.value.partial == (checkpoint / SHARDS[0]).read_bytes()[:1000]


def test_truncate_before_the_headers(hub: HubServer) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(fail_the_cdn(hub, Truncate()))


@pytest.mark.parametrize("after_bytes", [None, 0, 1000])
def test_stall_fault_ends_by_itself(hub: HubServer, checkpoint: Path, after_bytes: int | None) -> None:
    answer = fetch(fail_the_cdn(hub, Stall(after_bytes, seconds=0.05)))

    assert answer.body == (checkpoint / SHARDS[0]).read_bytes()


def test_a_fault_without_a_body_to_cut_comes_before_the_headers(hub: HubServer) -> None:
    hub.fault = lambda request: Reset(after_bytes=1000)

    with pytest.raises(ConnectionResetError):
        fetch(hf_hub_url(REPO, SHARDS[0], endpoint=hub.endpoint), "HEAD")


def test_ignore_range_fault(hub: HubServer, checkpoint: Path) -> None:
    answer = fetch(fail_the_cdn(hub, IgnoreRange()), Range="bytes=10-19")

    assert answer.status == 200
    assert "Content-Range" not in answer.headers
    assert answer.body == (checkpoint / SHARDS[0]).read_bytes()
    assert hub.ranges(SHARDS[0]) == []


def test_etag_fault(hub: HubServer) -> None:
    assert fetch(fail_the_cdn(hub, Etag('"changed"')), Range="bytes=0-9").headers["ETag"] == '"changed"'

    hub.fault = lambda request: Etag('"changed"')
    assert get_hf_file_metadata(hf_hub_url(REPO, SHARDS[0], endpoint=hub.endpoint), token=False).etag == "changed"


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_closing_ends_stalled_and_idle_connections(checkpoint: Path) -> None:
    threads_before = set(threading.enumerate())
    stalled = threading.Event()

    def stall(request: RequestInfo) -> Fault | None:
        if request.origin == "hub":
            return None
        stalled.set()
        return Stall(10, seconds=3600)

    with ThreadPoolExecutor(1) as pool, HubServer() as hub:
        hub.add_repo(REPO, checkpoint)
        url = cdn_url(hub)
        parts = urlsplit(hub.endpoint)
        idle = http.client.HTTPConnection(parts.netloc, timeout=10)
        with contextlib.closing(idle):
            idle.request("GET", f"/api/models/{REPO}")
            idle.getresponse().read()
            hub.fault = stall
            waiting = pool.submit(fetch, url)
            assert stalled.wait(10)
            started = time.monotonic()
            hub.__exit__(None, None, None)
            assert time.monotonic() - started < 2
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                waiting.result(10)
    assert set(threading.enumerate()) <= threads_before
    with pytest.raises(ConnectionRefusedError):
        fetch(url)


def test_a_defect_in_a_hook_is_raised_at_the_end(checkpoint: Path) -> None:
    def broken(request: RequestInfo) -> Fault | None:
        raise LookupError("a defect")

    hub = HubServer()
    hub.add_repo(REPO, checkpoint)
    hub.fault = broken
    hub.__enter__()
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(f"{hub.endpoint}/api/models/{REPO}")
    with pytest.raises(LookupError, match="a defect"):
        hub.__exit__(None, None, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_standalone(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-W", "error", "-m", "tests.support.hub", "--repo", f"{REPO}={checkpoint}"]
    command += ["--repo", f"{REPO}@v2={checkpoint}", "--gated", f"{REPO}=right"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip()
            info = HfApi(endpoint=endpoint, token=False).model_info(REPO, revision="v2")
            assert info.gated == "manual"
            process.send_signal(number)
            assert process.wait(10) == 0
        finally:
            process.kill()
