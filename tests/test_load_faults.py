"""Every fault of a link, at a real server: the load then equals an undisturbed one to the bit, or ends with its name.

What a worker's death, a cancel and a vanished client do is in test_interruptions.py and test_load_cluster.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GatedCheckpointError,
    LoadCancelledError,
    ShardliftError,
    SourceError,
)
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.sources import HubSource, answers
from shardlift.worker.spec import StageSpec
from tests.support.checkpoints import tiny
from tests.support.fingerprint import fingerprint
from tests.support.hub import Etag, Fault, HubServer, IgnoreRange, RequestInfo, Reset, Stall, Status, Truncate

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(
        "llama", tmp_path_factory.mktemp("faults") / "llama", layers=3, dtype="bfloat16", max_shard_size="100KB"
    )


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def spec(folder: Path, hub: HubServer) -> StageSpec:
    """The whole model as one stage, of many small reads."""
    hub.add_repo("org/tiny", folder)
    return one_stage(CheckpointRequest(path="org/tiny", hub_endpoint=hub.endpoint))


def one_stage(request: CheckpointRequest) -> StageSpec:
    plan = plan_model(request, None, ModelOptions(quantization=NF4), PlanOptions(), parse_devices("1x1TiB"))
    [spec] = plan.specs("m", "l", "secret")
    # Parts of 8 KiB: a fault hits one of many.
    return replace(spec, device="cpu", budget_bytes=64 << 10)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    return fingerprint(load_stage(one_stage(CheckpointRequest(path=str(folder))), None, LoadProgress()).stage.model)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between attempts are short: how long they are is test_sources.py's matter."""
    monkeypatch.setattr(answers, "backoff_s", lambda failures, random: 0.01)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("shardlift-fetch", "load"))]
    assert left == []


