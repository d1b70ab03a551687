"""Headers against the safetensors library: what it writes is read the same, what it refuses is refused."""

from __future__ import annotations

import json
import math
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardlift.proto.v1.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from shardlift.worker.headers import MAX_HEADER_BYTES, header_length, parse_header
from shardlift.worker.records import DTYPES, TensorRecord

FILE = "model-00001-of-00002.safetensors"


def parse_file(content: bytes) -> tuple[dict[str, TensorRecord], dict[str, str]]:
    """As a loader does it: the length, then the header."""
    length = header_length(content[:8], len(content), FILE)
    return parse_header(content[8 : 8 + length], file=FILE, file_bytes=len(content))


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- by example ------------------------------------------------------------------------------------------------------


def test_offsets_count_from_the_beginning_of_the_file() -> None:
    header = json.dumps({"b": entry("BF16", [2, 1], [4, 8]), "a": entry("U8", [4], [0, 4])}).encode()
    records, metadata = parse_file(file_of(header, bytes(8)))
    start = 8 + len(header)
    assert list(records.values()) == [
        TensorRecord(key="a", file=FILE, dtype="U8", shape=(4,), start=start, end=start + 4),
        TensorRecord(key="b", file=FILE, dtype="BF16", shape=(2, 1), start=start + 4, end=start + 8),
    ]
    assert metadata == {}


def test_metadata_is_no_tensor() -> None:
    assert parse_file(file_of(b'{"__metadata__": {"format": "pt"}}')) == ({}, {"format": "pt"})


