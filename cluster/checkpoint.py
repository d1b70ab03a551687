"""From what the user names to what a checkpoint holds: config, commit, headers. Reads kilobytes, by range."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidRequestError,
    UnsupportedModelError,
)
from ..worker.headers import header_length, parse_header
from ..worker.records import FileVersion, HubToken, SourceSpec, TensorRecord
from ..worker.sources import Source, open_source, read_file
from ..worker.sources.urls import is_url, parse_url
from .hub import resolve_commit

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_INDEX_LIMIT_BYTES = 256 << 20  # of a million tensors; anything larger is no index
_JSON_LIMIT_BYTES = 16 << 20
_MOST_FILES = 20_000
_EXPLICIT = "transformers_weights"  # of a config: what holds the weights, in place of the usual names
_MOST_TENSORS = 4_000_000
_HEADER_GUESS_BYTES = 64 << 10
_CONNECTIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRequest:
    """Where a checkpoint is, and whether its code may run. No token: it goes beside.

    local_files_only: of a repository, what the Hub's cache on each machine holds, and no word with the Hub.
    """

    path: str
    revision: str = "main"
    subfolder: str = ""
    variant: str = ""
    hub_endpoint: str = ""
    cache_dir: str = ""
    trust_remote_code: bool = False
    local_files_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds, without its tensors' bytes."""

    source: SourceSpec
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    records: Mapping[str, TensorRecord]
    versions: Mapping[str, FileVersion]


def resolve_source(request: CheckpointRequest, token: HubToken) -> SourceSpec:
    """The source that `request` means, its revision resolved to a commit, once and for all workers."""
    path = request.path.strip()
    if not path:
        raise InvalidRequestError("no path is given: name a repository (org/name), a folder or a URL")
    if is_url(path):
        url = parse_url(path)
        if not url.is_file:
            if request.local_files_only:
                raise InvalidRequestError(
                    f"local_files_only=True, but {url.text} is read over the network: leave it out, or name a folder"
                )
            return SourceSpec(kind="url", location=url.text, subfolder=_subfolder(request))
        path = url.folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return SourceSpec(kind="folder", location=str(folder.resolve()), subfolder=request.subfolder)
    if folder.exists():
        raise CheckpointNotFoundError(f"{path} is a file: name the folder that holds config.json and the weights")
    if not _REPO_ID.fullmatch(path):
        raise CheckpointNotFoundError(
            f"folder {path} does not exist (on the machine that plans: the head node, behind a gateway)"
        )
    resolved = resolve_commit(
        path,
        request.revision or "main",
        endpoint=request.hub_endpoint or None,
        token=token,
        cache_dir=request.cache_dir,
        local_files_only=request.local_files_only,
    )
    return SourceSpec(
        kind="hub",
        location=path,
        commit=resolved.commit,
        endpoint=request.hub_endpoint,
        subfolder=request.subfolder,
        cache_dir=request.cache_dir,
        is_cached_only=resolved.is_cached,
        local_files_only=request.local_files_only,
    )


def _subfolder(request: CheckpointRequest) -> str:
    """As a part of a URL: a store takes '//' and '..' by the letter."""
    subfolder = request.subfolder.strip("/")
    if subfolder and (not subfolder.isprintable() or {"", ".", ".."} & set(subfolder.split("/"))):
        raise InvalidRequestError(f"subfolder {ascii(request.subfolder)[:80]} is no path below {request.path}")
    return subfolder


def read_checkpoint(request: CheckpointRequest, token: HubToken) -> Checkpoint:
    """Reads config and headers. Raises the errors of sources and headers, and UnsupportedModelError."""
    spec = resolve_source(request, token)
    source = open_source(spec, token)
    try:
        config = _read_config(source, request.path)
        generation_config = read_json(source, "generation_config.json", required=False)
        files = _weight_files(source, request, config.get(_EXPLICIT))
        records, versions = read_headers(source, files)
    finally:
        source.close()
    return Checkpoint(
        source=spec, config=config, generation_config=generation_config, records=records, versions=versions
    )


def _read_config(source: Source, path: str) -> Mapping[str, Any]:
    try:
        config = read_json(source, "config.json", required=True)
    except CheckpointNotFoundError as error:
        if exists(source, "adapter_config.json"):
            raise UnsupportedModelError(
                f"{path} is an adapter, and no model to attach one to; load its base model"
            ) from None
        raise CheckpointNotFoundError(f"{path} has no config.json: {error}") from None
    assert config is not None
    return config


def read_json(
    source: Source, file: str, *, required: bool, limit_bytes: int = _JSON_LIMIT_BYTES
) -> dict[str, Any] | None:
    try:
        data = read_file(source, file, limit_bytes)
    except CheckpointNotFoundError:
        if required:
            raise
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{file} holds a {type(value).__name__}, not an object")
    return value


def exists(source: Source, file: str) -> bool:
    """Whether the checkpoint has such a file."""
    try:
        source.stat(file)
    except CheckpointNotFoundError:
        return False
    return True


