"""What a session has been fed, so that its keys and values can be made again on other machines.

Shapes: B rows, T tokens of a pass, L of all passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..proto.v1 import inference_pb2
from ..worker.tensors import from_message, to_message


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """ids, positions: int64 [B, T]. mask: bool [B, T], what it added to the mask.

    positions: None where the model counted them itself, and will again. one_by_one: its tokens came singly.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor
    one_by_one: bool

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def first(self, length: int) -> _Pass:
        return _Pass(
            ids=self.ids[:, :length],
            positions=None if self.positions is None else self.positions[:, :length],
            mask=self.mask[:, :length],
            one_by_one=self.one_by_one,
        )

    def select(self, rows: Sequence[int]) -> _Pass:
        chosen = list(rows)
        return _Pass(
            ids=self.ids[chosen],
            positions=None if self.positions is None else self.positions[chosen],
            mask=self.mask[chosen],
            one_by_one=self.one_by_one,
        )


class History:
    """The passes of a session, in the shapes in which they came. As long as the session's cache, never longer."""

    def __init__(self) -> None:
        self._passes: list[_Pass] = []

    @property
    def length(self) -> int:
        return sum(each.length for each in self._passes)

    def keep(self, length: int) -> None:
        """Forgets all positions but the first `length`."""
        kept, passes = 0, []
        for each in self._passes:
            if kept < length:
                passes.append(each.first(length - kept))
                kept += passes[-1].length
        self._passes = passes

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        self._passes = [each.select(rows) for each in self._passes]

    def add_forward(self, request: inference_pb2.ForwardRequest) -> None:
        """A pass that a client asked for."""
        ids = from_message(request.input_ids).long()
        past = self.length
        mask = torch.ones_like(ids, dtype=torch.bool)
        if request.HasField("attention_mask"):
            mask = self._learn(from_message(request.attention_mask).bool())[:, past:]
        positions = None
        if request.HasField("position_ids"):
            positions = from_message(request.position_ids).long().expand(ids.shape[0], -1)
        self._append(ids, positions, mask, one_by_one=False)

    def add_generation(self, request: inference_pb2.GenerateRequest, rows: int, steps: Sequence[Sequence[int]]) -> None:
        """A generation that gave `steps` (tokens of each row); all but the last are cached. rows: after expansion."""
        ids = from_message(request.input_ids).long()
        copies = max(1, rows // ids.shape[0])
        past = self.length
        if request.HasField("attention_mask"):
            whole = self._learn(from_message(request.attention_mask).bool())
        else:
            whole = torch.cat([*(each.mask for each in self._passes), torch.ones_like(ids, dtype=torch.bool)], dim=1)
        # As transformers' generate counts.
        positions = (whole.long().cumsum(-1) - 1).clamp(min=0)
        self._append(
            *(each[:, -ids.shape[1] :].repeat_interleave(copies, dim=0) for each in (ids, positions, whole)),
            one_by_one=False,
        )
        tokens = torch.tensor(list(steps)[:-1], dtype=torch.long).reshape(-1, rows).T
        if tokens.shape[1]:
            last = positions[:, -1:].repeat_interleave(copies, dim=0)
            following = last + torch.arange(1, tokens.shape[1] + 1)
            self._append(tokens, following, torch.ones_like(tokens, dtype=torch.bool), one_by_one=True)
        assert self.length == past + ids.shape[1] + tokens.shape[1]

    def replay(self) -> Iterator[inference_pb2.ForwardRequest]:
        """Passes that make the same keys and values again."""
        mask: torch.Tensor | None = None
        for each in self._passes:
            mask = each.mask if mask is None else torch.cat([mask, each.mask], dim=1)
            yield inference_pb2.ForwardRequest(
                input_ids=to_message(each.ids.int()),
                attention_mask=None if bool(mask.all()) else to_message(mask),
                position_ids=None if each.positions is None else to_message(each.positions.int()),
                use_cache=True,
                without_logits=True,
                one_by_one=each.one_by_one,
            )

    def _learn(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` [B, L + T], which may mask of the past what it did not mask before."""
        start = 0
        for index, each in enumerate(self._passes):
            own = mask[:, start : start + each.length]
            self._passes[index] = _Pass(ids=each.ids, positions=each.positions, mask=own, one_by_one=each.one_by_one)
            start += each.length
        return mask

    def _append(
        self, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor, *, one_by_one: bool
    ) -> None:
        self._passes.append(_Pass(ids=ids, positions=positions, mask=mask, one_by_one=one_by_one))
