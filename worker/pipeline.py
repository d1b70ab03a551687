"""One stage's part in the ring: takes steps in, computes, passes them on, sends failures back.

    last ──ids──▶ first ──hidden──▶ … ──hidden──▶ last ──▶ logits, tokens
                     ◀── failures ──     ◀── failures ──

The last stage starts every step (`Ring.forward`), so only tokens, never logits, travel for a generation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..proto.v1 import stage_pb2
from ..proto.v1.errors import InternalError, ModelUnavailableError, OutOfMemoryError, ShardliftError, one_line
from ..proto.v1.status import to_error
from .kv import StageCache
from .links import Link, StepKey
from .stage import ResidentStage, StepInput
from .tensors import to_frames, to_message

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingStep:
    """A step as it arrived: `input` are token ids on the first stage, hidden states on the others."""

    key: StepKey
    input: StepInput
    reset_cache: bool


class StagePipeline:
    """A resident stage, the sessions on it, and its link to the next stage.

    Everything here runs on one event loop, but for the computing: that has one thread, so a stage computes one step
    at a time, in the order of arrival.
    """

    def __init__(self, stage: ResidentStage) -> None:
        self.stage = stage
        self._caches: dict[str, StageCache] = {}
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._link: Link | None = None
        # Steps that this (last) stage started, by key: who waits for their hidden states.
        self._waiting: dict[StepKey, asyncio.Future[torch.Tensor]] = {}
        # Sessions passing through, by the callback that sends a failure back to where they came from.
        self._senders: dict[str, Callable[[StepKey, ShardliftError], None]] = {}

    # -- the ring --------------------------------------------------------------------------------------------------

    async def join(self, next_address: str, metadata: list[tuple[str, str]]) -> None:
        """Sets (or replaces, after a stage has moved) the address of the next stage."""
        if self._link is not None:
            await self._link.close()
        self._link = Link(next_address, metadata, self.fail)

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ModelUnavailableError("the model is being unloaded"))
        self._caches.clear()
        self._compute.shutdown(wait=False, cancel_futures=True)

    # -- sessions --------------------------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Device bytes of all sessions' keys and values."""
        return sum(cache.size_bytes for cache in self._caches.values())

    @property
    def sessions(self) -> int:
        return len(self._caches)

    def cache(self, session: str) -> StageCache | None:
        return self._caches.get(session)

    async def end_session(self, session: str) -> None:
        """Frees a session here and on the stages beyond."""
        self._senders.pop(session, None)
        self._caches.pop(session, None)
        # The step that the session may have under way ends here; the stages beyond are told in order.
        if self._link is not None and not self.stage.cut.is_last:
            await self._link.end_session(session)

    def forget_sender(self, sender: Callable[[StepKey, ShardliftError], None]) -> list[str]:
        """Sessions that came in by `sender`, whose stream has ended: nobody could go on with them."""
        gone = [session for session, known in self._senders.items() if known is sender]
        for session in gone:
            self._senders.pop(session, None)
            self._caches.pop(session, None)
        return gone

    # -- computing -------------------------------------------------------------------------------------------------

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` on the computing thread. Errors that aren't ours become ours, out of memory by name."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, function)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"device {self.stage.device} ran out of memory ({self.kv_bytes:,} bytes of it hold keys and values of "
                f"{self.sessions} sessions): shorten or close sessions, or load with more stages"
            ) from error

    def _compute_step(self, key: StepKey, step: StepInput, reset_cache: bool, logits_to_keep: int) -> torch.Tensor:
        cache: StageCache | None = None
        if step.use_cache:
            cache = None if reset_cache else self._caches.get(key.session)
            if cache is None:
                if key.number > 0 and not reset_cache:
                    raise ModelUnavailableError(
                        f"stage of layers {self.stage.cut.first} to {self.stage.cut.end - 1} no longer holds session "
                        f"{key.session}: start again"
                    )
                cache = self._caches[key.session] = self.stage.new_cache()
        return self.stage.forward(step, cache, logits_to_keep)

    # -- first and middle stages -----------------------------------------------------------------------------------

    async def pass_on(self, step: IncomingStep, sender: Callable[[StepKey, ShardliftError], None]) -> None:
        """Computes a step and sends the result on; a failure goes back through `sender`."""
        self._senders[step.key.session] = sender
        try:
            hidden = await self.run(lambda: self._compute_step(step.key, step.input, step.reset_cache, 0))
            if step.key.session not in self._senders:
                # It ended while it was computing.
                self._caches.pop(step.key.session, None)
                return
            await self._send(step.key, step.input, hidden, reset_cache=step.reset_cache)
        except Exception as error:
            logger.warning("step %s failed here: %s", step.key, one_line(error))
            self.fail(step.key, to_error(error))

    async def _send(self, key: StepKey, step: StepInput, tensor: torch.Tensor, *, reset_cache: bool) -> None:
        if self._link is None:
            raise InternalError("a step arrived before the ring was closed")
        head, rest = to_frames(tensor)
        message = stage_pb2.Step(
            key=key.message(),
            input=head,
            attention_mask=None if step.attention_mask is None else to_message(step.attention_mask),
            position_ids=to_message(step.position_ids),
            use_cache=step.use_cache,
            reset_cache=reset_cache,
        )
        await self._link.send(message, rest)

    def fail(self, key: StepKey, error: ShardliftError) -> None:
        """A step failed here or beyond: wakes who waits for it, or sends the failure further back."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            if not waiting.done():
                waiting.set_exception(error)
            return
        sender = self._senders.get(key.session)
        if sender is not None:
            sender(key, error)

    # -- last stage ------------------------------------------------------------------------------------------------

    def arrive(self, step: IncomingStep) -> None:
        """Hidden states came round. Late ones, whose waiter has gone, are dropped."""
        waiting = self._waiting.get(step.key)
        if waiting is not None and not waiting.done():
            waiting.set_result(step.input.input)

    async def forward(self, key: StepKey, step: StepInput, *, reset_cache: bool, logits_to_keep: int) -> torch.Tensor:
        """Takes `step` (token ids) through all stages; logits [B, kept, V] on this, the last stage's device."""
        assert self.stage.cut.is_last
        if not self.stage.cut.is_first:
            future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
            self._waiting[key] = future
            try:
                await self._send(key, step, step.input, reset_cache=reset_cache)
                hidden = await future
            finally:
                self._waiting.pop(key, None)
            step = StepInput(
                input=hidden,
                attention_mask=step.attention_mask,
                position_ids=step.position_ids,
                use_cache=step.use_cache,
            )
        return await self.run(lambda: self._compute_step(key, step, reset_cache, logits_to_keep))

    async def finish_session(self, session: str) -> None:
        """Frees a session on every stage; called where it was started."""
        self._caches.pop(session, None)
        if self._link is not None and not self.stage.cut.is_first:
            await self._link.end_session(session)
