"""What is shipped: a wheel with the package and nothing beside it, built from an sdist that suffices for it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AREAS = ("client", "cluster", "worker", "proto")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it. Built from a copy: a build writes beside its
    sources."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "gen", "*.egg-info", "results")
    shutil.copytree(ROOT, source, ignore=made)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder


def package_files() -> set[str]:
    """Every module and stub of the source tree, with what goes with them, as paths in the wheel."""
    files = {ROOT / "__init__.py", ROOT / "py.typed"}
    for area in AREAS:
        files |= {file for kind in ("*.py", "*.pyi", "*.proto") for file in (ROOT / area).rglob(kind)}
    files |= set((ROOT / "cluster" / "static").iterdir())
    return {f"shardlift/{file.relative_to(ROOT).as_posix()}" for file in files}


def test_the_wheel_holds_exactly_the_package(built: Path) -> None:
    (wheel,) = built.glob("shardlift-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == package_files()
    assert {name.split("/", 1)[1] for name in info} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }


def test_the_wheel_says_what_it_is(built: Path) -> None:
    import shardlift

    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{folder}/entry_points.txt").decode())
        metadata = archive.read(f"{folder}/METADATA").decode()
    assert folder == f"shardlift-{shardlift.__version__}.dist-info"
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "console_scripts": {"shardlift": "shardlift.client.cli.main:main"}
    }
    assert "Requires-Python: >=3.10" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0] in metadata


def test_the_sdist_has_the_sources_and_no_leftovers(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {name.removeprefix("shardlift/") for name in package_files()}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith((".", "bench", "demo")) or "__pycache__" in name]