def _weight_files(source: Source, request: CheckpointRequest, explicit: object) -> list[str]:
    """Files that hold weights: those that the index names, or the single one. Others in the repository don't count.

    explicit: the file, or the index, that `config.json` itself names, or None.
    """
    if explicit is not None:
        return _explicit_files(source, explicit)
    dotted = f".{request.variant}" if request.variant else ""
    single, index = f"model{dotted}.safetensors", f"model.safetensors.index{dotted}.json"
    if exists(source, single):
        return [single]
    listing = read_json(source, index, required=False, limit_bytes=_INDEX_LIMIT_BYTES)
    if listing is not None:
        return _indexed_files(listing, index, ".safetensors", "safetensors file")
    for pickled in _pickled_names(request):
        if exists(source, pickled):
            flags = f" --revision {request.revision}" if request.revision not in ("", "main") else ""
            flags += f" --subfolder {request.subfolder}" if request.subfolder else ""
            flags += f" --variant {request.variant}" if request.variant else ""
            raise UnsupportedModelError(
                f"{request.path} has only {pickled}, which can't be read by range: convert it once, with "
                f"`shardlift convert {request.path} FOLDER{flags}`, and load that FOLDER"
            )
    wanted = f" of variant {request.variant!r}" if request.variant else ""
    raise CheckpointNotFoundError(f"{request.path} has no safetensors weights{wanted} ({single} or {index})")


def _explicit_files(source: Source, named: object) -> list[str]:
    """As transformers takes them: whatever the variant."""
    is_path = isinstance(named, str) and named.isprintable() and "\\" not in named
    if not is_path or {"", ".", ".."} & set(str(named).split("/")):
        raise CorruptCheckpointError(f"config.json has {_EXPLICIT} {ascii(named)[:80]}, which is no file beside it")
    file = str(named)
    if file.endswith(".safetensors.index.json"):
        listing = read_json(source, file, required=True, limit_bytes=_INDEX_LIMIT_BYTES)
        assert listing is not None
        return _indexed_files(listing, file, ".safetensors", "safetensors file")
    if not file.endswith(".safetensors"):
        raise UnsupportedModelError(
            f"config.json has {_EXPLICIT} {ascii(file)[:80]}, which is neither a safetensors file nor an index of some"
        )
    return [file]


def _pickled_names(request: CheckpointRequest) -> tuple[str, str]:
    """What the one file of weights is called, and the index of several."""
    dotted = f".{request.variant}" if request.variant else ""
    return f"pytorch_model{dotted}.bin", f"pytorch_model.bin.index{dotted}.json"


def pickled_files(source: Source, request: CheckpointRequest) -> tuple[str, list[str]]:
    """The index of a checkpoint of `.bin` files ("" for a single one), and those files.

    Raises InvalidRequestError for a checkpoint that has safetensors, CheckpointNotFoundError for one without either.
    """
    single, index = _pickled_names(request)
    if exists(source, single.replace("pytorch_model", "model").replace(".bin", ".safetensors")) or exists(
        source, index.replace("pytorch_model.bin", "model.safetensors")
    ):
        raise InvalidRequestError(f"{request.path} has safetensors: load it as it is, there is nothing to convert")
    if exists(source, single):
        return "", [single]
    listing = read_json(source, index, required=False)
    if listing is None:
        raise CheckpointNotFoundError(f"{request.path} has neither {single} nor {index}: there is nothing to convert")
    return index, _indexed_files(listing, index, ".bin", "file of torch's")


def _indexed_files(listing: Mapping[str, Any], index: str, suffix: str, kind: str) -> list[str]:
    weight_map = listing.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(suffix) or "/" in file or "\\" in file:
            raise CorruptCheckpointError(f"{index} names {str(file)[:80]!r}, which is no {kind} beside it")
    files = sorted(set(weight_map.values()))
    if len(files) > _MOST_FILES:
        raise CorruptCheckpointError(f"{index} names {len(files):,} files; at most {_MOST_FILES:,} are read")
    return files


def read_headers(source: Source, files: list[str]) -> tuple[dict[str, TensorRecord], dict[str, FileVersion]]:
    records: dict[str, TensorRecord] = {}
    versions: dict[str, FileVersion] = {}
    with ThreadPoolExecutor(max_workers=min(_CONNECTIONS, len(files)), thread_name_prefix="headers") as pool:
        for file, (version, found) in zip(files, pool.map(lambda file: _read_header(source, file), files), strict=True):
            versions[file] = version
            for key, record in found.items():
                if key in records:
                    raise CorruptCheckpointError(f"tensor {key} is in both {records[key].file} and {file}")
                records[key] = record
            if len(records) > _MOST_TENSORS:
                raise CorruptCheckpointError(
                    f"the files up to {file} hold {len(records):,} tensors; at most {_MOST_TENSORS:,} are read"
                )
    return records, versions


def _read_header(source: Source, file: str) -> tuple[FileVersion, dict[str, TensorRecord]]:
    version = source.stat(file)
    head = bytearray(min(_HEADER_GUESS_BYTES, version.size_bytes))
    if head:
        source.read_into(file, 0, memoryview(head), version)
    length = header_length(bytes(head[:8]), version.size_bytes, file)
    header = head[8 : 8 + length]
    if len(header) < length:
        rest = bytearray(length - len(header))
        source.read_into(file, 8 + len(header), memoryview(rest), version)
        header += rest
    found, _ = parse_header(bytes(header), file=file, file_bytes=version.size_bytes)
    return version, found
