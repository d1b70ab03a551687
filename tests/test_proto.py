"""The generated code under proto/v1 is what its .proto files give."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[1] / "proto"
SOURCES = sorted((PROTO / "v1").glob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code generated now."""
    installed = importlib.metadata.version("grpcio-tools")
    (used,) = re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", (PROTO / "v1/registry_pb2_grpc.py").read_text())
    if installed != used:
        pytest.skip(f"the committed code is of grpcio-tools {used}, here is {installed}")
    folder = tmp_path_factory.mktemp("gen")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", f"shardlift/proto={PROTO}"]
    command += [f"--{kind}={folder}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, *(f"shardlift/proto/v1/{file.name}" for file in SOURCES)], check=True, timeout=60)
    return folder / "shardlift/proto/v1"


def test_generated_code_is_fresh(generated: Path) -> None:
    now = {file.name: file.read_bytes() for file in generated.iterdir()}
    committed = {file.name: file.read_bytes() for file in (PROTO / "v1").glob("*_pb2*")}
    assert sorted(now) == sorted(committed)
    stale = [name for name in now if now[name] != committed[name]]
    assert not stale, f"run `make proto`: {stale}"


def test_every_source_is_of_this_package() -> None:
    for file in SOURCES:
        assert "\npackage shardlift.v1;\n" in file.read_text()
    assert len(SOURCES) == 5


def test_proto_itself_is_no_package() -> None:
    # It would hide proto-plus, which Ray's dependencies import as `proto`.
    assert not (PROTO / "__init__.py").exists()
