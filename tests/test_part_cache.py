"""The node's cache of quantized parts: files that tell decay, a limit, several users, failures that fail no load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.proto.v1.errors import CorruptCheckpointError, InvalidRequestError, LoadCancelledError
from shardlift.worker.part_cache import PartCache
from shardlift.worker.part_file import BLOCK_BYTES, PartFile, write_part
from shardlift.worker.sources import Cancel

ABOUT = {"model": "org/name", "layers": [0, 3]}


def tensors(megabytes: float = 2.5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randint(0, 256, (int(megabytes * 2**20), 1), dtype=torch.uint8, generator=generator),
        "a.weight.absmax": torch.randn(1000, generator=generator),
        "b": torch.randn(7, 3, generator=generator).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "transposed": torch.randn(33, 65, generator=generator).T,
    }


def read(part: PartFile, name: str) -> bytes:
    record = part.records[name]
    data = bytearray(record.size_bytes)
    part.read_into("", record.start, memoryview(data), part.version)
    return bytes(data)


def plain(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_part_is_a_safetensors_file_and_reads_back(tmp_path: Path) -> None:
    path, wanted = tmp_path / "part", tensors()
    written = write_part(path, wanted, ABOUT, Cancel())
    assert written == path.stat().st_size
    for name, tensor in safetensors.torch.load_file(path).items():
        assert torch.equal(tensor, wanted[name]), name
    part = PartFile(path)
    assert part.about == ABOUT
    assert list(part.records) == list(wanted)
    for name, tensor in wanted.items():
        assert read(part, name) == plain(tensor), name
    part.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("part") / "part"
    write_part(path, tensors(), ABOUT, Cancel())
    return path.read_bytes()


def is_sound(path: Path) -> bool:
    """Whether everything in the file reads without complaint, in pieces that don't meet its blocks."""
    try:
        part = PartFile(path)
    except CorruptCheckpointError:
        return False
    try:
        data = bytearray(part.size_bytes)
        start = min(record.start for record in part.records.values())
        for position in range(start, part.size_bytes, 700_001):
            end = min(position + 700_001, part.size_bytes)
            part.read_into("", position, memoryview(data)[position:end], part.version)
    except CorruptCheckpointError:
        return False
    finally:
        part.close()
    return True


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("changed") / "part"
    header = 8 + int.from_bytes(sound[:8], "little")
    position = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(sound) - 1)))
    changed = bytearray(sound)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    noticed = not is_sound(path)
    # Space around JSON's values says nothing.
    assert noticed or bytes(sound[position : position + 1]).isspace()


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 5000, BLOCK_BYTES, -1])
def test_a_part_cut_short_is_noticed(sound: bytes, tmp_path: Path, kept: int) -> None:
    (tmp_path / "part").write_bytes(sound[:kept])
    assert not is_sound(tmp_path / "part")


def test_a_part_cut_short_while_open_is_noticed(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(sound)
    part = PartFile(path)
    os.truncate(path, BLOCK_BYTES)
    with pytest.raises(CorruptCheckpointError, match="cut short"):
        read(part, "transposed")
    part.close()


def test_another_format_is_no_part(tmp_path: Path) -> None:
    path = tmp_path / "other"
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CorruptCheckpointError, match="not a part of format"):
        PartFile(path)


# ---- the cache -------------------------------------------------------------------------------------------------------


def store(cache: PartCache, key: str, megabytes: float = 1.0) -> int:
    return cache.store(key, {"a": torch.zeros(int(megabytes * 2**20), dtype=torch.uint8)}, ABOUT, Cancel())


def keys(cache: PartCache) -> list[str]:
    return sorted(entry.key for entry in cache.entries())


def test_what_is_stored_is_found_and_what_is_cleared_is_not(tmp_path: Path) -> None:
    cache = PartCache(tmp_path / "new" / "folder", 1 << 30)
    assert cache.find("a") is None
    assert cache.entries() == []
    size = store(cache, "a")
    part = cache.find("a")
    assert part is not None
    [entry] = cache.entries()
    assert (entry.key, entry.size_bytes, entry.about) == ("a", size, ABOUT)
    assert abs(entry.used_s - time.time()) < 60
    assert cache.clear() == size
    assert cache.find("a") is None
    assert read(part, "a") == bytes(2**20)  # what is open stays readable
    part.close()
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, int(3.5 * 2**20))
    for index, key in enumerate("abc"):
        store(cache, key)
        os.utime(tmp_path / f"{key}.safetensors", (index, index))
    part = cache.find("a")  # used now
    assert part is not None
    part.close()
    store(cache, "d")
    assert keys(cache) == ["a", "c", "d"]
    store(cache, "e", megabytes=2)
    assert "e" in keys(cache)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= cache.limit_bytes + 10_000


