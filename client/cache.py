"""What transformers' decoding loops do to a cache, recorded for the next pass. No I/O."""

from __future__ import annotations

from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError


class CacheRecord:
    """The keys and values of a session as its client sees them: how many positions of how many rows.

    Has the methods of transformers' caches that decoding loops call. What they ask for is done by the workers, before
    the next pass: of the positions first, then of the rows.
    """

    # As transformers' caches tell of themselves.
    is_compileable = False
    is_croppable = True
    is_sliding: tuple[bool, ...] = ()
    layers: tuple[Any, ...] = ()  # on the workers

    def __init__(self) -> None:
        self._length = 0
        self._rows = 0
        self._keep: int | None = None  # positions, of those that the workers hold
        self._selected: list[int] | None = None  # rows, of those that the workers hold
        self._reserve: int | None = None  # tokens of all rows

    def reserve(self, tokens: int) -> None:
        """Has the workers hold room for so many tokens of all rows, from the next pass on, which may be refused it."""
        self._reserve = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions it holds, padding included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: as many as there is memory for."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """How many rows it holds; -1 before the first pass."""
        return self._rows if self._length else -1

    @property
    def is_initialized(self) -> bool:
        return self._length > 0

    def activate_past_recording(self) -> None:
        """Nothing: any past position can be gone back to."""

    def crop(self, count: int) -> None:
        """Forgets the last -`count` positions; of a positive `count`, as older versions have it, all but the first."""
        length = min(self._length, int(count)) if count > 0 else max(0, self._length + int(count))
        if length < self._length:
            self._length = self._keep = length

    def reset(self) -> None:
        """Forgets everything."""
        self.crop(-self._length)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i goes on from what was row beam_idx[i]."""
        self._select(_indices(beam_idx))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows of `indices` alone: numbers, or a mask over all."""
        self._select(_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Has each row `repeats` times."""
        self._select([row for row in range(self._rows) for _ in range(int(repeats))])

    def _select(self, rows: list[int]) -> None:
        if not self._length:
            return  # as transformers' caches do while they are empty
        if not rows or not all(0 <= row < self._rows for row in rows):
            raise InvalidRequestError(f"rows {rows} can't be chosen of the {self._rows} that the cache has")
        before = list(range(self._rows)) if self._selected is None else self._selected
        self._selected = [before[row] for row in rows]
        self._rows = len(rows)

    def _prepared(self, rows: int) -> inference_pb2.SessionRequest:
        """The request for an action on `rows` rows, with what is to be done before it."""
        if self._length and rows != self._rows:
            raise InvalidRequestError(f"the cache has {self._rows} rows, but the pass {rows}")
        return inference_pb2.SessionRequest(keep=self._keep, rows=self._changed_rows(), reserve_tokens=self._reserve)

    def _changed_rows(self) -> list[int]:
        # An empty session has no rows to choose from: the next pass brings its own.
        return [] if self._selected is None or not self._length else self._selected

    def _done(self, state: inference_pb2.SessionState, length: int, rows: int) -> None:
        """Takes what the workers hold after an action that should have left `length` positions of `rows` rows."""
        if (state.length, state.rows) != (length, rows):
            raise InternalError(
                f"the session holds {state.length} positions of {state.rows} rows where {length} of {rows} were due"
            )
        self._length, self._rows = length, rows
        self._keep = self._selected = self._reserve = None


def _indices(rows: Any) -> list[int]:
    values = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    if values and all(isinstance(value, bool) for value in values):
        return [row for row, wanted in enumerate(values) if wanted]
    return [int(value) for value in values]
