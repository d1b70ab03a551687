"""Frames of a Step stream, put together to steps. What comes is taken for hostile: each defect ends the one stream."""

from __future__ import annotations

import torch

from ..proto.v1 import stage_pb2
from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.frames import only_bytes
from ..proto.v1.limits import MOST_ADAPTERS, MOST_NAME_CHARACTERS, MOST_ROWS
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import Assembly
from .links import MOST_GROUPED, StepKey
from .pipeline import IncomingStep
from .stage import StepInput
from .tensors import from_bytes, from_message

_INTEGERS = frozenset({"int32", "int64"})
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def read_frame(message: bytes) -> stage_pb2.StepRequest | memoryview:
    """A frame, or a tensor's later bytes, not copied. Raises protobuf's DecodeError."""
    more = only_bytes(stage_pb2.StepRequest.MORE_FIELD_NUMBER, message)
    return stage_pb2.StepRequest.FromString(message) if more is None else more


class StepFrames:
    """The state of one stream. `add` raises InvalidRequestError, after which the stream is over.

    takes_ids: whether steps bring token ids [B, T], or hidden states [B, T, width]; width: None where it isn't known.
    """

    def __init__(self, *, takes_ids: bool, width: int | None) -> None:
        self._takes_ids = takes_ids
        self._width = width
        self._head: stage_pb2.Step | None = None
        self._assembly: Assembly | None = None

    def add(self, frame: stage_pb2.StepRequest | memoryview) -> list[IncomingStep] | str:
        """The steps that are whole with this frame; or the name of the session that it ends."""
        if isinstance(frame, memoryview):
            return self._add_bytes(frame)
        match frame.WhichOneof("frame"):
            case "more":
                return self._add_bytes(frame.more)
            case "end":
                return frame.end.session
            case None:
                raise InvalidRequestError("a frame that is empty, or of a kind that this version doesn't know")
            case kind:
                if self._assembly is not None:
                    raise InvalidRequestError("a step began before the one before it was whole")
                return self._apart(frame.group) if kind == "group" else self._begin(frame.step)

    def _add_bytes(self, more: bytes | memoryview) -> list[IncomingStep]:
        if self._assembly is None:
            raise InvalidRequestError("tensor bytes that belong to no step")
        if not len(more):
            raise InvalidRequestError("a frame of no bytes in the middle of a tensor")
        self._assembly.add(more)
        return self._whole()

    def _begin(self, step: stage_pb2.Step) -> list[IncomingStep]:
        self._check_input(list(step.input.shape), step.input.dtype)
        self._head, self._assembly = step, Assembly(step.input)
        return self._whole()

    def _whole(self) -> list[IncomingStep]:
        head, assembly = self._head, self._assembly
        assert head is not None
        assert assembly is not None
        if not assembly.complete:
            return []
        self._head = self._assembly = None
        return [_incoming(head, from_bytes(assembly.shape, assembly.dtype, assembly.data))]

    def _apart(self, group: stage_pb2.StepGroup) -> list[IncomingStep]:
        """A group's steps. Raises InvalidRequestError where their rows are not those of the input."""
        if len(group.steps) > MOST_GROUPED:
            raise InvalidRequestError(f"a group of {len(group.steps)} steps; at most {MOST_GROUPED} go together")
        self._check_input(list(group.input.shape), group.input.dtype)
        rows = [step.input.shape[0] if step.input.shape else 0 for step in group.steps]
        if not rows or min(rows) < 1 or sum(rows) != group.input.shape[0] or group.input.shape[1] != 1:
            raise InvalidRequestError(f"a group of shape {list(group.input.shape)} whose steps have {rows} rows")
        whole = from_message(group.input)
        return [_incoming(step, part) for step, part in zip(group.steps, whole.split(rows), strict=True)]

    def _check_input(self, shape: list[int], dtype: str) -> None:
        """Before anything is allocated for it. What another shape does to a batch, others in it would feel, too."""
        rank = 2 if self._takes_ids else 3
        right = len(shape) == rank and min(shape) > 0 and dtype in (_INTEGERS if self._takes_ids else _FLOATS)
        if not right or (not self._takes_ids and self._width not in (None, shape[2])):
            wanted = "token ids [rows, length]" if self._takes_ids else f"hidden states [rows, length, {self._width}]"
            raise InvalidRequestError(f"a step's input is {dtype[:20]} {shape[:8]}; this stage takes {wanted}")
        if shape[0] > MOST_ROWS:
            raise InvalidRequestError(f"a step of {shape[0]} rows, over the limit of {MOST_ROWS}")


def _incoming(head: stage_pb2.Step, tensor: torch.Tensor) -> IncomingStep:
    if len(head.key.session) > MOST_NAME_CHARACTERS:
        raise InvalidRequestError(f"a session's name has {len(head.key.session)} characters")
    if len(head.adapters) > MOST_ADAPTERS:
        raise InvalidRequestError(f"a step by {len(head.adapters)} adapters; at most {MOST_ADAPTERS} compute together")
    if len(head.rows) > MOST_ROWS:
        raise InvalidRequestError(f"a step that keeps {len(head.rows)} rows, over the limit of {MOST_ROWS}")
    batch, length = tensor.shape[:2]
    positions = _integers("position_ids", head.position_ids)
    if positions.shape[-1] != length or (positions.ndim == 2 and positions.shape[0] not in (1, batch)):
        raise InvalidRequestError(f"position_ids of shape {list(positions.shape)} for a step of {[batch, length]}")
    mask = _integers("attention_mask", head.attention_mask) if head.HasField("attention_mask") else None
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length):
        raise InvalidRequestError(f"attention_mask of shape {list(mask.shape)} for a step of {[batch, length]}")
    return IncomingStep(
        key=StepKey.of(head.key),
        input=StepInput(
            input=tensor,
            attention_mask=mask,
            position_ids=positions.long(),
            use_cache=head.use_cache,
            one_by_one=head.one_by_one,
            adapters=tuple(head.adapters),
        ),
        reset_cache=head.reset_cache,
        keep=head.keep if head.HasField("keep") else None,
        rows=tuple(head.rows),
    )


def _integers(name: str, message: Tensor) -> torch.Tensor:
    tensor = from_message(message)
    if tensor.ndim not in (2, 3) or tensor.is_floating_point() or not tensor.numel():
        raise InvalidRequestError(f"{name} must be a non-empty integer tensor [rows, length], not {list(tensor.shape)}")
    return tensor
