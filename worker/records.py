"""Where a tensor lies: the values that the plan hands to the workers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

# A token for the Hub, as huggingface_hub takes it: a text, None for the one saved on the machine, False for none.
HubToken = str | Literal[False] | None

# safetensors' dtype tags -> (torch dtype name, bits an element).
DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One tensor of a checkpoint: its name there, its file, and its bytes `[start, end)` of that file."""

    key: str
    file: str
    dtype: str  # a safetensors tag, a key of DTYPES
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVersion:
    """A checkpoint's file as the driver saw it; a worker that sees another one must stop.

    `etag` is the Hub's; "<mtime_ns>-<size>" for a file in a folder; for a URL what its store tells (an ETag, a
    generation, a hash, a time of change). "" where nothing is told: then the size alone is compared.
    """

    size_bytes: int
    etag: str

    def is_same(self, other: FileVersion) -> bool:
        """Whether nothing speaks against both being the same bytes."""
        tags_agree = not self.etag or not other.etag or self.etag == other.etag
        return self.size_bytes == other.size_bytes and tags_agree


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """What a worker needs to open the checkpoint, except for the token, which never becomes part of a plan.

    kind "folder": `location` is an absolute path. kind "url": `location` is "scheme://host/prefix", without query,
    credentials or a slash at its end; how to get in is each process's own environment. kind "hub": `location` is
    "org/name", `commit` the resolved commit, `endpoint` the Hub's address ("" for huggingface_hub's default),
    `cache_dir` the Hub's cache on each node ("" for huggingface_hub's default), `is_cached_only` that the Hub couldn't
    be asked when the plan was made: a file that isn't in the planner's cache doesn't exist; `local_files_only` that no
    machine is to ask it.
    """

    kind: str
    location: str
    commit: str = ""
    endpoint: str = ""
    subfolder: str = ""
    cache_dir: str = ""
    is_cached_only: bool = False
    local_files_only: bool = False
