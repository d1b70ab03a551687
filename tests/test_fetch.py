"""The stream of records: its plan as properties, its budget and its threads with a source that waits on command."""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.proto.v1.errors import CorruptCheckpointError, InternalError, LoadCancelledError, SourceError
from shardlift.worker.chunks import Chunk, plan_chunks
from shardlift.worker.fetch import RecordStream
from shardlift.worker.records import DTYPES, FileVersion, TensorRecord
from shardlift.worker.sources import Cancel, FolderSource, HubSource
from shardlift.worker.staging import HostStaging
from tests.support.hub import HubServer, RequestInfo, Reset, Stall

VERSION = FileVersion(size_bytes=1 << 20, etag="v")


def record(key: str, start: int, end: int, *, file: str = "f", dtype: str = "U8") -> TensorRecord:
    return TensorRecord(key=key, file=file, dtype=dtype, shape=(end - start,), start=start, end=end)


def in_a_row(sizes: Sequence[int], start: int = 100, **more: str) -> list[TensorRecord]:
    records = []
    for index, size in enumerate(sizes):
        records.append(record(f"t{index}", start, start + size, **more))
        start += size
    return records


def content(file: str, start: int, end: int) -> bytes:
    """What a file holds, without having it: 8 bytes of a hash for every 8 bytes."""
    first, last = start // 8, -(-end // 8)
    blocks = b"".join(
        hashlib.blake2b(f"{file}{index}".encode(), digest_size=8).digest() for index in range(first, last)
    )
    return blocks[start - first * 8 :][: end - start]


class MadeUpSource:
    """Files whose content is computed. `gate` is called before each read, and may wait or raise."""

    def __init__(self, gate: Callable[[int, Cancel], None] | None = None) -> None:
        self.gate = gate
        self.reads: list[tuple[str, int, int]] = []
        self.began = threading.Condition()

    def stat(self, file: str) -> FileVersion:
        return VERSION

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        assert version == VERSION
        assert cancel is not None
        with self.began:
            self.reads.append((file, start, start + len(buffer)))
            self.began.notify_all()
        if self.gate is not None:
            self.gate(start, cancel)
        cancel.check(file)
        buffer[:] = content(file, start, start + len(buffer))

    def close(self) -> None:
        pass

    def wait_for_reads(self, count: int) -> None:
        with self.began:
            assert self.began.wait_for(lambda: len(self.reads) >= count, 10)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("shardlift-fetch")] == []


def versions(records: Sequence[TensorRecord]) -> dict[str, FileVersion]:
    return {each.file: VERSION for each in records}


