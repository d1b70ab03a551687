"""`python -m shardlift.cluster.convert`: a checkpoint of `.bin` files made into one of safetensors, once.

A pickle can't be read by ranges, and could run code: here torch reads it as weights alone, which runs none. Reads
{"source": fields of CheckpointRequest, "token": str or null, "out": folder} as JSON from stdin; tells each file on
stderr; prints what was written, or {"error", "message"} and exits with 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..proto.v1.errors import (
    CorruptCheckpointError,
    InternalError,
    InvalidRequestError,
    one_line,
)
from ..proto.v1.status import to_error
from ..worker.headers import LENGTH_BYTES
from ..worker.records import DTYPES, HubToken
from ..worker.sources import Source, open_source, read_file
from ..worker.tokenizer import TOKENIZER_FILES
from .checkpoint import CheckpointRequest, exists, pickled_files, resolve_source

_TAGS = {name: tag for tag, (name, _) in DTYPES.items()}
_PIECE_BYTES = 64 << 20
_SMALL_BYTES = 256 << 20
# What is copied beside the weights: from a folder everything else that is a plain file of data, else what is asked for.
_NOT_COPIED = (
    ".bin",
    ".safetensors",
    ".index.json",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ckpt",
    ".py",
)
_BESIDE = ("generation_config.json", *TOKENIZER_FILES)


def convert(request: CheckpointRequest, token: HubToken, out: Path) -> dict[str, Any]:
    """Writes the checkpoint to the folder `out`, file by file, whole or not at all; takes one tensor's memory.

    Raises InvalidRequestError where there is nothing to convert, or `out` holds something; CorruptCheckpointError for a
    file that is more than weights, or isn't whole; the errors of sources; OSError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequestError(f"{out} is there already: name a folder that is empty, or isn't there yet")
    spec = resolve_source(request, token)
    source = open_source(spec, token)
    folder = Path(spec.location) / spec.subfolder if spec.kind == "folder" else None
    try:
        index, files = pickled_files(source, request)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            weight_map: dict[str, str] = {}
            total = 0
            for file in files:
                with _on_disk(source, file, folder, Path(temporary)) as path:
                    tensors = _read(path, file)
                if twice := sorted(weight_map.keys() & tensors.keys()):
                    raise CorruptCheckpointError(f"tensor {twice[0]} is in two files of {request.path}")
                name = file.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
                size = write_safetensors(made / name, tensors)
                weight_map |= dict.fromkeys(tensors, name)
                total += size
                del tensors
                print(f"{file}: {size} bytes as {name}", file=sys.stderr, flush=True)
            if index:
                listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
                name = index.replace("pytorch_model.bin", "model.safetensors", 1)
                (made / name).write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n")
            _copy_beside(source, folder, made)
            if out.exists():
                out.rmdir()  # an empty one
            made.rename(out)
    finally:
        source.close()
    return {"folder": str(out), "files": len(files), "tensors": len(weight_map), "bytes": total}


@contextlib.contextmanager
def _on_disk(source: Source, file: str, folder: Path | None, temporary: Path) -> Iterator[Path]:
    """The file, where torch can map it. What had to be fetched is gone afterwards, as far as nothing maps it."""
    if folder is not None:
        yield folder / file
        return
    path = temporary / "fetched.bin"
    version = source.stat(file)
    try:
        with path.open("wb") as written:
            for start in range(0, version.size_bytes, _PIECE_BYTES):
                piece = bytearray(min(_PIECE_BYTES, version.size_bytes - start))
                source.read_into(file, start, memoryview(piece), version)
                written.write(piece)
        source.verify(file, version)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path, file: str) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6: can't be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{file} is not weights alone, and is not opened further: {one_line(error, 160)}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptCheckpointError(f"{file} can't be read: {one_line(error, 160)}") from None
    if not isinstance(state, Mapping) or not state:
        raise CorruptCheckpointError(f"{file} holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CorruptCheckpointError(f"{file} holds a {type(tensor).__name__} as {str(name)[:80]!r}, not a tensor")
        if str(tensor.dtype).removeprefix("torch.") not in _TAGS:
            raise CorruptCheckpointError(f"{file}: tensor {name} has dtype {tensor.dtype}, which safetensors lacks")
    return dict(state)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Writes a safetensors file tensor by tensor; gives the tensors' bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        tag = _TAGS[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": tag, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                for piece in flat.split(_PIECE_BYTES):
                    file.write(piece.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return position


def _copy_beside(source: Source, folder: Path | None, made: Path) -> None:
    if folder is not None:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED):
                shutil.copyfile(path, made / path.name)
        return
    for file in ("config.json", *_BESIDE):
        if exists(source, file):
            (made / file).write_bytes(read_file(source, file, _SMALL_BYTES))


def main() -> int:
    try:
        asked = json.load(sys.stdin)
        request, token = CheckpointRequest(**asked["source"]), asked.get("token")
        # The caller's environment has been asked for a token already.
        print(json.dumps(convert(request, token or False, Path(asked["out"]))))
    except Exception as error:
        ours = InvalidRequestError(f"can't write to {asked['out']}: {error}") if isinstance(error, OSError) else error
        ours = to_error(ours)
        if isinstance(ours, InternalError):
            import traceback

            traceback.print_exc()
        print(json.dumps({"error": type(ours).__name__, "message": str(ours)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
