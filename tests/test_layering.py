"""Imports point one way, and what is heavy or internal is imported in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "client": {"client", "proto"},
    "cluster": {"cluster", "worker", "proto"},
    "worker": {"worker", "proto"},
    "proto": {"proto"},
}
PURE = [
    *(f"worker.{name}" for name in ("anatomy", "spec", "code_spec", "adapter_spec", "fetch", "quantization", "packed")),
    *(f"worker.{name}" for name in ("records", "headers", "chunks", "timeline", "byte_sizes", "metrics", "logs")),
    "worker.workspace",
    *(f"cluster.{name}" for name in ("sizes", "devices", "partition", "plan", "pace", "load_time")),
    *(f"cluster.{name}" for name in ("blocks", "slowest", "spread", "refusal", "device_map", "moves")),
    *(f"cluster.{name}" for name in ("quantized", "shrink")),
    *(f"cluster.doctor.{name}" for name in ("finding", "seen", "verdicts")),
    *(f"proto.v1.{name}" for name in ("errors", "frames", "wire")),
]
# How transformers loads and quantizes: no promise of theirs covers it.
LOADING_INTERNALS = (
    *("conversion_mapping", "core_model_loading", "initialization", "integrations", "modeling_utils"),
    *("monkey_patching", "quantizers", "utils.generic", "utils.loading_report"),
)


@cache
def modules() -> dict[str, Path]:
    """Dotted names, within the package, of all modules but the generated ones."""
    files = [file for area in ALLOWED for file in (ROOT / area).rglob("*.py") if "_pb2" not in file.name]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(module: str) -> Iterator[str]:
    """What `module` imports, anywhere in it; modules of this package with a leading dot: ".worker.records"."""
    file = modules()[module]
    parts = ["", *module.split(".")]
    package = parts if file.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            assert base, f"{module} imports from outside the package"
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{target}.{alias.name}" for alias in node.names)


def imports_any_of(module: str, *libraries: str) -> list[str]:
    return [name for name in imports(module) if any(name == each or name.startswith(f"{each}.") for each in libraries)]


def test_there_is_something_to_check() -> None:
    assert len(modules()) > 50
    assert set(PURE) <= set(modules())
    assert ".worker.records.TensorRecord" in set(imports("cluster.checkpoint"))
    assert "ray" in imports_any_of("worker.actor", "ray")


@pytest.mark.parametrize("area", ALLOWED)
def test_imports_point_one_way(area: str) -> None:
    wrong = [
        (module, name)
        for module in modules()
        if module.split(".")[0] == area
        for name in imports(module)
        if name.startswith(".") and name.split(".")[1] not in ALLOWED[area] and name != ".__version__"
    ]
    assert not wrong


def test_modules_import_each_other_relatively() -> None:
    assert not [(module, names) for module in modules() if (names := imports_any_of(module, "shardlift"))]


def test_the_client_knows_nothing_of_ray() -> None:
    client = [module for module in modules() if module.startswith("client")]
    assert not [(module, found) for module in client if (found := imports_any_of(module, "ray"))]


def test_ray_is_in_one_module_of_the_worker() -> None:
    users = {module for module in modules() if module.startswith("worker") and imports_any_of(module, "ray")}
    assert users == {"worker.actor", "worker.own_gpus"}


def test_pure_modules_import_nothing_heavy() -> None:
    heavy = ("ray", "torch", "grpc", "transformers", "bitsandbytes")
    assert not [(module, found) for module in PURE if (found := imports_any_of(module, *heavy))]
    code = f"import sys, importlib\nfor name in {PURE!r}: importlib.import_module(f'shardlift.{{name}}')\n"
    code += "print(*({'ray', 'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_peft_is_in_one_module_and_in_the_property_that_gives_its_objects() -> None:
    assert {module for module in modules() if imports_any_of(module, "peft")} == {"worker.adapters", "client.described"}


def test_transformers_loading_internals_are_in_one_module() -> None:
    internals = [f"transformers.{name}" for name in LOADING_INTERNALS]
    users = {module for module in modules() if imports_any_of(module, *internals)}
    assert users == {"worker.skeleton"}
