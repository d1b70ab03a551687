"""A checkpoint's own modelling code (`trust_remote_code`): found, pinned by its hash, and imported.

Whoever plans finds the files and hashes them; a worker runs those very bytes or nothing. Whether any may run at all is
the operator's word, asked for before anything here is called.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..proto.v1.errors import CorruptCheckpointError, UnsupportedModelError, one_line
from .code_spec import CONFIG, MODEL, CodeSpec
from .records import HubToken, SourceSpec
from .sources import Source, open_source, read_file

_REFERENCE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")
# As transformers finds them; a file that this doesn't see is missing when it is imported.
_RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.(\w+)\s*$|from\s+\.(\w+)\s+import)", flags=re.MULTILINE)
_FILE_LIMIT_BYTES = 4 << 20
_MOST_FILES = 64

_imported: dict[str, ModelCode] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCode:
    """config_class: None where transformers has one for the model type."""

    spec: CodeSpec
    config_class: Any
    model_class: Any


def find_code(source: SourceSpec, token: HubToken, config: Mapping[str, Any]) -> CodeSpec:
    """The code that `config` names, with the files that it imports. Runs nothing; reads kilobytes.

    Raises UnsupportedModelError for code in another repository, CorruptCheckpointError for a name that is none.
    """
    references = {name: str(config["auto_map"][name]) for name in (CONFIG, MODEL) if name in config["auto_map"]}
    for reference in references.values():
        if "--" in reference:
            raise UnsupportedModelError(
                f"config.json takes its code from another repository ({reference[:120]}): copy that code beside the "
                "weights, and name it in auto_map without the repository"
            )
        if not _REFERENCE.fullmatch(reference):
            raise CorruptCheckpointError(f"config.json's auto_map names {reference[:80]!r}, which is no 'module.Class'")
    opened = open_source(source, token)
    try:
        files = read_modules(opened, [reference.partition(".")[0] for reference in references.values()])
    finally:
        opened.close()
    return CodeSpec(classes=references, files={name: _digest(data) for name, data in files.items()})


def import_code(spec: CodeSpec, source: SourceSpec, token: HubToken) -> ModelCode:
    """The classes, imported once in a process.

    Raises CorruptCheckpointError where a file is not what was planned with, UnsupportedModelError where the code can't
    be imported.
    """
    with _lock:
        if spec.key not in _imported:
            _imported[spec.key] = _import(spec, source, token)
        return _imported[spec.key]


def read_modules(source: Source, modules: list[str]) -> dict[str, bytes]:
    """The modules' files, and those that they import from beside them. Runs nothing."""
    files: dict[str, bytes] = {}
    wanted = [f"{module}.py" for module in modules]
    while wanted:
        name = wanted.pop()
        if name in files:
            continue
        if len(files) == _MOST_FILES:
            raise UnsupportedModelError(f"the checkpoint's code has more than {_MOST_FILES} files")
        files[name] = read_file(source, name, _FILE_LIMIT_BYTES)
        text = files[name].decode("utf-8", errors="replace")
        wanted += [f"{one or other}.py" for one, other in _RELATIVE_IMPORT.findall(text)]
    return files


def _import(spec: CodeSpec, source: SourceSpec, token: HubToken) -> ModelCode:
    opened = open_source(source, token)
    try:
        files = {name: read_file(opened, name, _FILE_LIMIT_BYTES) for name in spec.files}
    finally:
        opened.close()
    for name, data in files.items():
        if _digest(data) != spec.files[name]:
            raise CorruptCheckpointError(f"{name} is not the code that the model was planned with: load it again")
    folder = Path(tempfile.mkdtemp(prefix="shardlift-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    package = ModuleType(f"shardlift_checkpoint_code_{spec.key}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    try:
        importlib.invalidate_caches()
        classes = {}
        for role, reference in spec.classes.items():
            module, _, name = reference.partition(".")
            classes[role] = getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
    except Exception as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]
        text = f"{type(error).__name__}: {one_line(error, 300).replace(str(folder), source.location)}"
        raise UnsupportedModelError(f"the checkpoint's code can't be imported: {text}") from None
    return ModelCode(spec=spec, config_class=classes.get(CONFIG), model_class=classes[MODEL])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
