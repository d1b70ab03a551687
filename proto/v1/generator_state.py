"""The state of torch's generator for the CPU as bytes, from a client whose generator is drawn from elsewhere.

What torch's own `get_state` begins with, on a little-endian machine: the seed it began with (u64), how many of its 624
words are left (i32), whether it is seeded (i32), the next word (u64), the words (u64 each, of 32 bits): the engine of a
Mersenne twister. What follows there is kept of normal variates alone, and stays where it is.

No torch is imported: generators are given.
"""

from __future__ import annotations

import struct
from typing import Any

from .errors import InvalidRequestError

_HEAD = struct.Struct("<QiiQ")
_WORDS = 624
STATE_BYTES = _HEAD.size + 8 * _WORDS


def check(state: bytes) -> None:
    """Raises InvalidRequestError for a state that no generator comes to: torch itself would read beyond the words."""
    if len(state) != STATE_BYTES:
        raise InvalidRequestError(f"generator_state has {len(state):,} bytes, not {STATE_BYTES:,}: send a seed instead")
    _, left, seeded, following = _HEAD.unpack_from(state)
    is_fresh = (left, following) == (1, 0)
    if seeded != 1 or not (is_fresh or (1 <= left <= _WORDS and following == _WORDS + 1 - left)):
        raise InvalidRequestError(
            f"generator_state has {left} words left after the {following} first: send a seed instead"
        )


def seed_of(state: bytes) -> int:
    """What the generator was seeded with."""
    seed: int = _HEAD.unpack_from(state)[0]
    return seed


def taken_from(generator: Any) -> bytes:
    """The state of a torch.Generator of the CPU."""
    return bytes(memoryview(generator.get_state().numpy())[:STATE_BYTES])


def put_into(generator: Any, state: bytes) -> None:
    """Sets a torch.Generator of the CPU. Raises InvalidRequestError, and then leaves it as it was."""
    check(state)
    whole = generator.get_state()
    memoryview(whole.numpy())[:STATE_BYTES] = state
    generator.set_state(whole)
