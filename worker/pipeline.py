"""One stage's part in the ring: takes steps in, computes, passes them on, sends failures back.

    last ──ids──▶ first ──hidden──▶ … ──hidden──▶ last ──▶ logits, tokens
                     ◀── failures ──     ◀── failures ──

The last stage starts every step (`StagePipeline.forward`), so only tokens, never logits, travel for a generation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..proto.v1 import stage_pb2
from ..proto.v1.errors import (
    InternalError,
    InvalidRequestError,
    ModelUnavailableError,
    OutOfMemoryError,
    ShardliftError,
    one_line,
)
from ..proto.v1.status import to_error
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.tls import TLS
from .compute import Compute, RowJob, SessionOverError
from .kv import StageCache
from .links import Link, StepKey
from .stage import ResidentStage, StepInput
from .tensors import to_frames

logger = logging.getLogger(__name__)
T = TypeVar("T")
Sender = Callable[[StepKey, ShardliftError], None]
# What is made of a step's logits, on the computing thread.
Then = Callable[[torch.Tensor], Any]
# Who waits for the computing thread looks so often whether there is one still.
_CLOSED_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingStep:
    """A step as it arrived: `input` are token ids on the first stage, hidden states on the others.

    Before it, the session's cache is emptied (`reset_cache`), or cut to its first `keep` positions, and row i becomes
    what was row rows[i].
    """

    key: StepKey
    input: StepInput
    reset_cache: bool = False
    keep: int | None = None
    rows: tuple[int, ...] = ()

    @property
    def is_row(self) -> bool:
        """Whether other sessions' steps may go with it as one batch."""
        return self.input.input.shape[1] == 1 and self.input.use_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A step with what is to become of its output, on the computing thread."""

    step: IncomingStep
    logits_to_keep: int
    then: Then


@dataclass(slots=True)
class _Waiting:
    """A step that this (last) stage started, until its hidden states come round."""

    work: _Work
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Held:
    """A session's cache on this stage."""

    cache: StageCache
    epoch: int


