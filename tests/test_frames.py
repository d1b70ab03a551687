"""Frames made without protobuf are what protobuf makes, and reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardlift.proto.v1 import stage_pb2
from shardlift.proto.v1.frames import bytes_message, only_bytes

MORE = stage_pb2.StepRequest.MORE_FIELD_NUMBER


@given(st.binary(max_size=300) | st.integers(0, 70_000).map(bytes))
def test_they_are_protobufs(data: bytes) -> None:
    ours = bytes_message(MORE, memoryview(data))
    assert ours == stage_pb2.StepRequest(more=data).SerializeToString()
    assert only_bytes(MORE, ours) == data


@given(st.binary(max_size=40))
def test_anything_else_is_left_to_protobuf(message: bytes) -> None:
    found = only_bytes(MORE, message)
    if found is not None:
        assert stage_pb2.StepRequest.FromString(message).more == bytes(found)


def test_other_messages_are_not_taken_for_bytes() -> None:
    for other in (
        stage_pb2.StepRequest(end=stage_pb2.SessionEnd(session="more")),
        stage_pb2.StepRequest(),
        stage_pb2.StepRequest(step=stage_pb2.Step(use_cache=True)),
    ):
        assert only_bytes(MORE, other.SerializeToString()) is None
