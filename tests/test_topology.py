"""What a node's GPUs are, as its driver's tool tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlift.cluster import topology
from shardlift.worker import own_gpus

ROWS = """\
0, GPU-aaaa1111-0000, 81000, NVIDIA H100 80GB HBM3
1, GPU-bbbb2222-0000, 141312, NVIDIA H200
2, GPU-cccc3333-0000, [N/A], NVIDIA GB10
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `nvidia-smi` that answers only the question that is asked of it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'test "$*" = "--query-gpu=index,uuid,memory.free,name --format=csv,noheader,nounits" || exit 2\n'
        f"cat <<'END'\n{ROWS}END\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tool


def seen() -> list[tuple[int, str]]:
    return [(gpu.free_bytes, gpu.name) for gpu in topology._own_gpus()]


def test_free_memory_is_what_the_driver_says(driver: Path) -> None:
    assert seen() == [
        (81000 << 20, "NVIDIA H100 80GB HBM3"),
        (141312 << 20, "NVIDIA H200"),
        (0, "NVIDIA GB10"),
    ]


@pytest.mark.parametrize("visible", [["1", "0"], ["GPU-bbbb", "GPU-aaaa1111-0000"]])
def test_a_raylet_that_was_given_some_counts_those(
    driver: Path, monkeypatch: pytest.MonkeyPatch, visible: list[str]
) -> None:
    monkeypatch.setattr(own_gpus, "visible", lambda: visible)
    assert [name for _, name in seen()] == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]


def test_no_driver_or_a_failing_one_is_no_gpu(driver: Path) -> None:
    driver.write_text("#!/bin/sh\nexit 9\n")
    assert seen() == []
