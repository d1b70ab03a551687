"""How little `import shardlift` takes, and how soon a client gives up on a gateway that isn't there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("ray", "torch", "transformers", "numpy", "rich", "click", "huggingface_hub", "bitsandbytes")


def _imported_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHARDLIFT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    return set(done.stdout.split())


def test_import_is_light() -> None:
    assert _imported_by("import shardlift") == set()


def test_exported_classes_are_light() -> None:
    names = "AsyncClient, AutoModelForCausalLM, Client, ShardliftError, connect, connect_async"
    assert _imported_by(f"from shardlift import {names}") == set()


def test_asking_a_dead_address_is_light() -> None:
    statement = """
import shardlift
try:
    shardlift.connect("127.0.0.1:1", timeout_s=0.2)
except shardlift.ShardliftError:
    pass
"""
    assert _imported_by(statement) == set()


@pytest.mark.parametrize(
    "module", ["client.connection", "client.handle", "client.options", "client.instance", "client.aio"]
)
def test_modules_are_light(module: str) -> None:
    assert _imported_by(f"import shardlift.{module}") == set()


def test_the_command_line_imports_no_torch() -> None:
    assert _imported_by("import shardlift.client.cli.main") <= {"click"}
