"""The frames of a Step stream: whatever bytes come, steps come out or the stream ends with INVALID_ARGUMENT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlift.proto.v1 import stage_pb2
from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.proto.v1.frames import bytes_message
from shardlift.proto.v1.tensor_pb2 import Tensor
from shardlift.proto.v1.wire import FRAME_BYTES
from shardlift.worker.links import StepKey, _frames
from shardlift.worker.pipeline import IncomingStep, _message
from shardlift.worker.stage import StepInput
from shardlift.worker.step_frames import StepFrames, read_frame
from shardlift.worker.tensors import to_frames, to_message

WIDTH = 4
MORE = stage_pb2.StepRequest.MORE_FIELD_NUMBER


def frames_of(is_first: bool = False) -> StepFrames:
    return StepFrames(takes_ids=is_first, width=WIDTH)


def step(hidden: torch.Tensor, **fields: Any) -> stage_pb2.Step:
    head, _ = to_frames(hidden)
    positions = to_message(torch.arange(hidden.shape[1], dtype=torch.int32)[None])
    return stage_pb2.Step(key=stage_pb2.StepKey(session="s"), input=head, position_ids=positions, **fields)


def read(frames: StepFrames, *messages: stage_pb2.StepRequest | bytes) -> list[IncomingStep]:
    """The steps of serialized frames."""
    steps: list[IncomingStep] = []
    for message in messages:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        came = frames.add(read_frame(data))
        assert not isinstance(came, str)
        steps += came
    return steps


def test_a_step_in_pieces_comes_out_as_it_went_in() -> None:
    hidden = torch.randn(2, 90_000, WIDTH)
    head, rest = to_frames(hidden)
    assert not head.data
    pieces = [bytes_message(MORE, frame) for frame in rest]
    assert len(pieces) > 1
    [came] = read(frames_of(), stage_pb2.StepRequest(step=step(hidden)), *pieces)
    assert torch.equal(came.input.input, hidden)


def test_masks_and_positions_come_in_pieces_too() -> None:
    hidden = torch.randn(3, 400_000, WIDTH)
    mask, positions = torch.rand(3, 500_000) > 0.5, torch.randint(0, 1000, (3, 400_000), dtype=torch.int32)
    whole = StepInput(input=hidden, attention_mask=mask, position_ids=positions)
    sent = _message(IncomingStep(key=StepKey("s", 0, 0), input=whole), hidden)
    frames = list(_frames([(StepKey("s", 0, 0), *sent)]))
    assert max(len(each) if isinstance(each, bytes) else each.ByteSize() for each in frames) < 2 * FRAME_BYTES
    [came] = read(frames_of(), *frames)
    assert torch.equal(came.input.input, hidden)
    assert came.input.attention_mask is not None
    assert torch.equal(came.input.attention_mask, mask)
    assert torch.equal(came.input.position_ids, positions.long())


GOOD = step(torch.ones(1, 2, WIDTH))


def changed(**fields: Any) -> stage_pb2.StepRequest:
    message = stage_pb2.Step()
    message.CopyFrom(GOOD)
    for name, value in fields.items():
        getattr(message, name).CopyFrom(value)
    return stage_pb2.StepRequest(step=message)


def floats(*shape: int, data: int | None = None, dtype: str = "float32") -> Tensor:
    size = 4
    for extent in shape:
        size *= max(extent, 0)
    return Tensor(shape=shape, dtype=dtype, data=bytes(size if data is None else data))


NINE = Tensor(shape=[1, 9], dtype="int32", data=bytes(36))
BEGUN = stage_pb2.StepRequest(
    step=stage_pb2.Step(input=Tensor(shape=[1, 9, WIDTH], dtype="float32"), position_ids=NINE)
)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([bytes_message(MORE, b"x")], "belong to no step"),
        ([BEGUN, BEGUN], "began before the one before it was whole"),
        ([BEGUN, bytes_message(MORE, bytes(145))], "144 bytes, but at least 145 were sent"),
        ([BEGUN, bytes_message(MORE, b"")], "a frame of no bytes"),
        ([b""], "empty, or of a kind"),
        ([b"\x7a\x01x"], "empty, or of a kind"),
        ([changed(input=floats(1, 2))], r"float32 \[1, 2\]; this stage takes hidden states \[rows, length, 4\]"),
        ([changed(input=floats(1, 2, WIDTH + 1))], r"\[1, 2, 5\]"),
        ([changed(input=floats(1, -2, WIDTH))], r"\[1, -2, 4\]"),
        ([changed(input=floats(1, 0, WIDTH))], r"\[1, 0, 4\]"),
        ([changed(input=Tensor(shape=[1 << 40, 1 << 40, WIDTH], dtype="float32"))], "over the limit"),
        ([changed(input=Tensor(shape=[1] * 9, dtype="float32"))], r"\[1, 1, 1, 1, 1, 1, 1, 1\]"),
        ([changed(input=floats(1, 2, WIDTH, dtype="int64"))], "int64"),
        ([changed(input=floats(1, 2, WIDTH, dtype="nothing"))], "nothing"),
        ([changed(input=floats(5000, 1, WIDTH))], "5000 rows, over the limit of 4096"),
        ([changed(position_ids=Tensor())], "position_ids must be a non-empty integer"),
        (
            [changed(position_ids=Tensor(shape=[1, 3], dtype="int32", data=bytes(12)))],
            r"position_ids of shape \[1, 3\]",
        ),
        (
            [changed(position_ids=Tensor(shape=[3, 2], dtype="int32", data=bytes(24)))],
            r"position_ids of shape \[3, 2\]",
        ),
        ([changed(position_ids=floats(1, 2))], "position_ids must be a non-empty integer"),
        ([changed(attention_mask=Tensor(shape=[2, 2], dtype="bool", data=bytes(4)))], "attention_mask of shape"),
        ([changed(attention_mask=Tensor(shape=[1, 1], dtype="bool", data=bytes(1)))], "attention_mask of shape"),
        ([changed(attention_mask=Tensor(shape=[1, 4], dtype="bool", data=bytes(3))), BEGUN], "began before the one"),
        ([changed(attention_mask=Tensor(shape=[1, 4], dtype="bool", data=bytes(5)))], "has 4 bytes, but at least 5"),
        ([changed(attention_mask=Tensor(shape=[1, 1 << 29], dtype="bool"))], "over the limit of 268,435,456"),
        ([stage_pb2.StepRequest(group=stage_pb2.StepGroup())], "this stage takes"),
        ([stage_pb2.StepRequest(group=stage_pb2.StepGroup(input=floats(1, 1, WIDTH)))], r"\[\] rows"),
        (
            [stage_pb2.StepRequest(group=stage_pb2.StepGroup(input=floats(2, 1, WIDTH), steps=[GOOD]))],
            r"\[2, 1, 4\] whose steps have \[1\] rows",
        ),
        (
            [stage_pb2.StepRequest(group=stage_pb2.StepGroup(input=floats(1, 1, WIDTH), steps=[GOOD] * 300))],
            "300 steps; at most 256",
        ),
    ],
)
def test_each_defect_has_its_word(messages: list[stage_pb2.StepRequest | bytes], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        read(frames_of(), *messages)


def test_a_session_ends_between_others_pieces() -> None:
    frames = frames_of()
    assert read(frames, BEGUN) == []
    end = stage_pb2.StepRequest(end=stage_pb2.SessionEnd(session="other"))
    assert frames.add(read_frame(end.SerializeToString())) == "other"
    assert frames.add(memoryview(bytes(100))) == []


# ---- by the thousand -------------------------------------------------------------------------------------------------

extents = st.one_of(st.integers(-2, 6), st.sampled_from([1 << 31, 1 << 62, -(1 << 63)]))
tensors = st.builds(
    Tensor,
    shape=st.lists(extents, max_size=4),
    dtype=st.sampled_from(["float32", "int64", "int32", "bool", "", "object"]),
    data=st.binary(max_size=64),
)
keys = st.builds(stage_pb2.StepKey, session=st.text(max_size=3), epoch=st.integers(0, 3), number=st.integers(0, 3))
steps = st.builds(
    stage_pb2.Step,
    key=keys,
    input=tensors,
    attention_mask=st.none() | tensors,
    position_ids=st.none() | tensors,
    rows=st.lists(st.integers(0, 1 << 31), max_size=3),
)
requests = st.one_of(
    st.builds(stage_pb2.StepRequest, step=steps),
    st.builds(stage_pb2.StepRequest, more=st.binary(max_size=64)),
    st.builds(
        lambda group: stage_pb2.StepRequest(group=group),
        st.builds(stage_pb2.StepGroup, steps=st.lists(steps, max_size=3), input=tensors),
    ),
    st.builds(lambda name: stage_pb2.StepRequest(end=stage_pb2.SessionEnd(session=name)), st.text(max_size=3)),
    st.just(stage_pb2.StepRequest()),
)


def feed(messages: list[bytes], is_first: bool) -> None:
    """What a stream's reader does with these, to the first refusal. Anything but a refusal or a step fails."""
    frames = frames_of(is_first)
    for message in messages:
        try:
            came = frames.add(read_frame(message))
        except (InvalidRequestError, DecodeError):
            return
        assert isinstance(came, (list, str))
        for one in came if isinstance(came, list) else []:
            inputs, positions = one.input.input, one.input.position_ids
            assert inputs.ndim == (2 if is_first else 3)
            assert positions.shape[-1] == inputs.shape[1]
            assert is_first or inputs.shape[2] == WIDTH


@settings(max_examples=120, deadline=None)
@given(st.lists(requests.map(lambda request: request.SerializeToString()), max_size=6), st.booleans())
def test_any_frames_in_any_order(messages: list[bytes], is_first: bool) -> None:
    feed(messages, is_first)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4), st.booleans())
def test_any_bytes(messages: list[bytes], is_first: bool) -> None:
    feed(messages, is_first)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_frame_with_a_few_bytes_wrong(data: st.DataObject) -> None:
    whole = bytearray(stage_pb2.StepRequest(step=GOOD).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    feed([bytes(whole[:end]), bytes_message(MORE, bytes(8))], is_first=False)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_bytes_are_told_from_messages_as_protobuf_tells_them(message: bytes) -> None:
    """The shortcut takes nothing that protobuf would refuse, and no other bytes than it."""
    for start in (b"", bytes([MORE << 3 | 2])):
        came: Any = None
        try:
            came = read_frame(start + message)
            expected = stage_pb2.StepRequest.FromString(start + message)
        except DecodeError:
            assert not isinstance(came, memoryview)
            continue
        if isinstance(came, memoryview):
            assert bytes(came) == expected.more
            assert expected.WhichOneof("frame") == "more"