def test_tensors_without_elements_lie_anywhere_between_others() -> None:
    names = {"a": entry(offsets=[0, 4]), "z": entry("F32", [0, 3], [4, 4]), "b": entry(offsets=[4, 8])}
    records, _ = parse_file(file_of(json.dumps(names).encode(), bytes(8)))
    assert records["z"].size_bytes == 0
    assert list(records) == ["a", "z", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x02\0\0", "truncated: it has 3 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated: file has 10 bytes, header needs 108"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "claims 100000001 bytes, more than the 100000000 allowed"),
        (b"version https://git-lfs.github.com/spec/v1", "not safetensors?"),
        (file_of(b"{"), "not valid JSON"),
        (file_of(b""), "not valid JSON"),
        (file_of(b"{}\0"), "not valid JSON"),
        (file_of(b'{"\xff": 1}'), "not valid JSON: 'utf-8' codec can't decode"),
        (file_of(b'{"\\ud800": 1}'), "surrogates not allowed"),
        (file_of(b'{"a": {"dtype": NaN}}'), "NaN is not JSON"),
        (file_of(b"[" * 100_000), "not valid JSON"),
        (file_of(b"[]"), "is a JSON list, not an object"),
        (file_of(b'{"a": 1, "b": 2, "a": 3}'), "holds 'a' twice"),
        (file_of(b'{"a": {"dtype": "U8", "dtype": "U8"}}'), "holds 'dtype' twice"),
    ],
)
def test_a_bad_header_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_file(content)
    assert str(caught.value).startswith(f"{FILE}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, "must have exactly dtype, shape and data_offsets, not None"),
        ({"dtype": "U8", "shape": [4]}, "must have exactly"),
        (entry() | {"crc": 1}, "must have exactly"),
        (entry("F31"), "unknown dtype 'F31'; known are BOOL, U8"),
        (entry(8), "unknown dtype 8"),
        (entry({}), "unknown dtype {}"),
        (entry(shape=4), "shape must be a list of integers from 0 to 2^63-1, not 4"),
        (entry(shape=[-4]), "not [-4]"),
        (entry(shape=[4.0]), "not [4.0]"),
        (entry(shape=[4, True]), "not [4, True]"),
        (entry(shape=[2**63]), "not [9223372036854775808]"),
        (entry(shape=[10**30]), "not [1e+30]"),
        (entry(shape=[2**40, 2**40]), "has more than 2^63-1 bytes"),
        (entry(shape=[2**40, 2**40, 0], offsets=[0, 0]), "has more than 2^63-1 bytes"),
        (entry(offsets=[0]), "data_offsets must be two integers"),
        (entry(offsets=[0, 4, 4]), "data_offsets must be two integers"),
        (entry(offsets=[0, 4.0]), "data_offsets must be two integers"),
        (entry(offsets=[False, 4]), "data_offsets must be two integers"),
        (entry(offsets=[-4, 0]), "data_offsets must be two integers"),
        (entry(offsets=[4, 0]), "data_offsets begin at 4, after their end 0"),
        (entry("F16"), "data_offsets [0, 4] hold 4 bytes, F16 [4] takes 8"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(bad: object, says: str) -> None:
    header = json.dumps({"model.norm.weight": bad}).encode()
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_file(file_of(header, bytes(4)))
    assert str(caught.value).startswith(f"{FILE}: tensor 'model.norm.weight': ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "data_bytes", "says"),
    [
        ({"a": (0, 4), "b": (2, 6)}, 6, "tensor 'b': begins at byte {+2}, inside 'a', which ends at {+4}"),
        ({"a": (0, 4), "b": (0, 4)}, 4, "inside 'a', which ends at {+4}"),
        ({"a": (0, 4), "b": (1, 1)}, 4, "inside 'a'"),
        ({"a": (0, 4), "b": (6, 8)}, 8, "tensor 'b': bytes {+4} to {+6} before it belong to no tensor"),
        ({"a": (1, 4)}, 4, "tensor 'a': bytes {+0} to {+1} before it belong to no tensor"),
        ({"a": (0, 4)}, 3, "truncated: file has {+3} bytes, header needs {+4}"),
        ({"a": (0, 4)}, 7, "3 bytes of garbage after the last tensor's end at {+4}"),
        ({}, 1, "1 bytes of garbage after the last tensor's end at {+0}"),
    ],
)
def test_the_tensors_cover_the_file(tensors: dict[str, tuple[int, int]], data_bytes: int, says: str) -> None:
    header = json.dumps(
        {key: entry(shape=[end - begin], offsets=(begin, end)) for key, (begin, end) in tensors.items()}
    )
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_file(file_of(header.encode(), bytes(data_bytes)))
    for relative in range(9):
        says = says.replace(f"{{+{relative}}}", str(8 + len(header) + relative))
    assert says in str(caught.value)


def test_a_dtype_that_safetensors_has_and_shardlift_lacks_is_no_corruption() -> None:
    header = json.dumps({"a": entry("F8_E8M0")}).encode()
    assert safetensors.deserialize(file_of(header, bytes(4)))
    with pytest.raises(UnsupportedModelError, match="'a' has dtype F8_E8M0"):
        parse_file(file_of(header, bytes(4)))


def test_a_hostile_name_stays_one_short_line() -> None:
    header = json.dumps({"a\n\x1b[31m" * 1000: None}).encode()
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_file(file_of(header))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# ---- against safetensors ---------------------------------------------------------------------------------------------

_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file as safetensors writes it."""
    tensors: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(_NAMES, unique=True, max_size=6)):
        dtype, bits = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = math.prod(shape) * bits // 8
        data = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        tensors[name] = data.view(getattr(torch, dtype)).reshape(shape)
    # Not {}: of empty metadata and no tensors safetensors 0.8 writes a file that it can't read itself.
    metadata = draw(st.none() | st.dictionaries(_NAMES, _NAMES, min_size=1, max_size=3))
    return safetensors.torch.save(tensors, metadata)


def agree(content: bytes) -> None:
    """Both read the same, or we refuse: never the other way round, and never with an error of another kind."""
    try:
        expected = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError):
            parse_file(content)
        return
    try:
        records, _ = parse_file(content)
    except CheckpointError:
        return
    found = {
        key: {"dtype": record.dtype, "shape": list(record.shape), "data": content[record.start : record.end]}
        for key, record in records.items()
    }
    assert found == {name: {**tensor, "data": bytes(tensor["data"])} for name, tensor in expected}


@settings(deadline=None, max_examples=150)
@given(files())
def test_what_safetensors_writes_is_read_the_same(content: bytes) -> None:
    parse_file(content)  # not refused
    agree(content)


@settings(deadline=None, max_examples=300)
@given(files(), st.data())
def test_what_safetensors_refuses_is_refused_bytewise(content: bytes, data: st.DataObject) -> None:
    """A few bytes of the file replaced, its header's length kept right or not."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        end = min(start + data.draw(st.integers(0, 3)), len(changed))
        changed[start:end] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"1", b"-", b",", b'"', b"[", b"e"])
        )
    if data.draw(st.booleans()):
        changed[:8] = content[:8]
    agree(bytes(changed))


_NUMBERS = st.integers(-2, 9) | st.sampled_from(
    [2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 0.0, 1.5, True, None]
)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "u8", ""]) | _NUMBERS,
        "shape": st.lists(_NUMBERS, max_size=3) | _NUMBERS,
        "data_offsets": st.lists(_NUMBERS, min_size=1, max_size=3) | _NUMBERS,
    },
    optional={"more": st.recursive(_NUMBERS, st.lists, max_leaves=4)},
)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.sampled_from("abc") | st.just("__metadata__"), _ENTRIES | _NUMBERS, max_size=3),
    st.integers(0, 9),
)
@example({"a": entry("U8", [2**63, 2, 0], [0, 0])}, 0)
@example({"a": entry("F64", [2**61], [0, 0])}, 0)
@example({"__metadata__": None}, 0)
@example({"__metadata__": {"a": 1}}, 0)
def test_what_safetensors_refuses_is_refused_by_structure(header: dict[str, object], data_bytes: int) -> None:
    agree(file_of(json.dumps(header).encode(), bytes(data_bytes)))


@pytest.mark.parametrize("text", ["-0", "00", "1e0", "+1", "0x1", "1_0", " 1 ", "1" + "0" * 5000, "Infinity"])
def test_numbers_are_spelt_as_in_json(text: str) -> None:
    header = '{"a": {"dtype": "U8", "shape": [NUMBER], "data_offsets": [0, NUMBER]}}'.replace("NUMBER", text)
    agree(file_of(header.encode(), b"\0"))
