"""README.md keeps its word: its commands parse, its Python names what exists, its tables say what the code says."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import shardlift
from shardlift.client.cli.main import cli
from shardlift.client.handle import RemoteModel
from shardlift.worker.anatomy import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    "README.md": README,
    **{file.name: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))},
}
SOURCE = "".join(
    file.read_text(encoding="utf-8") for area in ("client", "cluster", "worker") for file in (ROOT / area).rglob("*.py")
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[str]:
    for block in blocks("bash"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())


SHARDLIFT_LINES = [line for line in command_lines() if "shardlift" in shlex.split(line, comments=True)]


def parse(arguments: list[str]) -> None:
    """Raises click's errors for what the command line doesn't take. Runs nothing."""
    with cli.make_context("shardlift", list(arguments)) as context:
        name, command, rest = cli.resolve_command(context, arguments)
        assert command is not None
        command.make_context(name, rest, parent=context).close()


@pytest.mark.parametrize("line", SHARDLIFT_LINES)
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line, comments=True)
    parse(words[words.index("shardlift") + 1 :])


def test_wrong_command_lines_would_be_noticed() -> None:
    for line in ("laod org/name", "load", "load org/name --load-in-3bit", "up --port x", "show a b"):
        with pytest.raises(click.UsageError):
            parse(line.split())


def test_every_command_is_shown() -> None:
    assert set(cli.commands) <= {line.split("shardlift ")[1].split()[0] for line in SHARDLIFT_LINES}


def test_other_commands_are_known() -> None:
    firsts = {shlex.split(line, comments=True)[0] for line in command_lines()}
    assert firsts <= {"make", "pip", "ray", "shardlift"}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {target for text in DOCUMENTS.values() for target in re.findall(r"^make (\w+)|`make (\w+)`", text, re.M)}
    assert {"demo", "test"} <= {name for pair in named for name in pair if name} <= targets


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_name_what_exists(block: str) -> None:
    tree = ast.parse(block)
    compile(tree, "README.md", "exec")
    objects = {"model": RemoteModel, "client": shardlift.Client, "shardlift": shardlift}
    takes = inspect.signature(shardlift.AutoModelForCausalLM.from_pretrained).parameters
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    importlib.import_module(alias.name)
            case ast.ImportFrom(module=str(module), names=names):
                found = importlib.import_module(module)
                assert [alias.name for alias in names if not hasattr(found, alias.name)] == []
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in objects:
                assert hasattr(objects[name], attribute), f"{name}.{attribute}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="AutoModelForCausalLM")), keywords=keywords):
                assert [word.arg for word in keywords if word.arg not in takes] == []


def test_environment_variables_are_the_codes() -> None:
    pattern = r"\b(?:SHARDLIFT|HF)_[A-Z_]+\b"
    read = {name for name in re.findall(pattern, SOURCE) if name.startswith("SHARDLIFT_")}
    named = set(re.findall(pattern, README))
    assert read <= named
    assert [name for name in named if name not in SOURCE] == []


def test_supported_models_are_the_families() -> None:
    table = README.partition("## Supported models")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == ["model_type", *sorted(FAMILIES)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    text = DOCUMENTS[document]
    linked = [name for name in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in name]
    folder = ROOT if document == "README.md" else ROOT / "docs"
    named = re.findall(r"`((?:client|cluster|worker|proto|tests|docs|demo|k8s)/[\w./]+)`", text)
    missing = [name for name in linked if not (folder / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing
    assert linked or named


def test_exceptions_that_are_named_exist() -> None:
    from shardlift.proto.v1 import errors

    for text in DOCUMENTS.values():
        named = set(re.findall(r"\b([A-Z]\w+Error)\b", text)) - {"TimeoutError", "TypeError", "ValueError"}
        assert [name for name in named if not hasattr(errors, name)] == []
