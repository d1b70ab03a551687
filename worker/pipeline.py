"""One stage's part in the ring: takes steps in, computes, passes them on, sends failures back.

    last ──ids──▶ first ──hidden──▶ … ──hidden──▶ last ──▶ logits, tokens
                     ◀── failures ──     ◀── failures ──

The last stage starts every step (`StagePipeline.forward`), so only tokens, never logits, travel for a generation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
Sender = Callable[[StepKey, ShardliftError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingStep:
    """A step as it arrived: `input` are token ids on the first stage, hidden states on the others."""

    key: StepKey
    input: StepInput
    reset_cache: bool


class StagePipeline:
    """A resident stage, the sessions on it, and its link to the next stage.

    Runs on one event loop, but for the computing: that has one thread, so a stage computes one step at a time, in the
    order of arrival. The caches belong to that thread: what frees one waits behind the step that may use it.
    """

    def __init__(self, stage: ResidentStage) -> None:
        self.stage = stage
        self._caches: dict[str, StageCache] = {}
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._link: Link | None = None
        self._closed = False
        # Steps that this (last) stage started, by key: who waits for their hidden states.
        self._waiting: dict[StepKey, asyncio.Future[torch.Tensor]] = {}
        # Sessions passing through, by the callback that sends a failure back to where they came from.
        self._senders: dict[str, Sender] = {}

    # -- the ring --------------------------------------------------------------------------------------------------

    async def join(self, next_address: str, metadata: list[tuple[str, str]]) -> None:
        """Sets (or replaces, after a stage has moved) the address of the next stage."""
        old, self._link = self._link, Link(next_address, metadata, self.fail)
        if old is not None:
            await old.close()

    async def close(self) -> None:
        """Fails what waits, and frees the sessions. Twice is as good as once."""
        if self._closed:
            return
        self._closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ModelUnavailableError("the model is being unloaded"))
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        self._senders.clear()
        self._compute.submit(self._caches.clear)
        self._compute.shutdown(wait=False)

    # -- sessions --------------------------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Device bytes of all sessions' keys and values."""
        return sum(cache.size_bytes for cache in list(self._caches.values()))

    @property
    def sessions(self) -> int:
        return len(self._caches)

    def cache(self, session: str) -> StageCache | None:
        """For the computing thread."""
        return self._caches.get(session)

    def end_session(self, session: str) -> None:
        """Frees a session here and on the stages beyond."""
        self._senders.pop(session, None)
        self._free(session)
        if self._link is not None and not self.stage.cut.is_last:
            self._link.end_session(session)

    def finish_session(self, session: str) -> None:
        """Frees a session on every stage; called where it was started."""
        self._free(session)
        if self._link is not None and not self.stage.cut.is_first:
            self._link.end_session(session)

    def forget_sender(self, sender: Sender) -> None:
        """Ends the sessions that came in by `sender`, whose stream has ended: nobody could go on with them."""
        for session in [session for session, known in self._senders.items() if known is sender]:
            self.end_session(session)

    def _free(self, session: str) -> None:
        if not self._closed:
            self._compute.submit(self._caches.pop, session, None)

    # -- computing -------------------------------------------------------------------------------------------------

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` on the computing thread. Memory that runs out is OutOfMemoryError."""
        if self._closed:
            raise ModelUnavailableError("the model is being unloaded")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, function)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            held = f"{self.kv_bytes:,} bytes of it hold keys and values of {self.sessions} sessions"
        # Outside the handler: the error's traceback keeps what filled the memory.
        if self.stage.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(
            f"device {self.stage.device} ran out of memory ({held}): "
            "shorten the input, close sessions, or load the model over more devices"
        )

    def _compute_step(self, step: IncomingStep, logits_to_keep: int = 0) -> torch.Tensor:
        cache: StageCache | None = None
        if step.input.use_cache:
            session = step.key.session
            cache = None if step.reset_cache else self._caches.get(session)
            if cache is None:
                if step.key.number > 0 and not step.reset_cache:
                    cut = self.stage.cut
                    raise ModelUnavailableError(
                        f"layers {cut.first} to {cut.end - 1} hold session {session} no longer: start again"
                    )
                cache = self._caches[session] = self.stage.new_cache()
        return self.stage.forward(step.input, cache, logits_to_keep)

    # -- first and middle stages -----------------------------------------------------------------------------------

    async def pass_on(self, step: IncomingStep, sender: Sender) -> None:
        """Computes a step and sends the result on; a failure goes back through `sender`."""
        self._senders[step.key.session] = sender
        try:
            message, rest = await self.run(lambda: _message(step, self._compute_step(step)))
            # A session that ended while it was computing is freed behind the step, and goes no further.
            if self._senders.get(step.key.session) is sender:
                self._send(message, rest)
        except Exception as error:
            ours = to_error(error)
            if isinstance(ours, InternalError):
                logger.exception("step %s failed here", step.key)
            else:
                logger.warning("step %s failed here: %s", step.key, one_line(error))
            self.fail(step.key, ours)

    def _send(self, message: stage_pb2.Step, rest: list[bytes]) -> None:
        if self._link is None:
            raise ModelUnavailableError("the ring of stages is not closed")
        self._link.send(message, rest)

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
        """Takes `step` (token ids) through all stages; logits [B, kept, V] on this, the last stage's device.

        Raises InvalidRequestError for ids or positions that the model has no rows for.
        """
        assert self.stage.cut.is_last
        self.stage.check(step)
        whole = IncomingStep(key=key, input=step, reset_cache=reset_cache)
        if not self.stage.cut.is_first:
            future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
            self._waiting[key] = future
            try:
                self._send(*_message(whole, step.input))
                hidden = await future
            finally:
                del self._waiting[key]
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen, even where something else ended the wait
            whole = replace(whole, input=replace(step, input=hidden))
        return await self.run(lambda: self._compute_step(whole, logits_to_keep))


def _message(step: IncomingStep, tensor: torch.Tensor) -> tuple[stage_pb2.Step, list[bytes]]:
    """`step` with `tensor` for its input, as it goes to the next stage. Copies to the host: not for the event loop."""
    head, rest = to_frames(tensor)
    mask = step.input.attention_mask
    message = stage_pb2.Step(
        key=step.key.message(),
        input=head,
        attention_mask=None if mask is None else to_message(mask.bool()),
        position_ids=to_message(step.input.position_ids.int()),
        use_cache=step.input.use_cache,
        reset_cache=step.reset_cache,
    )
    return message, list(rest)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