def test_a_part_larger_than_the_limit_is_not_kept_and_costs_no_other(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, 2 << 20)
    store(cache, "a")
    assert store(cache, "b", megabytes=3) == 0
    assert keys(cache) == ["a"]


def test_a_corrupt_entry_is_dropped(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, 1 << 30)
    store(cache, "a")
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    assert cache.find("a") is None
    assert list(tmp_path.glob("a*")) == []


def test_a_folder_that_cannot_be_used_fails_no_load(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = PartCache(tmp_path / "file", 1 << 30)
    assert store(cache, "a") == 0
    assert cache.find("a") is None
    assert cache.entries() == []
    assert cache.clear() == 0


def test_a_cancelled_write_leaves_nothing(tmp_path: Path) -> None:
    cache, cancel = PartCache(tmp_path, 1 << 30), Cancel()
    cancel.set()
    with pytest.raises(LoadCancelledError):
        cache.store("a", tensors(), ABOUT, cancel)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, 1 << 30)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left, mine = tmp_path / f"k.{gone.pid}.ab.writing", tmp_path / f"k.{os.getpid()}.ab.writing"
    for path in (left, mine):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 120,) * 2)
    store(cache, "a")
    assert not left.exists()
    assert mine.exists()


def test_several_writers_of_one_part_leave_one_that_is_sound(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, 1 << 30)
    wanted = tensors()
    threads = [threading.Thread(target=lambda: cache.store("a", wanted, ABOUT, Cancel())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_sound(tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.safetensors"]


@pytest.mark.parametrize(
    ("environment", "check"),
    [
        ({"SHARDLIFT_CACHE": "off"}, lambda cache: cache is None),
        ({"SHARDLIFT_CACHE": "OFF"}, lambda cache: cache is None),
        ({"SHARDLIFT_CACHE": "/data/parts"}, lambda cache: cache.folder == Path("/data/parts")),
        ({}, lambda cache: cache.folder == Path.home() / ".cache/shardlift"),
        ({"XDG_CACHE_HOME": "/x"}, lambda cache: cache.folder == Path("/x/shardlift")),
        ({"SHARDLIFT_CACHE_SIZE": "2GiB"}, lambda cache: cache.limit_bytes == 2 << 30),
        ({}, lambda cache: cache.limit_bytes > 0),
    ],
)
def test_the_environment_says_where_and_how_much(
    environment: dict[str, str], check: Callable[[PartCache | None], bool]
) -> None:
    assert check(PartCache.from_environment(environment))


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="SHARDLIFT_CACHE_SIZE='lots' is no size"):
        PartCache.from_environment({"SHARDLIFT_CACHE_SIZE": "lots"})


def test_a_part_that_cannot_be_read_counts_as_decayed(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(sound)
    part = PartFile(tmp_path / "part")
    os.close(part._descriptor)  # from now on every read is an error
    with pytest.raises(CorruptCheckpointError, match="can't be read"):
        read(part, "transposed")
    part._descriptor = -1


def test_parts_being_written_count_too(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, 3 << 20)
    store(cache, "a")
    other = tmp_path / f"k.{os.getpid()}.ab.writing"
    other.write_bytes(bytes(1 << 20))
    store(cache, "b", megabytes=1.5)
    assert keys(cache) == ["b"]
    os.utime(other, (0, 0))  # an earlier container's, whose process's number somebody has again
    store(cache, "c")
    assert not other.exists()


def test_without_a_home_there_is_no_cache() -> None:
    code = (
        "import os, pathlib\n"
        "from shardlift.worker.part_cache import PartCache\n"
        "def nobody(*_): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = nobody\n"
        "assert PartCache.from_environment({}) is None\n"
        "assert PartCache.from_environment({'SHARDLIFT_CACHE': '/x'}).folder == pathlib.Path('/x')\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_listing_needs_no_torch() -> None:
    code = "import sys, shardlift.worker.part_cache; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root.parent, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_tensor_larger_than_a_copy_is_written_whole(tmp_path: Path) -> None:
    big = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (70 << 20) + 3, dtype=np.uint8))
    write_part(tmp_path / "part", {"big": big}, ABOUT, Cancel())
    part = PartFile(tmp_path / "part")
    assert read(part, "big") == big.numpy().tobytes()
    part.close()