def once_in(count: int, *faults: Fault) -> Callable[[RequestInfo], Fault | None]:
    """Each request of a tensor's bytes meets the next of `faults`, but only one request in `count`."""
    seen = iter(range(1_000_000))
    lock = threading.Lock()

    def fault(request: RequestInfo) -> Fault | None:
        if request.origin != "cdn" or not (request.file or "").endswith(".safetensors"):
            return None
        with lock:
            index = next(seen)
        return faults[(index // count) % len(faults)] if index % count == 0 else None

    return fault


MENDED: dict[str, tuple[Fault, ...]] = {
    "reset mid-body": (Reset(100), Reset(5000)),
    "reset before the answer": (Reset(),),
    "cut short": (Truncate(0), Truncate(3000)),
    "500": (Status(500), Status(502), Status(504)),
    "503 with Retry-After": (Status(503, {"Retry-After": "0"}), Status(503)),
    "429 with Retry-After": (Status(429, {"Retry-After": "0"}), Status(429)),
    "expired CDN URL": (Status(403),),
    "200 for 206": (IgnoreRange(),),
    "one after the other": (Reset(10), Status(500), Truncate(1), Status(403), IgnoreRange(), Reset()),
}


@pytest.mark.parametrize("faults", MENDED)
def test_a_fault_that_passes_changes_nothing(
    hub: HubServer, spec: StageSpec, undisturbed: dict[str, str], faults: str
) -> None:
    hub.clear()
    hub.fault = once_in(3, *MENDED[faults])
    loaded = load_stage(spec, None, LoadProgress())
    assert fingerprint(loaded.stage.model) == undisturbed
    assert loaded.fetched_bytes == spec.fetch_bytes
    assert any(request.status not in (0, 206) for request in hub.requests) or "reset" in faults or "cut" in faults


def test_a_stall_is_given_up_and_read_on(
    hub: HubServer, spec: StageSpec, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HubSource.__init__.__kwdefaults__, "stall_s", 0.5)
    stalls = iter([Stall(2000, 30)])
    lock = threading.Lock()

    def fault(request: RequestInfo) -> Fault | None:
        with lock:
            return next(stalls, None) if request.origin == "cdn" else None

    hub.fault = fault
    started = time.monotonic()
    assert fingerprint(load_stage(spec, None, LoadProgress()).stage.model) == undisturbed
    assert time.monotonic() - started < 25


ENDED: dict[str, tuple[Fault, type[ShardliftError], str]] = {
    "reset for good": (Reset(0), SourceError, "bytes .* of org/tiny"),
    "503 for good": (Status(503), SourceError, "HTTP 503"),
    "no ranges": (IgnoreRange(), SourceError, "the server ignores ranges"),
    "other version": (Etag('"other"'), CorruptCheckpointError, "changed since the load began"),
    "range beyond the end": (Status(416), CorruptCheckpointError, "changed since the load began"),
}


@pytest.mark.parametrize("fault", ENDED)
def test_a_fault_that_stays_ends_the_load_with_its_name(hub: HubServer, spec: StageSpec, fault: str) -> None:
    injected, kind, words = ENDED[fault]
    late = iter(range(1_000_000))
    # The first parts come, so that the load is under way, and (for a version) the server's tag is known.
    hub.fault = lambda request: injected if request.origin == "cdn" and next(late) > 5 else None
    with pytest.raises(kind, match=words):
        load_stage(spec, None, LoadProgress())


@pytest.mark.parametrize(("status", "kind"), [(404, CheckpointNotFoundError), (401, GatedCheckpointError)])
def test_a_hub_that_takes_the_file_away_is_named(
    hub: HubServer, spec: StageSpec, status: int, kind: type[ShardliftError]
) -> None:
    hub.fault = lambda request: Status(status if request.origin == "hub" else 403)
    with pytest.raises(kind):
        load_stage(spec, None, LoadProgress())


def test_a_name_that_does_not_resolve_is_told(spec: StageSpec) -> None:
    nowhere = replace(spec, source=replace(spec.source, endpoint="http://no-such-host.invalid"))
    with pytest.raises(SourceError, match=r"no-such-host\.invalid"):
        load_stage(nowhere, None, LoadProgress())


def test_a_file_replaced_mid_load_is_noticed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = one_stage(CheckpointRequest(path=str(tmp_path)))
    progress = LoadProgress()
    last = max(
        tmp_path.glob("*.safetensors"), key=lambda file: max(r.start for r in spec.records if r.file == file.name)
    )

    def replace_it() -> None:
        data = last.read_bytes()
        last.unlink()
        last.write_bytes(data)

    progress.loaded = lambda record: replace_it() if last.exists() else None  # type: ignore[method-assign]
    with pytest.raises(CorruptCheckpointError, match="changed since the load began"):
        load_stage(spec, None, progress)


def test_a_file_that_goes_away_mid_load_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = one_stage(CheckpointRequest(path=str(tmp_path)))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointNotFoundError, match="no file"):
        load_stage(spec, None, LoadProgress())


def test_a_disk_that_fails_now_and_then_changes_nothing(
    folder: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, real, calls = one_stage(CheckpointRequest(path=str(folder))), os.preadv, iter(range(1_000_000))

    def preadv(*arguments: object) -> int:
        if next(calls) % 3 == 0:
            raise OSError(5, "Input/output error")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    assert fingerprint(load_stage(spec, None, LoadProgress()).stage.model) == undisturbed


def test_a_disk_that_fails_for_good_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = one_stage(CheckpointRequest(path=str(folder)))

    def preadv(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(SourceError, match="Input/output error"):
        load_stage(spec, None, LoadProgress())


def test_a_cancelled_load_ends_at_once_and_leaves_nothing(hub: HubServer, spec: StageSpec) -> None:
    waiting = threading.Event()

    def fault(request: RequestInfo) -> Fault | None:
        if request.origin != "cdn":
            return None
        waiting.set()
        return Stall(10, 60)

    hub.fault = fault
    progress = LoadProgress()
    failures: list[BaseException] = []

    def load() -> None:
        try:
            load_stage(spec, None, progress)
        except LoadCancelledError as error:
            failures.append(error)

    thread = threading.Thread(target=load, name="load")
    thread.start()
    assert waiting.wait(20)
    started = time.monotonic()
    progress.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - started < 5
    assert len(failures) == 1


@pytest.mark.parametrize("budget_bytes", [700, 4096, 1 << 30])  # 700: parts of 50 bytes and more
@pytest.mark.parametrize("connections", [1, 7])
def test_the_budget_and_the_connections_change_nothing(
    folder: Path, undisturbed: dict[str, str], budget_bytes: int, connections: int
) -> None:
    spec = replace(one_stage(CheckpointRequest(path=str(folder))), budget_bytes=budget_bytes, connections=connections)
    assert fingerprint(load_stage(spec, None, LoadProgress()).stage.model) == undisturbed