@dataclass(slots=True)
class _Passing:
    """A session that passes through: the callback that sends a failure back to where it came from."""

    sender: Sender
    epoch: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class StagePipeline:
    """A resident stage, the sessions on it, and its link to the next stage.

    Runs on one event loop, but for the computing, which has a thread of its own (`worker.compute`). The caches belong
    to that thread.
    """

    def __init__(self, stage: ResidentStage, *, num_stages: int = 1) -> None:
        self.stage = stage
        self._caches: dict[str, _Held] = {}
        # With fewer groups of sessions than stages, some stage would wait.
        self.compute: Compute[_Work] = Compute(self._run_rows, lambda active: -(-active // num_stages))
        stage.on_layer(self.compute.breathe)
        self._link: Link | None = None
        self._closed = False
        self._waiting: dict[StepKey, _Waiting] = {}
        self._passing: dict[str, _Passing] = {}

    # -- the ring --------------------------------------------------------------------------------------------------

    async def join(self, next_address: str, metadata: list[tuple[str, str]], tls: TLS | None = None) -> None:
        """Sets (or replaces, after a stage has moved) the address of the next stage. Sessions under way end here."""
        old, self._link = self._link, Link(next_address, metadata, self.fail, tls)
        if old is not None:
            await old.close()
        self._end_all("a stage of the model was replaced")

    async def close(self) -> None:
        """Fails what waits, and frees the sessions. Twice is as good as once."""
        if self._closed:
            return
        self._closed = True
        self._end_all("the model is being unloaded")
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        self.compute.close(self._caches.clear)

    def _end_all(self, reason: str) -> None:
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(ModelUnavailableError(reason))
        for session in {*self._passing, *self._caches}:
            self._forget(session)

    # -- sessions --------------------------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Device bytes of all sessions' keys and values."""
        return sum(held.cache.size_bytes for held in list(self._caches.values()))

    @property
    def sessions(self) -> int:
        return len(self._caches)

    def cache(self, session: str) -> StageCache | None:
        """For the computing thread."""
        held = self._caches.get(session)
        return None if held is None else held.cache

    def end_session(self, session: str) -> None:
        """Frees a session here and on the stages beyond."""
        self._forget(session)
        if self._link is not None and not self.stage.cut.is_last:
            self._link.end_session(session)

    def finish_session(self, session: str) -> None:
        """Frees a session on every stage; called where it was started."""
        self._forget(session)
        if self._link is not None and not self.stage.cut.is_first:
            self._link.end_session(session)

    def forget_sender(self, sender: Sender) -> None:
        """Ends the sessions that came in by `sender`, whose stream has ended: nobody could go on with them."""
        for session in [session for session, passing in self._passing.items() if passing.sender is sender]:
            self.end_session(session)

    def _forget(self, session: str) -> None:
        self._passing.pop(session, None)
        self.compute.end(session)
        self.compute.soon(lambda: self._drop(session))

    def _drop(self, session: str) -> None:
        self._caches.pop(session, None)

    # -- computing -------------------------------------------------------------------------------------------------

    async def run(self, session: str, function: Callable[[], T]) -> T:
        """Runs `function` on the computing thread, in the session's turn. Memory that runs out is OutOfMemoryError."""
        if self._closed:
            raise ModelUnavailableError("the model is being unloaded")
        result: T = await self._settled(self.compute.run(session, function))
        return result

    def between_layers(self, function: Callable[[], T]) -> T:
        """Runs `function`, which must be quick, on the computing thread before whatever waits there.

        For another thread, which waits for the result.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.compute.soon(run)
        while not wait([done], timeout=_CLOSED_S).done:
            if self._closed:  # and then nothing is run any more
                raise ModelUnavailableError("the model is being unloaded")
        return done.result()

    async def _run_work(self, work: _Work) -> Any:
        """What `work.then` gives, in the step's turn; single-token steps go along with other sessions'."""
        session = work.step.key.session
        if not (work.step.is_row and self.stage.can_batch):
            return await self.run(session, lambda: self._compute_step(work))
        if self._closed:
            raise ModelUnavailableError("the model is being unloaded")
        return await self._settled(self._submit(work))

    def _submit(self, work: _Work) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # What is computed with other adapters is another batch.
        self.compute.run_row(RowJob(work.step.key.session, work, future, kind=work.step.input.adapters))
        return future

    async def _settled(self, future: asyncio.Future[Any]) -> Any:
        """The result of a computation; its end and its memory's, as those who asked for it know them."""
        try:
            return await future
        except SessionOverError:
            raise ModelUnavailableError("the session has ended") from None
        except RuntimeError as error:
            failure = self._explain(error)
        # Outside the handler: the error's traceback keeps what filled the memory.
        raise failure

    def _explain(self, error: RuntimeError) -> Exception:
        if not _is_out_of_memory(error):
            return error
        held = f"{self.kv_bytes:,} bytes of it hold keys and values of {self.sessions} sessions"
        if self.stage.device.type == "cuda":
            self.compute.soon(torch.cuda.empty_cache)
        return OutOfMemoryError(
            f"device {self.stage.device} ran out of memory ({held}): "
            "shorten the input, close sessions, or load the model over more devices"
        )

    def _compute_step(self, work: _Work) -> Any:
        step = work.step
        held = self._prepare(step)
        output = self.stage.forward(step.input, None if held is None else held.cache, work.logits_to_keep)
        return work.then(output)

    def _run_rows(self, works: Sequence[_Work]) -> list[Any]:
        """A batch of single-token steps. What goes wrong with one of them is its own result."""
        results: dict[int, Any] = {}
        ready: list[tuple[int, _Work, _Held]] = []
        for index, work in enumerate(works):
            try:
                held = self._prepare(work.step)
                assert held is not None
                ready.append((index, work, held))
            except Exception as error:
                results[index] = error
        if len(ready) == 1:
            _, work, held = ready[0]
            outputs = [self.stage.forward(work.step.input, held.cache, work.logits_to_keep)]
        elif ready:
            inputs = [work.step.input for _, work, _ in ready]
            outputs = self.stage.forward_rows(inputs, [held.cache for _, _, held in ready])
        else:
            outputs = []
        for (index, work, _), output in zip(ready, outputs, strict=True):
            try:
                results[index] = work.then(output)
            except Exception as error:
                results[index] = error
        return [results[index] for index in range(len(works))]

    def _prepare(self, step: IncomingStep) -> _Held | None:
        """The session's cache, as the step wants it. None for a step that caches nothing."""
        if not step.input.use_cache:
            return None
        key = step.key
        held = self._caches.get(key.session)
        if held is not None and (step.reset_cache or held.epoch < key.epoch):
            held = None
        if held is None:
            if key.number > 0 and not step.reset_cache:
                cut = self.stage.cut
                raise ModelUnavailableError(
                    f"layers {cut.first} to {cut.end - 1} hold session {key.session} no longer: start again"
                )
            held = self._caches[key.session] = _Held(self.stage.new_cache(), key.epoch)
        if step.keep is not None:
            held.cache.keep(step.keep)
        mask = step.input.attention_mask
        new = step.input.input.shape[1]
        if mask is not None and mask.shape[1] != held.cache.length + new:
            # In a batch it would fail the others' steps, too.
            raise InvalidRequestError(
                f"attention_mask covers {mask.shape[1]} positions; {held.cache.length} are past, and {new} new"
            )
        if step.rows:
            held.cache.select_rows(torch.tensor(step.rows, device=self.stage.device))
        return held

    # -- first and middle stages -----------------------------------------------------------------------------------

    def pass_on(self, steps: Sequence[IncomingStep], sender: Sender) -> None:
        """Computes steps and sends the results on; a failure goes back through `sender`."""
        for step in steps:
            passing = self._passing.get(step.key.session)
            if passing is None or passing.sender is not sender:
                passing = self._passing[step.key.session] = _Passing(sender)
            if step.key.epoch < passing.epoch:
                continue  # from before the session was begun anew
            passing.epoch = step.key.epoch
            task = asyncio.create_task(self._pass_on(step, passing))
            passing.tasks.add(task)
            task.add_done_callback(passing.tasks.discard)

    async def _pass_on(self, step: IncomingStep, passing: _Passing) -> None:
        key = step.key
        try:
            work = _Work(step=step, logits_to_keep=0, then=lambda output: _message(step, output))
            message, rest = await self._run_work(work)
            # A session that ended while it was computing is freed, and goes no further.
            if self._passing.get(key.session) is passing:
                self._send(message, rest)
        except Exception as error:
            if self._passing.get(key.session) is not passing:
                return
            ours = to_error(error)
            if isinstance(ours, InternalError):
                logger.exception("step %s failed here", key)
            else:
                logger.warning("step %s failed here: %s", key, one_line(error))
            self.fail(key, ours)

    def _send(self, message: stage_pb2.Step, rest: Sequence[memoryview]) -> None:
        if self._link is None:
            raise ModelUnavailableError("the ring of stages is not closed")
        self._link.send(message, rest)

    def fail(self, key: StepKey, error: ShardliftError) -> None:
        """A step failed here or beyond: wakes who waits for it, or sends the failure further back."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            if not waiting.future.done():
                waiting.future.set_exception(error)
            return
        passing = self._passing.get(key.session)
        if passing is not None:
            passing.sender(key, error)

    # -- last stage ------------------------------------------------------------------------------------------------

    def arrive(self, steps: Sequence[IncomingStep]) -> None:
        """Hidden states came round. Late ones, whose waiter has gone, are dropped."""
        for step in steps:
            waiting = self._waiting.get(step.key)
            if waiting is None or waiting.future.done():
                continue
            work = replace(
                waiting.work,
                step=replace(waiting.work.step, input=replace(waiting.work.step.input, input=step.input.input)),
            )
            # Now, not when whoever waits has its turn: what came as a group is to be computed as one.
            if work.step.is_row and self.stage.can_batch and not self._closed:
                waiting.future.set_result(self._submit(work))
            else:
                waiting.future.set_result(work)

    async def forward(self, step: IncomingStep, *, logits_to_keep: int = 0, then: Then = lambda logits: logits) -> Any:
        """Takes `step` (token ids) through all stages; gives what `then`, on the computing thread, makes of the logits
        [B, kept, V] on this, the last stage's device. step: as `ResidentStage.check` lets it pass.
        """
        assert self.stage.cut.is_last
        if self._closed:
            raise ModelUnavailableError("the model is being unloaded")
        work = _Work(step=step, logits_to_keep=logits_to_keep, then=then)
        if self.stage.cut.is_first:
            return await self._run_work(work)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = self._waiting[step.key] = _Waiting(work, future)
        try:
            self._send(*_message(step, step.input.input))
            came = await future
        finally:
            if self._waiting.get(step.key) is waiting:
                del self._waiting[step.key]
            if not future.cancel() and not future.cancelled():
                future.exception()  # seen, even where something else ended the wait
        if isinstance(came, _Work):
            return await self._run_work(came)
        return await self._settled(came)


def _message(step: IncomingStep, tensor: torch.Tensor) -> tuple[stage_pb2.Step, list[memoryview]]:
    """`step` with `tensor` for its input, as it goes to the next stage. Copies to the host."""
    head, rest = to_frames(tensor)
    positions, more_positions = to_frames(step.input.position_ids.int())
    mask: Tensor | None = None
    more_mask: Iterable[memoryview] = ()
    if step.input.attention_mask is not None:
        mask, more_mask = to_frames(step.input.attention_mask.bool())
    message = stage_pb2.Step(
        key=step.key.message(),
        input=head,
        attention_mask=mask,
        position_ids=positions,
        use_cache=step.input.use_cache,
        reset_cache=step.reset_cache,
        keep=step.keep,
        rows=step.rows,
        one_by_one=step.input.one_by_one,
        adapters=step.input.adapters,
    )
    return message, [*rest, *more_mask, *more_positions]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
