"""docs/runbook.md keeps its word: each entry says how a fault shows, why, what to do, and names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### (.+)\n((?:(?!^##).*\n)*)", RUNBOOK, flags=re.MULTILINE))


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@cache
def said() -> str:
    """All that the code says, strings that are written in pieces put together."""
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for area in ("client", "cluster", "worker")
        for file in (ROOT / area).rglob("*.py")
    )
    return re.sub(r'"\s*\n\s*f?"', "", source)


def test_there_are_entries() -> None:
    assert len(ENTRIES) >= 20


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry(entry: str) -> None:
    parts = dict(re.findall(r"^- \*\*(\w+)\*\*: ((?:(?!^- ).*\n)*)", ENTRIES[entry], flags=re.MULTILINE))
    assert list(parts) == ["Seen", "Cause", "Remedy", "Tried"]
    assert all(text.strip() for text in parts.values())
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", parts["Tried"])
    assert named or parts["Tried"].startswith("by hand"), "no test, and nobody tried it"
    assert [pair for pair in named if pair[1] not in functions_of(pair[0])] == []
    for quoted in re.findall("“(.+?)”", parts["Seen"], flags=re.DOTALL):
        assert " ".join(quoted.split()) in said(), quoted


def test_a_drifted_entry_would_be_noticed() -> None:
    assert "no gateway answers at" in said()
    assert "no gateway replies at" not in said()
    assert "test_hubs" in functions_of("tests/test_doctor.py")