def check_taken(stream: RecordStream[memoryview], each: TensorRecord) -> None:
    view = stream.take(each.key)
    assert bytes(view) == content(each.file, each.start, each.end)
    assert not view.readonly
    if len(view):
        address = np.frombuffer(view, np.uint8).ctypes.data
        assert address % (DTYPES[each.dtype][1] // 8) == 0


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_neighbours_share_a_chunk_up_to_its_size() -> None:
    records = in_a_row([40, 40, 40, 0, 200, 1])
    chunks = plan_chunks(records, chunk_bytes=100)
    assert [(chunk.start, chunk.end, len(chunk.records)) for chunk in chunks] == [
        (100, 180, 2),
        (180, 220, 2),
        (220, 420, 1),
        (420, 421, 1),
    ]


def test_other_files_other_orders_and_gaps_are_other_chunks() -> None:
    records = [
        record("a", 0, 10),
        record("b", 10, 20, file="g"),
        record("c", 20, 30, file="g"),
        record("d", 31, 40, file="g"),
        record("e", 10, 20),
        record("f", 0, 10, file="h"),
    ]
    assert [[each.key for each in chunk.records] for chunk in plan_chunks(records)] == [
        ["a"],
        ["b", "c"],
        ["d"],
        ["e"],
        ["f"],
    ]


def test_a_gap_is_fetched_along_within_the_bound() -> None:
    records = [record("a", 0, 600), record("b", 605, 1000), record("c", 1005, 1100)]
    assert [len(chunk.records) for chunk in plan_chunks(records, max_gap_bytes=5)] == [3]
    assert [len(chunk.records) for chunk in plan_chunks(records, max_gap_bytes=4)] == [1, 1, 1]
    assert [len(chunk.records) for chunk in plan_chunks([*records, record("d", 1106, 1107)], max_gap_bytes=9)] == [3, 1]


@st.composite
def record_lists(draw: st.DrawFn) -> list[TensorRecord]:
    """Files with gaps, read mostly in order."""
    records: list[TensorRecord] = []
    for file in "fgh"[: draw(st.integers(0, 3))]:
        position = draw(st.integers(0, 50))
        for _ in range(draw(st.integers(0, 8))):
            dtype = draw(st.sampled_from(["U8", "BF16", "F32", "I64"]))
            size = draw(st.integers(0, 60)) * DTYPES[dtype][1] // 8
            records.append(record(f"t{len(records)}", position, position + size, file=file, dtype=dtype))
            position += size + draw(st.sampled_from([0, 0, 0, 1, 3]))
    for _ in range(draw(st.integers(0, 3))):
        if records:
            records.insert(draw(st.integers(0, len(records) - 1)), records.pop(draw(st.integers(0, len(records) - 1))))
    return records


@given(record_lists(), st.integers(1, 500), st.integers(0, 4))
def test_a_plan_covers_every_record_once_and_wastes_little(
    records: list[TensorRecord], chunk_bytes: int, max_gap_bytes: int
) -> None:
    chunks = plan_chunks(records, chunk_bytes=chunk_bytes, max_gap_bytes=max_gap_bytes)
    assert [each for chunk in chunks for each in chunk.records] == records
    for chunk in chunks:
        assert chunk.size_bytes <= chunk_bytes or len([each for each in chunk.records if each.size_bytes]) == 1
        assert (chunk.start, chunk.end) == (
            min(each.start for each in chunk.records),
            max(each.end for each in chunk.records),  # so never past a file's end
        )
        assert all(each.file == chunk.file for each in chunk.records)
    needed = sum(each.size_bytes for each in records)
    assert sum(chunk.size_bytes for chunk in chunks) - needed <= needed / 100


def test_a_record_that_is_kept_shares_its_chunk_with_none() -> None:
    chunks = plan_chunks(in_a_row([10] * 5), alone={"t1", "t4"})
    assert [[each.key for each in chunk.records] for chunk in chunks] == [["t0"], ["t1"], ["t2", "t3"], ["t4"]]


def test_a_plan_for_nothing_is_empty() -> None:
    assert plan_chunks([]) == []
    assert plan_chunks([record("a", 5, 5)]) == [Chunk(file="f", start=5, end=5, records=(record("a", 5, 5),))]


# ---- what is taken ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    records=record_lists(),
    budget_bytes=st.integers(1, 400),
    connections=st.integers(1, 4),
    chunk_bytes=st.sampled_from([1, 16, 100, 1000]),
    order=st.randoms(use_true_random=False),
)
def test_every_record_is_taken_in_any_order(
    records: list[TensorRecord], budget_bytes: int, connections: int, chunk_bytes: int, order: np.random.Generator
) -> None:
    progress: list[int] = []
    with RecordStream(
        MadeUpSource(),
        records,
        versions(records),
        HostStaging(),
        budget_bytes=budget_bytes,
        connections=connections,
        chunk_bytes=chunk_bytes,
        max_gap_bytes=1,
        on_progress=progress.append,
    ) as stream:
        shuffled = list(records)
        if order.random() < 0.5:
            order.shuffle(shuffled)
        for each in shuffled:
            check_taken(stream, each)
        assert stream.held_bytes == 0
        needed = sum(each.size_bytes for each in records)
        assert needed <= stream.fetched_bytes <= needed * 1.01
    assert progress == sorted(progress)
    assert (progress or [0])[-1] == stream.fetched_bytes


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_torch_can_use_what_is_taken(dtype: str) -> None:
    """The second record is misaligned in its chunk."""
    records = [record("a", 3, 4), record("b", 4, 4 + 64, dtype=dtype)]
    with RecordStream(MadeUpSource(), records, versions(records), HostStaging()) as stream:
        tensor = torch.frombuffer(stream.take("b"), dtype=getattr(torch, DTYPES[dtype][0]))
        stream.take("a")
    assert bytes(tensor.view(torch.uint8)) == content("f", 4, 68)


def test_an_aligned_record_is_not_copied_and_a_chunk_begins_at_64() -> None:
    records = [record("a", 3, 7), record("b", 7, 23, dtype="F32")]
    with RecordStream(MadeUpSource(), records, versions(records), HostStaging()) as stream:
        first, second = (np.frombuffer(stream.take(key), np.uint8).ctypes.data for key in "ab")
    assert first % 64 == 0
    assert second == first + 4


