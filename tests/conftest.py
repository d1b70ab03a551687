"""What every test needs: one import of the package, no word to the outside, the checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before huggingface_hub is imported: nothing may ask the public Hub.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
# A test that wants a cache of quantized parts names its folder.
os.environ["SHARDLIFT_CACHE"] = "off"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Threads without work leave the cores to the other processes of the tests, as those of stages on one machine do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

if TYPE_CHECKING:
    from tests.support.cluster import RunningCluster
    from tests.support.hub import HubServer

ROOT = Path(__file__).resolve().parents[1]
_ON_RAY = re.compile(
    r"tests\.support\.cluster|tests\.support\.ray_start import (?!free_port$)|^\s*import ray|RunningCluster",
    re.MULTILINE,
)
CHECKPOINTS = Path(os.environ.get("SHARDLIFT_TEST_CACHE", ROOT / ".cache")) / "checkpoints"


class _RootIsNoTestPackage:
    """The repository's root is the package itself: collected as a package of tests, it would be imported twice."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoTestPackage())


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every file that runs on Ray; of one that marks some of its tests itself, those, and what has a cluster."""
    texts = {path: path.read_text(encoding="utf-8") for path in {item.path for item in items}}
    on_ray = {path for path, text in texts.items() if _ON_RAY.search(text) and "mark.ray\n" not in text}
    for item in items:
        if item.path in on_ray or "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint; made once and kept."""
    from tests.support.checkpoints import smollm2

    return smollm2(CHECKPOINTS)


@pytest.fixture(scope="session")
def hub(smollm2_folder: Path) -> Iterator[HubServer]:
    """A Hub with the real model at org/smollm2."""
    from tests.support.hub import HubServer

    with HubServer() as server:
        server.add_repo("org/smollm2", smollm2_folder)
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Three Ray nodes on this machine, with a gateway."""
    from tests.support.cluster import running_cluster

    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds, or touches, an instance that the user runs."""
    monkeypatch.setenv("SHARDLIFT_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("SHARDLIFT_ADDRESS", raising=False)
    monkeypatch.delenv("SHARDLIFT_TOKEN", raising=False)
