"""Frames of a Step stream, put together to steps. What comes is taken for hostile: each defect ends the one stream."""

from __future__ import annotations

import torch

from ..proto.v1 import stage_pb2
from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.frames import only_bytes
from ..proto.v1.limits import MOST_ADAPTERS, MOST_NAME_CHARACTERS, MOST_ROWS
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import ITEM_BYTES, Assembly
from .links import MOST_GROUPED, StepKey
from .pipeline import IncomingStep
from .stage import StepInput
from .tensors import from_bytes, from_message

_INTEGERS = frozenset({"int32", "int64"})
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_COUNTED = frozenset(ITEM_BYTES) - _FLOATS
# Of a mask, which covers the past, too, or of positions.
_MOST_SIDE_BYTES = 1 << 28


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
        self._assembly: _Parts | None = None

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
        self._head, self._assembly = step, _Parts(step)
        return self._whole()

    def _whole(self) -> list[IncomingStep]:
        head, assembly = self._head, self._assembly
        assert head is not None
        assert assembly is not None
        if not assembly.complete:
            return []
        self._head = self._assembly = None
        return [_incoming(head, *assembly.tensors())]

    def _apart(self, group: stage_pb2.StepGroup) -> list[IncomingStep]:
        """A group's steps. Raises InvalidRequestError where their rows are not those of the input."""
        if len(group.steps) > MOST_GROUPED:
            raise InvalidRequestError(f"a group of {len(group.steps)} steps; at most {MOST_GROUPED} go together")
        self._check_input(list(group.input.shape), group.input.dtype)
        rows = [step.input.shape[0] if step.input.shape else 0 for step in group.steps]
        if not rows or min(rows) < 1 or sum(rows) != group.input.shape[0] or group.input.shape[1] != 1:
            raise InvalidRequestError(f"a group of shape {list(group.input.shape)} whose steps have {rows} rows")
        whole = from_message(group.input)
        return [_apart(step, part) for step, part in zip(group.steps, whole.split(rows), strict=True)]

    def _check_input(self, shape: list[int], dtype: str) -> None:
        """Before anything is allocated for it. What another shape does to a batch, others in it would feel, too."""
        rank = 2 if self._takes_ids else 3
        right = len(shape) == rank and min(shape) > 0 and dtype in (_INTEGERS if self._takes_ids else _FLOATS)
        if not right or (not self._takes_ids and self._width not in (None, shape[2])):
            wanted = "token ids [rows, length]" if self._takes_ids else f"hidden states [rows, length, {self._width}]"
            raise InvalidRequestError(f"a step's input is {dtype[:20]} {shape[:8]}; this stage takes {wanted}")
        if shape[0] > MOST_ROWS:
            raise InvalidRequestError(f"a step of {shape[0]} rows, over the limit of {MOST_ROWS}")


class _Parts:
    """The tensors of a step as their bytes come: its input, its mask if it has one, its positions."""

    def __init__(self, step: stage_pb2.Step) -> None:
        _check_sides(step, list(step.input.shape))
        self._parts = [Assembly(step.input), *_sides(step)]

    @property
    def complete(self) -> bool:
        return all(part.complete for part in self._parts)

    def add(self, more: bytes | memoryview) -> None:
        next(part for part in self._parts if not part.complete).add(more)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Input, positions, mask."""
        whole = [from_bytes(part.shape, part.dtype, part.data) for part in self._parts]
        return whole[0], whole[-1], whole[1] if len(whole) == 3 else None


def _apart(step: stage_pb2.Step, tensor: torch.Tensor) -> IncomingStep:
    """A step of a group, which has its mask and positions with it."""
    _check_sides(step, list(tensor.shape))
    mask = from_message(step.attention_mask) if step.HasField("attention_mask") else None
    return _incoming(step, tensor, from_message(step.position_ids), mask)


def _check_sides(step: stage_pb2.Step, shape: list[int]) -> None:
    """Positions and mask of a step whose input has this shape, before anything is allocated for them."""
    batch, length = shape[:2]
    positions = _integers("position_ids", step.position_ids)
    if positions[-1] != length or (len(positions) == 2 and positions[0] not in (1, batch)):
        raise InvalidRequestError(f"position_ids of shape {positions} for a step of {[batch, length]}")
    if step.HasField("attention_mask"):
        mask = _integers("attention_mask", step.attention_mask)
        if len(mask) != 2 or mask[0] != batch or mask[1] < length:
            raise InvalidRequestError(f"attention_mask of shape {mask} for a step of {[batch, length]}")


def _sides(step: stage_pb2.Step) -> list[Assembly]:
    sides = [step.attention_mask] if step.HasField("attention_mask") else []
    return [Assembly(side, _MOST_SIDE_BYTES) for side in (*sides, step.position_ids)]


def _integers(name: str, message: Tensor) -> list[int]:
    """The shape of a tensor of integers, or of truths."""
    shape = list(message.shape)
    if len(shape) not in (2, 3) or message.dtype not in _COUNTED or min(shape) < 1:
        raise InvalidRequestError(f"{name} must be a non-empty integer tensor [rows, length], not {shape[:8]}")
    return shape


def _incoming(
    head: stage_pb2.Step, tensor: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
) -> IncomingStep:
    if len(head.key.session) > MOST_NAME_CHARACTERS:
        raise InvalidRequestError(f"a session's name has {len(head.key.session)} characters")
    if len(head.adapters) > MOST_ADAPTERS:
        raise InvalidRequestError(f"a step by {len(head.adapters)} adapters; at most {MOST_ADAPTERS} compute together")
    if len(head.rows) > MOST_ROWS:
        raise InvalidRequestError(f"a step that keeps {len(head.rows)} rows, over the limit of {MOST_ROWS}")
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