def test_a_record_is_taken_once() -> None:
    records = in_a_row([8, 8])
    with RecordStream(MadeUpSource(), records, versions(records), HostStaging()) as stream:
        stream.take("t0")
        for key in ("t0", "other"):
            with pytest.raises(InternalError, match=f"'{key}' is not in this stream, or was taken before"):
                stream.take(key)


def test_nothing_to_fetch() -> None:
    with RecordStream(MadeUpSource(), [], {}, HostStaging()) as stream:
        assert stream.fetched_bytes == 0


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_a_large_record_is_read_in_parts_by_several_threads() -> None:
    together = threading.Barrier(3)
    source = MadeUpSource(lambda start, cancel: together.wait(10) and None)
    records = in_a_row([300])
    with RecordStream(source, records, versions(records), HostStaging(), chunk_bytes=100, connections=3) as stream:
        check_taken(stream, records[0])
    assert sorted(source.reads) == [("f", 100, 200), ("f", 200, 300), ("f", 300, 400)]


def test_fetching_runs_ahead_within_the_budget_and_on_as_chunks_are_taken() -> None:
    source = MadeUpSource()
    records = in_a_row([10] * 10)
    with RecordStream(
        source, records, versions(records), HostStaging(), budget_bytes=40, connections=2, chunk_bytes=10
    ) as stream:
        for index, each in enumerate(records):
            source.wait_for_reads(min(index + 4, 10))
            assert stream.held_bytes <= 40
            assert len(source.reads) <= index + 4
            check_taken(stream, each)
    assert sorted(source.reads) == [("f", each.start, each.end) for each in records]


def test_a_chunk_leaves_the_budget_with_its_last_record() -> None:
    records = in_a_row([10, 10])
    with RecordStream(MadeUpSource(), records, versions(records), HostStaging()) as stream:
        stream.take("t0")
        assert stream.held_bytes == 20
        stream.take("t1")
        assert stream.held_bytes == 0


def test_what_is_waited_for_is_fetched_at_once_above_the_budget() -> None:
    source = MadeUpSource()
    records = in_a_row([10] * 10)
    with RecordStream(
        source, records, versions(records), HostStaging(), budget_bytes=20, connections=1, chunk_bytes=10
    ) as stream:
        source.wait_for_reads(2)
        check_taken(stream, records[9])
        assert stream.held_bytes == 20
        assert source.reads[2] == ("f", records[9].start, records[9].end)
        for each in records[:9]:
            check_taken(stream, each)


def test_a_chunk_larger_than_the_budget_is_held_alone() -> None:
    records = in_a_row([10, 100, 10])
    with RecordStream(
        MadeUpSource(), records, versions(records), HostStaging(), budget_bytes=20, chunk_bytes=10
    ) as stream:
        for each in records:
            check_taken(stream, each)
            assert stream.held_bytes in (0, 10, 100)


class WatchedStaging(HostStaging):
    def __init__(self) -> None:
        self.blocks: list[weakref.ref[object]] = []

    def allocate(self, size_bytes: int) -> memoryview:
        buffer = super().allocate(size_bytes)
        self.blocks.append(weakref.ref(buffer.obj))
        return buffer


def test_taken_bytes_are_the_consumers_to_free() -> None:
    """Nothing in the stream, its waiting threads included, keeps a chunk that was taken."""
    staging = WatchedStaging()
    blocks = staging.blocks
    source = MadeUpSource(lambda start, cancel: assert_true(start < 1000 or cancel.wait(10)))
    records = in_a_row([1000, 1000], start=0)
    with RecordStream(source, records, versions(records), staging, chunk_bytes=1000, connections=3) as stream:
        view = stream.take("t0")
        source.wait_for_reads(2)
        assert blocks[0]() is not None
        del view
        wait_until(lambda: blocks[0]() is None)


# ---- failure and close -----------------------------------------------------------------------------------------------


def test_the_first_error_is_raised_by_every_later_take() -> None:
    def gate(start: int, cancel: Cancel) -> None:
        if start == 120:
            raise SourceError("the cable is out")

    records = in_a_row([10] * 10)
    with RecordStream(
        MadeUpSource(gate), records, versions(records), HostStaging(), chunk_bytes=10, connections=1
    ) as stream:
        for key in ("t2", "t2", "t0", "t9"):
            with pytest.raises(SourceError, match="the cable is out"):
                stream.take(key)
        assert stream.held_bytes == 0


