"""A parameter that is made of many tensors, filled as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def first_rows(shape: tuple[int, ...], stacks: Sequence[Sequence[tuple[int, ...]]]) -> list[int] | None:
    """Where, in a merged parameter of `shape`, the rows of each source begin: `stacks` has the shapes of its tensors,
    expert by expert. None unless they are alike within a source and fill the parameter exactly."""
    rows, end = [], 0
    for stack in stacks:
        if len(shape) < 2 or len(stack) != shape[0] or len(set(stack)) != 1:
            return None
        height, *rest = stack[0] or (0,)
        if tuple(rest) != shape[2:]:
            return None
        rows.append(end)
        end += height
    return rows if end == shape[1] else None


class MergedParameter:
    """What stacking each expert's weights, one stack for each source, and joining the stacks' rows would give:
    [experts, rows of the first source + rows of the second + …, …], or one source alone.

    Allocated when the first tensor comes, as large as it stays; a tensor is in its place before the next one is read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, tensors: int) -> None:
        """`tensors`: how many fill it."""
        self._shape, self._dtype, self._device = shape, dtype, device
        self._missing = tensors
        self._data: torch.Tensor | None = None

    def put(self, expert: int, row: int, tensor: torch.Tensor) -> None:
        """Copies `tensor` [rows, …] to [expert, row:row + rows, …], cast as `Tensor.to` casts."""
        if self._data is None:
            self._data = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._data[expert, row : row + len(tensor)].copy_(tensor)
        self._missing -= 1

    def take(self) -> torch.Tensor:
        """The whole, which is the taker's alone."""
        data, self._data = self._data, None
        assert data is not None
        assert not self._missing, f"{self._missing} tensors of a merged parameter were not read"
        return data
