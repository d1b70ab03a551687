"""A stage's weights as a file: safetensors, with a checksum for every block, so that decay is noticed before it counts.

Written by whoever has quantized a part, read by whoever needs the same part again: never from a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ..proto.v1.errors import CorruptCheckpointError, LoadCancelledError, UnsupportedModelError
from .headers import LENGTH_BYTES, header_length, parse_header
from .records import DTYPES, FileVersion, TensorRecord
from .sources import Cancel

if TYPE_CHECKING:
    import torch

FORMAT = "1"
BLOCK_BYTES = 1 << 20

_DIGEST_DIGITS = 16  # of a 64-bit hash
_TAGS = {name: tag for tag, (name, _) in DTYPES.items()}
_COPY_BYTES = 64 << 20


def write_part(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any], cancel: Cancel) -> int:
    """Writes `tensors` and `about` (JSON) to `path`; gives the file's size. Holds 64 MiB beyond the tensors.

    Raises OSError, and LoadCancelledError when `cancel` is set meanwhile.
    """
    entries: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        tag = _TAGS[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": tag, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    blocks = -(-position // BLOCK_BYTES)
    # The checksums come last, and stand first: their place is kept.
    header = _header(entries, about, "0" * (blocks * _DIGEST_DIGITS))
    digests: list[str] = []
    with path.open("r+b" if path.exists() else "wb") as file:  # its room may have been taken already
        file.write(header)
        hasher, filled = xxhash.xxh3_64(), 0
        for piece in _pieces(tensors):
            if cancel.is_set:
                raise LoadCancelledError(f"writing {path.name} was cancelled")
            file.write(piece)
            hashed = 0
            while hashed < len(piece):
                taken = piece[hashed : hashed + BLOCK_BYTES - filled]
                hasher.update(taken)
                filled, hashed = filled + len(taken), hashed + len(taken)
                if filled == BLOCK_BYTES:
                    digests.append(hasher.hexdigest())
                    hasher, filled = xxhash.xxh3_64(), 0
        if filled:
            digests.append(hasher.hexdigest())
        file.truncate()
        file.seek(0)
        file.write(_header(entries, about, "".join(digests)))
    return len(header) + position


def _header(entries: Mapping[str, Any], about: Mapping[str, Any], digests: str) -> bytes:
    metadata = {"format": FORMAT, "about": json.dumps(about), "blocks": digests}
    metadata["table"] = _table_digest(entries, metadata)
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does, so that data begins aligned
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _table_digest(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Of all that the header says but this."""
    said = [entries, metadata["format"], metadata["about"], metadata["blocks"]]
    return xxhash.xxh3_64(json.dumps(said, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    import torch  # who only lists parts needs none

    for tensor in tensors.values():
        if not tensor.numel():
            continue
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(_COPY_BYTES):
            yield piece.cpu().numpy().data


class PartFile:
    """An open part, a `Source` of its one file: what is read is checked, block by block.

    Open as long as it is used: what the cache removes meanwhile stays readable.

    Raises:
        CorruptCheckpointError: it is no sound part.
        OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size_bytes = os.fstat(self._descriptor).st_size
            length = header_length(os.pread(self._descriptor, LENGTH_BYTES, 0), self.size_bytes, path.name)
            header = os.pread(self._descriptor, length, LENGTH_BYTES)
            self.records, self.about, self._digests = _read_header(header, path.name, self.size_bytes)
            self._data_start = LENGTH_BYTES + length
        except BaseException:
            self.close()
            raise

    @property
    def link(self) -> str:
        return "this node's cache"

    @property
    def version(self) -> FileVersion:
        return FileVersion(size_bytes=self.size_bytes, etag=FORMAT)

    def stat(self, file: str) -> FileVersion:
        return self.version

    def verify(self, file: str, version: FileVersion) -> None:
        """Every read is checked already."""

    def read_into(
        self, file: str, start: int, buffer: memoryview, version: FileVersion, cancel: Cancel | None = None
    ) -> None:
        end = start + len(buffer)
        self._fill(start, buffer)
        first = (start - self._data_start) // BLOCK_BYTES
        last = -(-(end - self._data_start) // BLOCK_BYTES)
        for block in range(first, last):
            if cancel is not None:
                cancel.check(self.path.name)
            block_start = self._data_start + block * BLOCK_BYTES
            block_end = min(block_start + BLOCK_BYTES, self.size_bytes)
            hasher = xxhash.xxh3_64()
            # A block that reaches beyond what was asked for is checked whole: the rest is read for that alone.
            if block_start < start:
                hasher.update(self._read(block_start, start))
            hasher.update(buffer[max(block_start, start) - start : min(block_end, end) - start])
            if block_end > end:
                hasher.update(self._read(end, block_end))
            if hasher.hexdigest() != self._digests[block]:
                raise CorruptCheckpointError(f"{self.path.name}: block {block} differs from what was written")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        self._fill(start, memoryview(data))
        return data

    def _fill(self, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise CorruptCheckpointError(f"{self.path.name} can't be read: {error.strerror}") from None
            if not count:
                raise CorruptCheckpointError(f"{self.path.name} ends at byte {start + done}: it was cut short")
            done += count


def _read_header(
    header: bytes, name: str, size_bytes: int
) -> tuple[dict[str, TensorRecord], dict[str, Any], tuple[str, ...]]:
    try:
        records, metadata = parse_header(header, file=name, file_bytes=size_bytes)
    except UnsupportedModelError as error:
        raise CorruptCheckpointError(str(error)) from None
    if metadata.get("format") != FORMAT or not {"about", "blocks", "table"} <= metadata.keys():
        raise CorruptCheckpointError(f"{name}: not a part of format {FORMAT}")
    start = LENGTH_BYTES + len(header)
    entries = {
        key: {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": [record.start - start, record.end - start],
        }
        for key, record in records.items()
    }
    if metadata["table"] != _table_digest(entries, metadata):
        raise CorruptCheckpointError(f"{name}: its header differs from what was written")
    joined = metadata["blocks"]
    digests = tuple(joined[at : at + _DIGEST_DIGITS] for at in range(0, len(joined), _DIGEST_DIGITS))
    if len(digests) != -(-(size_bytes - start) // BLOCK_BYTES):
        raise CorruptCheckpointError(f"{name}: has {len(digests)} checksums for {size_bytes - start} bytes")
    return records, json.loads(metadata["about"]), digests