def test_an_error_breaks_off_the_other_reads() -> None:
    def gate(start: int, cancel: Cancel) -> None:
        if start == 120:
            source.wait_for_reads(3)
            raise CorruptCheckpointError("bad bytes")
        assert cancel.wait(10)

    source = MadeUpSource(gate)
    records = in_a_row([10] * 3)
    with (
        RecordStream(source, records, versions(records), HostStaging(), chunk_bytes=10, connections=3) as stream,
        pytest.raises(CorruptCheckpointError, match="bad bytes"),
    ):
        stream.take("t0")


def test_a_defect_in_a_thread_reaches_the_consumer() -> None:
    def progress(fetched_bytes: int) -> None:
        raise ZeroDivisionError

    records = in_a_row([10, 10])
    stream = RecordStream(
        MadeUpSource(), records, versions(records), HostStaging(), chunk_bytes=10, connections=1, on_progress=progress
    )
    with stream:
        wait_until(lambda: not any(thread.is_alive() for thread in stream._threads))
        with pytest.raises(ZeroDivisionError):
            stream.take("t0")


def test_close_ends_reads_and_waiting_takes() -> None:
    source = MadeUpSource(lambda start, cancel: assert_true(cancel.wait(10)))
    records = in_a_row([10] * 5)
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            stream.take("t3")
        except LoadCancelledError as error:
            errors.append(error)

    with RecordStream(source, records, versions(records), HostStaging(), chunk_bytes=10, connections=2) as stream:
        consumer = threading.Thread(target=consume)
        consumer.start()
        source.wait_for_reads(2)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    consumer.join(5)
    assert len(errors) == 1
    with pytest.raises(LoadCancelledError):
        stream.take("t0")
    assert stream.held_bytes == 0
    stream.close()


def assert_true(value: bool) -> None:
    assert value


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


# ---- real sources ----------------------------------------------------------------------------------------------------

FILE = "model.safetensors"
SIZE = 3 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(np.random.default_rng(0).bytes(SIZE))
    return tmp_path


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    huggingface_hub.close_session()


def records_of(file: str) -> list[TensorRecord]:
    return [
        record(f"t{index}", start, start + (SIZE >> 5), file=file)
        for index, start in enumerate(range(0, SIZE, SIZE >> 5))
    ]


def test_a_folder_and_a_hub_stream_the_same_bytes(hub: HubServer, folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    records = records_of(FILE)
    broken = iter([Reset(50_000), Reset(70_000)])
    hub.fault = lambda request: next(broken, None) if request.origin == "cdn" else None
    commit = hub.add_repo("org/name", folder)
    for source in (FolderSource(folder), HubSource("org/name", commit, endpoint=hub.endpoint, sleep=lambda _: None)):
        with RecordStream(
            source,
            records,
            {FILE: source.stat(FILE)},
            HostStaging(),
            budget_bytes=1 << 20,
            chunk_bytes=1 << 18,
            connections=3,
        ) as stream:
            assert b"".join(stream.take(each.key) for each in records) == whole
            assert stream.fetched_bytes == SIZE
    assert SIZE <= hub.bytes_sent() <= SIZE + (2 << 18)  # a reset may lose what was sent before it


@pytest.mark.parametrize("warm", [False, True], ids=["new connections", "reused connections"])
@pytest.mark.parametrize("after_bytes", [None, 1000])
def test_close_is_prompt_while_sockets_stall(hub: HubServer, folder: Path, after_bytes: int | None, warm: bool) -> None:
    commit = hub.add_repo("org/name", folder)
    source = HubSource("org/name", commit, endpoint=hub.endpoint, stall_s=60)
    records = records_of(FILE)
    version = source.stat(FILE)
    stalled = threading.Semaphore(0)

    def fault(request: RequestInfo) -> Stall:
        stalled.release()
        return Stall(after_bytes, 60)

    if warm:
        with RecordStream(
            source, records, {FILE: version}, HostStaging(), chunk_bytes=1 << 18, connections=4
        ) as stream:
            for each in records:
                stream.take(each.key)
    hub.fault = fault
    with RecordStream(source, records, {FILE: version}, HostStaging(), chunk_bytes=1 << 18, connections=4) as stream:
        for _ in range(4):
            assert stalled.acquire(timeout=10)
        started = time.monotonic()
    assert time.monotonic() - started < 1.5
    assert stream.held_bytes == 0
