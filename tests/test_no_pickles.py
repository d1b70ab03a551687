"""Nothing that came over a network is unpickled, or run: looked for in the package's own code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    file
    for area in ("client", "cluster", "worker", "proto")
    for file in sorted((ROOT / area).rglob("*.py"))
    if "_pb2" not in file.name
]
# Modules that make objects, and so code, of bytes.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
# Functions that do, or that run what they are given, by the last part of their name and the first.
CALLS = {
    ("torch", "load"),
    ("numpy", "load"),
    ("np", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("pandas", "read_pickle"),
    ("", "eval"),
    ("", "exec"),
    ("", "compile"),
}


def defects(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in UNPICKLERS)
            case ast.ImportFrom(module="pickle", names=[ast.alias(name="UnpicklingError")]):
                pass  # what torch raises for weights that are none
            case ast.ImportFrom(module=module, names=names):
                parts = {*str(module).split("."), *(alias.name for alias in names)}
                yield from sorted(parts & UNPICKLERS)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords) if any(
                keyword.arg == "weights_only" and getattr(keyword.value, "value", None) is True for keyword in keywords
            ):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if (owner, name) in CALLS:
                yield f"{owner}.{name}"
            case ast.Call(func=ast.Name(id=name)) if ("", name) in CALLS:
                yield name
            case ast.keyword(arg="weights_only" | "allow_pickle" as name, value=ast.Constant(value=value)) if value is (
                name == "allow_pickle"
            ):
                yield f"{name}={value}"
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield "trust_remote_code=True"


def test_nothing_is_unpickled() -> None:
    assert len(FILES) > 50
    assert {file.name: found for file in FILES if (found := list(defects(file.read_text(encoding="utf-8"))))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import torch\ntorch.load(path)",
        "load(path, weights_only=False)",
        "f(allow_pickle=True)",
        "eval(text)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_it_would_be_found(line: str) -> None:
    assert list(defects(line))


def test_what_is_harmless_is_not_taken_for_it() -> None:
    assert list(defects("import json\njson.loads(text)\nmodel.eval()\nf(weights_only=True)\nre.compile(text)")) == []
