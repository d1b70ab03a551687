"""Who may have a session on a model, and how many tokens' keys and values each may keep. Pure but for the waiting."""

from __future__ import annotations

import asyncio
from collections import deque

from ..proto.v1.errors import ModelBusyError, OutOfMemoryError


class Admission:
    """Lets `max_sessions` run at a time and `max_waiting` wait, first come, first served.

    kv_tokens: tokens of all sessions together that have room on every stage; 0 for no limit.
    """

    def __init__(self, *, max_sessions: int, max_waiting: int, kv_tokens: int) -> None:
        self.max_sessions = max_sessions
        self.max_waiting = max_waiting
        self.kv_tokens = kv_tokens
        self.running: set[Ticket] = set()
        self._waiting: deque[tuple[Ticket, asyncio.Future[None]]] = deque()

    def limit(self, kv_tokens: int) -> None:
        """Sets `kv_tokens` anew. Raises OutOfMemoryError where running sessions have reserved more than that."""
        if kv_tokens and self.reserved_tokens > kv_tokens:
            raise OutOfMemoryError(
                f"{len(self.running)} sessions hold room for {self.reserved_tokens:,} tokens, and {kv_tokens:,} would "
                "be left: try again when they have ended"
            )
        self.kv_tokens = kv_tokens

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reserved_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.running)

    async def enter(self) -> Ticket:
        """A session's leave to run, once it is its turn; `leave` it. Raises ModelBusyError when too many wait."""
        ticket = Ticket(self)
        if len(self.running) < self.max_sessions:
            self.running.add(ticket)
            return ticket
        if self.waiting >= self.max_waiting:
            raise ModelBusyError(
                f"the model has {len(self.running)} sessions running and {self.waiting} waiting, its limit: try again "
                "later, or load it with a larger max_sessions or max_waiting"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (ticket, turn)
        self._waiting.append(place)
        try:
            await turn
        except BaseException:
            if place in self._waiting:
                self._waiting.remove(place)
            self.leave(ticket)  # it may have been our turn just then
            raise
        return ticket

    def leave(self, ticket: Ticket) -> None:
        if ticket not in self.running:
            return
        self.running.remove(ticket)
        if self._waiting:
            # Whoever comes now must not overtake: the place is taken before its owner wakes.
            first, turn = self._waiting.popleft()
            self.running.add(first)
            if not turn.done():
                turn.set_result(None)

    def reserve(self, ticket: Ticket, tokens: int) -> None:
        others = self.reserved_tokens - ticket.tokens
        if self.kv_tokens and others + tokens > self.kv_tokens:
            if tokens > self.kv_tokens:
                raise OutOfMemoryError(
                    f"keys and values of {tokens:,} tokens (all rows, prompt and answer) don't fit: this model has "
                    f"room for {self.kv_tokens:,}; ask for fewer, or load it with a larger reserve_tokens"
                )
            raise OutOfMemoryError(
                f"keys and values of {tokens:,} tokens (all rows, prompt and answer) have no room now: "
                f"{len(self.running) - 1} other sessions hold {others:,} of {self.kv_tokens:,}; try again later, ask "
                "for fewer, or load the model with a larger reserve_tokens"
            )
        ticket.tokens = tokens


class Ticket:
    """One session's place. `tokens`: what it has reserved."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.tokens = 0

    def reserve(self, tokens: int) -> None:
        """Sets what the session may keep, in place of what it had. Raises OutOfMemoryError; nothing changes then."""
        self._admission.reserve(self, tokens)

    def leave(self) -> None:
        """Gives place and tokens back. Twice is as good as once."""
        self._admission.leave(self)
