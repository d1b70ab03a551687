"""Who may have a session on a model, and how many tokens' keys and values each may keep. Pure but for the waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..proto.v1.errors import ModelBusyError, OutOfMemoryError

# By then a session may have ended that holds what another one lacks.
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a stage's device has for keys and values, and for what is computed besides. token_bytes: of one token's keys
    and values there."""

    bytes_: int
    token_bytes: int


class Admission:
    """Lets `max_sessions` run at a time and `max_waiting` wait, first come, first served.

    kv_tokens: tokens of all sessions together that have room on every stage; 0 for no limit. wait_s: how long one waits
    for its turn; 0 for ever. rooms: of the stages, in order; none for no limit.

    A session that rests keeps the tokens that it has reserved, and not its place.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        max_waiting: int,
        kv_tokens: int,
        wait_s: float = 0.0,
        rooms: Sequence[Room] = (),
    ) -> None:
        self.max_sessions = max_sessions
        self.max_waiting = max_waiting
        self.kv_tokens = kv_tokens
        self.rooms = tuple(rooms)
        self.running: set[Ticket] = set()
        self._wait_s = wait_s
        self._open: set[Ticket] = set()
        self._waiting: deque[tuple[Ticket, asyncio.Future[None]]] = deque()

    def limit(self, kv_tokens: int, rooms: Sequence[Room] | None = None) -> None:
        """Sets the limits anew. Raises OutOfMemoryError where sessions have reserved more than that."""
        if kv_tokens and self.reserved_tokens > kv_tokens:
            raise OutOfMemoryError(
                f"{len(self._open)} sessions hold room for {self.reserved_tokens:,} tokens, and {kv_tokens:,} would "
                "be left: try again when they have ended"
            )
        self.kv_tokens = kv_tokens
        if rooms is not None:
            self.rooms = tuple(rooms)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reserved_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self._open)

    @property
    def free_bytes(self) -> list[int]:
        """Of each stage's room: what no session has reserved. Empty where there is no limit."""
        reserved = self.reserved_tokens
        return [room.bytes_ - reserved * room.token_bytes for room in self.rooms]

    async def enter(self) -> Ticket:
        """A session's leave to run, once it is its turn; `leave` it. Raises ModelBusyError when too many wait, or its
        turn does not come in time."""
        ticket = Ticket(self)
        await self.resume(ticket)
        return ticket

    async def resume(self, ticket: Ticket) -> None:
        """Has a session run that has rested. Raises as `enter`; it goes on resting then."""
        if ticket in self.running:
            return
        if len(self.running) < self.max_sessions:
            self._run(ticket)
            return
        if self.waiting >= self.max_waiting:
            raise ModelBusyError(
                f"the model has {len(self.running)} sessions running and {self.waiting} waiting, its limit: try again "
                "later, or load it with a larger max_sessions or max_waiting"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (ticket, turn)
        self._waiting.append(place)
        try:
            await asyncio.wait([turn], timeout=self._wait_s or None)
            if not turn.done():
                raise ModelBusyError(
                    f"{len(self.running)} sessions run, as many as may, and in {self._wait_s:g} s none has ended: try "
                    "again later, or load the model with a larger max_sessions"
                )
        except BaseException:
            if place in self._waiting:
                self._waiting.remove(place)
            self.rest(ticket)  # it may have been our turn just then
            raise
        self._open.add(ticket)

    def _run(self, ticket: Ticket) -> None:
        self.running.add(ticket)
        self._open.add(ticket)

    def rest(self, ticket: Ticket) -> None:
        """Gives a session's place to whoever waits; its tokens stay its own."""
        if ticket not in self.running:
            return
        self.running.remove(ticket)
        if self._waiting:
            # Whoever comes now must not overtake: the place is taken before its owner wakes.
            first, turn = self._waiting.popleft()
            self.running.add(first)
            if not turn.done():
                turn.set_result(None)

    def leave(self, ticket: Ticket) -> None:
        self._open.discard(ticket)
        self.rest(ticket)

    def reserve(self, ticket: Ticket, tokens: int) -> None:
        others = self.reserved_tokens - ticket.tokens
        if self.kv_tokens and tokens > ticket.tokens and others + tokens > self.kv_tokens:
            if tokens > self.kv_tokens:
                raise OutOfMemoryError(
                    f"keys and values of {tokens:,} tokens (all rows, prompt and answer) don't fit: this model has "
                    f"room for {self.kv_tokens:,}; ask for fewer, or load it with a larger reserve_tokens"
                )
            holding = sum(other.tokens > 0 for other in self._open if other is not ticket)
            error = OutOfMemoryError(
                f"keys and values of {tokens:,} tokens (all rows, prompt and answer) have no room now: "
                f"{holding} other sessions hold {others:,} of {self.kv_tokens:,}; try again later, ask "
                "for fewer, or load the model with a larger reserve_tokens"
            )
            error.retry_s = _RETRY_S
            raise error
        ticket.tokens = tokens


class Ticket:
    """One session's place. `tokens`: what it has reserved."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.tokens = 0

    @property
    def free_bytes(self) -> list[int]:
        """As the admission's."""
        return self._admission.free_bytes

    def reserve(self, tokens: int) -> None:
        """Sets what the session may keep, in place of what it had. Raises OutOfMemoryError; nothing changes then."""
        self._admission.reserve(self, tokens)

    async def resume(self) -> None:
        """Waits for a place where it has none. Raises ModelBusyError."""
        await self._admission.resume(self)

    def rest(self) -> None:
        """Gives its place back, and keeps its tokens."""
        self._admission.rest(self)

    def leave(self) -> None:
        """Gives place and tokens back. Twice is as good as once."""
        self._admission.leave(self)
