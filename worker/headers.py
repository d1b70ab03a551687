"""A safetensors file's header, read as if an enemy had written it. Pure.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, little-endian, give the header's length; the
header is a JSON object, tensor name -> {dtype, shape, data_offsets}, and "__metadata__" -> {str: str}; the rest is the
buffer, which the tensors cover whole, without holes or overlaps. What safetensors refuses is refused here too, and
more: an entry's unknown fields, a name given twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

from ..proto.v1.errors import CorruptCheckpointError, UnsupportedModelError
from .records import DTYPES, TensorRecord

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
LENGTH_BYTES = 8

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_INTEGER = 2**63 - 1
_MAX_DIGITS = 20  # of a 64-bit integer
# Tags that safetensors knows and shardlift can't use: such a file is sound.
_UNREAD_DTYPES = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


def header_length(first8: bytes, file_bytes: int, file: str) -> int:
    """The header's length in bytes, from the file's first 8 bytes.

    Raises:
        CorruptCheckpointError: the file is too short, or the length exceeds the file or `MAX_HEADER_BYTES`.
    """
    if len(first8) != LENGTH_BYTES:
        _refuse(file, f"truncated: it has {file_bytes} bytes, and a header's length alone takes {LENGTH_BYTES}")
    length = int.from_bytes(first8, "little")
    if length > MAX_HEADER_BYTES:
        _refuse(file, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed: not safetensors?")
    if LENGTH_BYTES + length > file_bytes:
        _refuse(file, f"truncated: file has {file_bytes} bytes, header needs {LENGTH_BYTES + length}")
    return length


def parse_header(header: bytes, *, file: str, file_bytes: int) -> tuple[dict[str, TensorRecord], dict[str, str]]:
    """The tensors of `file` by name, in order of their bytes, and the file's metadata.

    `header` is what follows the 8 bytes of its length; `file_bytes` the whole file's size. The records' bytes count
    from the beginning of the file.

    Raises:
        CorruptCheckpointError: one line that names the file, the tensor and the first defect found.
        UnsupportedModelError: a sound entry of a dtype that shardlift can't use.
    """
    entries = _decode(header, file)
    metadata = _parse_metadata(entries.pop(_METADATA, None), file)
    data_start = LENGTH_BYTES + len(header)
    records = [_parse_entry(key, entry, file, data_start) for key, entry in entries.items()]
    records.sort(key=lambda record: (record.start, record.end))
    _check_layout(records, file, data_start, file_bytes)
    return {record.key: record for record in records}, metadata


# ---- JSON ------------------------------------------------------------------------------------------------------------


class _DuplicateNameError(Exception):
    """`json` offers no other way out of its hook."""


def _decode(header: bytes, file: str) -> dict[str, Any]:
    try:
        decoded = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_not_json,
        )
    except _DuplicateNameError as error:
        _refuse(file, f"its header holds {error} twice")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse(file, f"its header is not valid JSON: {_short(str(error))}")
    if not isinstance(decoded, dict):
        _refuse(file, f"its header is a JSON {type(decoded).__name__}, not an object")
    return decoded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateNameError(_quote(next(key for key, _ in pairs if key in seen or seen.add(key))))  # type: ignore[func-returns-value]
    for text in (*members, *members.values()):
        if isinstance(text, str) and not text.isascii():
            text.encode("utf-8")  # a lone surrogate, from a \ud800, is a UnicodeEncodeError: a ValueError
    return members


def _integer(digits: str) -> int | float:
    """What can't be a 64-bit integer becomes a float, which every check refuses by its type. -0 too, as in serde."""
    return float(digits) if len(digits) > _MAX_DIGITS or digits == "-0" else int(digits)


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# ---- entries ---------------------------------------------------------------------------------------------------------


def _parse_metadata(metadata: object, file: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, f"its {_METADATA} is not an object of strings: {_quote(metadata)}")
    return metadata


def _parse_entry(key: str, entry: object, file: str, data_start: int) -> TensorRecord:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        _refuse(file, f"must have exactly dtype, shape and data_offsets, not {_quote(entry)}", key)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in _UNREAD_DTYPES:
            raise UnsupportedModelError(
                f"{file}: tensor {_quote(key)} has dtype {dtype}, which shardlift can't load yet"
            )
        _refuse(file, f"unknown dtype {_quote(dtype)}; known are {', '.join(DTYPES)}", key)
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        _refuse(file, f"shape must be a list of integers from 0 to 2^63-1, not {_quote(shape)}", key)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _refuse(file, f"data_offsets must be two integers from 0 to 2^63-1, not {_quote(offsets)}", key)
    begin, end = offsets
    if begin > end:
        _refuse(file, f"data_offsets begin at {begin}, after their end {end}", key)
    wanted = _size_bytes(shape, DTYPES[dtype][1])
    if wanted is None:
        _refuse(file, f"shape {_quote(shape)} has more than 2^63-1 bytes", key)
    if end - begin != wanted:
        _refuse(
            file, f"data_offsets [{begin}, {end}] hold {end - begin} bytes, {dtype} {_quote(shape)} takes {wanted}", key
        )
    return TensorRecord(
        key=key, file=file, dtype=dtype, shape=tuple(shape), start=data_start + begin, end=data_start + end
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER  # not isinstance: a bool is an int


def _size_bytes(shape: Iterable[int], bits: int) -> int | None:
    """None when a factor on the way is beyond 63 bits, even if a zero follows: others compute it in that order."""
    size, is_empty = bits // 8, False
    for dimension in shape:
        is_empty = is_empty or dimension == 0
        size *= max(dimension, 1)
        if size > _MAX_INTEGER:
            return None
    return 0 if is_empty else size


def _check_layout(records: list[TensorRecord], file: str, data_start: int, file_bytes: int) -> None:
    """The sorted records cover the file from `data_start` to its end: no hole, no overlap, nothing missing or left."""
    position, previous = data_start, "the header"
    for record in records:
        if record.start > position:
            _refuse(file, f"bytes {position} to {record.start} before it belong to no tensor", record.key)
        if record.start < position:
            _refuse(file, f"begins at byte {record.start}, inside {previous}, which ends at {position}", record.key)
        position, previous = record.end, _quote(record.key)
    if position > file_bytes:
        _refuse(file, f"truncated: file has {file_bytes} bytes, header needs {position}; download it again")
    if position < file_bytes:
        _refuse(file, f"{file_bytes - position} bytes of garbage after the last tensor's end at {position}")


# ---- refusals --------------------------------------------------------------------------------------------------------


def _refuse(file: str, defect: str, key: str | None = None) -> NoReturn:
    raise CorruptCheckpointError(f"{file}: {defect}" if key is None else f"{file}: tensor {_quote(key)}: {defect}")


def _quote(value: object) -> str:
    return _short(ascii(value))


def _short(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
