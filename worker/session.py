"""A session on the last stage: passes through the ring on one cache, and generations that go on from it.

Shapes: B rows, T new tokens, L cached positions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict

from ..proto.v1 import inference_pb2, limits
from ..proto.v1.errors import InvalidRequestError, OutOfMemoryError
from ..proto.v1.tensor_pb2 import Tensor
from . import stops
from .account import Account
from .admission import Ticket
from .draws import Draws
from .generation import Decoding, Forward
from .links import StepKey
from .metrics import ServingNumbers
from .pipeline import IncomingStep, StagePipeline, Then
from .stage import ResidentStage, StepInput
from .tensors import check_ids, from_message, to_frames
from .tracing import OFF, Span
from .trial import depends_on_the_longest
from .workspace import Dimensions, Pass, least_bytes, pass_bytes

# Steps that a client has not taken yet, before the model waits for it.
_STEPS_AHEAD = 64


class RingSession:
    """One sequence batch. Its methods are called one after another; `end` frees it on every stage.

    name, epoch: as in the keys of its steps. The same name under a later epoch is the session begun anew. numbers: what
    it counts into. arrived_s: when it was asked for, by `time.perf_counter`, before it had its turn.
    """

    def __init__(
        self,
        pipeline: StagePipeline,
        ticket: Ticket,
        *,
        name: str = "",
        epoch: int = 0,
        tokenizer: Callable[[], Any] | None = None,
        numbers: ServingNumbers | None = None,
        span: Span = OFF,
        arrived_s: float | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._ticket = ticket
        self._numbers = numbers or ServingNumbers()
        self._span = span
        self._arrived_s = arrived_s
        self._name = name or uuid.uuid4().hex
        self._epoch = epoch
        self._number = 0
        self._tokenizer = tokenizer
        self._keep: int | None = None
        self._select: tuple[int, ...] = ()
        self._past: _Past | None = None
        # Whether the stages no longer have what `_past` tells of: it goes round before the next pass does.
        self._is_void = False
        self._adapters: tuple[str, ...] = ()
        # What was let in before a stage was lost is not sent away for it.
        self._is_replayed = False
        # Held beyond what it comes to by itself.
        self._reserved_tokens = 0
        stage = pipeline.stage
        self._dimensions = Dimensions.of(stage.model.config.get_text_config(decoder=True), stage.dtype.itemsize)

    @property
    def length(self) -> int:
        """Cached positions, padding included."""
        return 0 if self._past is None else self._past.length

    @property
    def rows(self) -> int:
        return 0 if self._past is None else self._past.rows

    def end(self) -> None:
        self._pipeline.finish_session(self._name)
        self._ticket.leave()

    @property
    def state(self) -> State:
        """What `go_back` goes back to."""
        return State(
            steps=self._number,
            tokens=self._ticket.tokens,
            reserved_tokens=self._reserved_tokens,
            keep=self._keep,
            select=self._select,
            past=self._past,
            is_void=self._is_void,
            adapters=self._adapters,
        )

    def go_back(self, state: State) -> bool:
        """Makes the session what it was; False where something has been computed since, and it can't be."""
        if state.steps != self._number:
            return False
        self._reserved_tokens, self._keep, self._select = state.reserved_tokens, state.keep, state.select
        self._past, self._is_void, self._adapters = state.past, state.is_void, state.adapters
        self._ticket.reserve(state.tokens)
        return True

    async def resume(self) -> None:
        """Waits for its turn, where it has rested. Raises ModelBusyError where that doesn't come."""
        await self._ticket.resume()

    def rest(self) -> None:
        """Lets others run while nothing is asked of it. What it holds, it keeps."""
        self._ticket.rest()

    def hold(self, tokens: int) -> None:
        """Reserves room for so many tokens of all rows, until it is told otherwise. Raises OutOfMemoryError."""
        self._ticket.reserve(max(tokens, self.rows * self.length))
        self._reserved_tokens = tokens

    def _let_go(self, tokens: int) -> None:
        """Needs no more than so many tokens for now."""
        self._ticket.reserve(max(tokens, self._reserved_tokens))

    # -- the past --------------------------------------------------------------------------------------------------

    def keep(self, length: int) -> None:
        """Forgets all positions but the first `length`. Raises InvalidRequestError where there are not so many."""
        if length > self.length:
            raise InvalidRequestError(f"keep={length}, but the session holds {self.length} positions")
        if self._past is None or length == self.length:
            return
        past = self._past.first(length)
        cache = self._pipeline.cache(self._name)
        if not length:
            self._past, self._is_void, self._keep, self._select = None, False, None, ()
            self._let_go(0)
            return
        self._past = _Past(past.input, past.position_ids, past.attention_mask)
        if not self._is_void and cache is not None and cache.can_keep(length):
            self._keep = length
            return
        # A window has moved past what it would have to hold again: what stays is computed anew.
        self._is_void, self._keep, self._select = True, None, ()

    def select_rows(self, rows: tuple[int, ...]) -> None:
        """Row i goes on from what is now row rows[i].

        Raises InvalidRequestError for a row that isn't there, OutOfMemoryError for more than have room.
        """
        if not all(row < self.rows for row in rows):
            raise InvalidRequestError(f"row {max(rows)} of a session with {self.rows} rows")
        assert self._past is not None
        self._ticket.reserve(max(self._ticket.tokens, len(rows) * self.length))
        self._past = self._past.select(rows)
        if not self._is_void:
            self._select = tuple(self._select[row] for row in rows) if self._select else rows

    def _choose(self, request: inference_pb2.ForwardRequest | inference_pb2.GenerateRequest) -> None:
        """Goes on with the adapters that `request` names, if it does.

        Raises InvalidRequestError where the model has none of that name, or what is cached was made with others.
        """
        if not request.HasField("adapters"):
            return
        names = tuple(request.adapters.names)
        if names != self._adapters and self._past is not None:
            raise InvalidRequestError(
                f"this session's keys and values were made with adapters {list(self._adapters)}, and can't go on with "
                f"{list(names)}: begin another session"
            )
        self._pipeline.stage.adapters.check(names)
        self._adapters = names

    # -- passes ----------------------------------------------------------------------------------------------------

    async def forward(
        self, step: StepInput, *, reset: bool = False, logits_to_keep: int = 0, then: Then = lambda logits: logits
    ) -> Any:
        """Takes `step` through all stages; gives what `then`, on the computing thread, makes of the logits [B, kept, V]
        of the last one.

        reset: the step is the whole sequence, computed without what is cached.
        Raises InvalidRequestError for a step that doesn't go with the past, OutOfMemoryError where it has no room.
        """
        past = None if reset or not step.use_cache else self._past
        if self._past is not None and not reset and (step.input.shape[0] != self.rows or not step.use_cache):
            raise InvalidRequestError(
                f"this session keeps {self.length} tokens of {self.rows} rows: its passes need as many rows, and "
                "use_cache"
            )
        padding = _padding(step)
        step = replace(step, adapters=self._adapters)
        if step.use_cache:
            rows, new = step.input.shape
            self._ticket.reserve(max(self._ticket.tokens, rows * (new + (0 if past is None else past.length))))
        self._check_room(step, 0 if past is None else past.length, padding, logits_to_keep)
        self._pipeline.stage.check(step)
        if past is not None and self._is_void:
            # Not before everything else: a step that is refused costs nothing, and the session stays what it was.
            await self.forward(past.first(past.length), reset=True, logits_to_keep=1, then=lambda logits: None)
            past = self._past
        if step.use_cache and padding is None:
            # Without a mask the same values come out, and less travels.
            step = replace(step, attention_mask=None)
        key = StepKey(self._name, self._epoch, self._number)
        incoming = IncomingStep(
            key=key,
            input=step,
            reset_cache=step.use_cache and past is None,
            keep=None if past is None else self._keep,
            rows=() if past is None else self._select,
        )
        self._number += 1
        result = await self._pipeline.forward(incoming, logits_to_keep=logits_to_keep, then=then)
        if step.use_cache:
            if past is None:
                self._past = _Past(step.input.cpu(), _positions(step), padding)
            else:
                past.add(step, padding)
            self._is_void, self._keep, self._select = False, None, ()
        return result

    def _check_room(self, step: StepInput, past: int, padding: torch.Tensor | None, logits_to_keep: int) -> None:
        """Raises OutOfMemoryError for a pass that would take more than a device has left while it is computed."""
        rows, new = step.input.shape
        if new == 1 or step.one_by_one:
            return
        kept = min(logits_to_keep or new, new)
        self._check_pass(Pass(rows=rows, new=new, past=past, is_padded=padding is not None, kept=kept))

    def _check_pass(self, asked: Pass) -> None:
        free = self._ticket.free_bytes
        if not free or self._is_replayed:
            return
        least = least_bytes(self._dimensions)

        def lacking(some: Pass) -> tuple[int, int, int] | None:
            """The first stage that hasn't the room, with what it has and what it needs."""
            widest, logits = pass_bytes(self._dimensions, some)
            for index, has in enumerate(free):
                needs = widest + (logits if index == len(free) - 1 else 0)
                if needs > max(has, least):
                    return index, max(has, least), needs
            return None

        if (found := lacking(asked)) is None:
            return
        index, has, needs = found
        total, chunk = asked.past + asked.new, asked.new // 2
        while chunk > 1 and lacking(replace(asked, new=chunk, past=total - chunk, kept=min(asked.kept, chunk))):
            chunk //= 2
        padding = ", some of them padding," if asked.is_padded else ""
        raise OutOfMemoryError(
            f"computing {asked.rows} x {asked.new:,} tokens at once{padding} takes some {needs:,} bytes beside keys "
            f"and values, and stage {index} has {has:,} for that now: send it in chunks of {max(chunk, 1):,} (by "
            "prefill_chunk_size, or as passes of a session), or fewer rows"
        )

    async def compute(self, function: Callable[[], Any]) -> Any:
        """Runs `function` on the computing thread, in this session's turn."""
        return await self._pipeline.run(self._name, function)

    async def answer(
        self, request: inference_pb2.ForwardRequest, *, cached: bool
    ) -> AsyncIterator[inference_pb2.ForwardResponse]:
        """Runs the pass that is asked for; gives its logits, message by message."""
        self._choose(request)
        self._is_replayed = self._epoch > 0 and (self._number == 0 or request.without_logits)
        step = _step_input(request, self.length, self._pipeline.stage, cached=cached)
        if request.without_logits:
            await self.forward(step, logits_to_keep=1, then=lambda logits: None)
            yield inference_pb2.ForwardResponse(logits=Tensor(shape=[0], dtype="float32"))
            return
        rows, length = step.input.shape
        stage = self._pipeline.stage
        kept = min(request.logits_to_keep or length, length)
        limits.check_logits(rows, kept, stage.vocabulary, stage.dtype.itemsize)
        head, rest = await self.forward(step, logits_to_keep=request.logits_to_keep, then=_frames)
        yield inference_pb2.ForwardResponse(logits=head)
        for frame in rest:
            yield inference_pb2.ForwardResponse(more=frame)

    # -- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, cached: bool = False
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Decodes as `request` says, after what is cached. Left early, it stops at the next step.

        cached: keys and values are kept, whatever the model's own generation config says.
        """
        # The turn was waited for by the first of a session.
        arrived_s, self._arrived_s = self._arrived_s or time.perf_counter(), None
        decoding = await self._decoding(request, cached)
        given = _generated(request, decoding.rows)
        account = Account(self._numbers, self._span, arrived_s, resumed=bool(given.shape[1]))
        account.prompt(decoding.rows * (decoding.prompt_tokens - self.length))
        outcome = "cancelled"
        yield inference_pb2.GenerateResponse(
            accepted=inference_pb2.PromptAccepted(batch=decoding.rows, prompt_tokens=decoding.prompt_tokens)
        )
        # The model goes on while a client takes its time, up to a point.
        steps: asyncio.Queue[list[inference_pb2.GenerateResponse] | Exception | None] = asyncio.Queue(_STEPS_AHEAD)
        driving = asyncio.create_task(self._drive(decoding, given, steps, account))
        try:
            while (responses := await steps.get()) is not None:
                if isinstance(responses, Exception):
                    outcome = "failed"
                    raise responses
                for response in responses:
                    yield response
            outcome = "stop" if decoding.stopped_early else "length"
        finally:
            driving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await driving
            self._let_go(self.length * self.rows)
            account.end(outcome)
        yield inference_pb2.GenerateResponse(
            finished=inference_pb2.GenerationFinished(
                new_tokens=decoding.new_tokens,
                reason=outcome,
                generator_state=decoding.generator_state,
                row_tokens=decoding.row_tokens,
            )
        )

    async def _decoding(self, request: inference_pb2.GenerateRequest, cached: bool) -> Decoding:
        self._choose(request)
        self._is_replayed = self._epoch > 0 and (self._number == 0 or request.HasField("generated"))
        input_ids = check_ids("input_ids", from_message(request.input_ids))
        mask = _mask(request.attention_mask) if request.HasField("attention_mask") else None
        past = self._past
        if past is not None:
            if input_ids.shape[0] != self.rows:
                raise InvalidRequestError(f"input_ids has {input_ids.shape[0]} rows, but the session {self.rows}")
            if mask is None and past.mask is not None:
                mask = torch.cat([past.mask.long(), torch.ones_like(input_ids)], dim=1)
            input_ids = torch.cat([past.ids, input_ids], dim=1)
        if mask is not None and mask.shape != input_ids.shape:
            raise InvalidRequestError(
                f"attention_mask has shape {list(mask.shape)}; past and new tokens need {list(input_ids.shape)}"
            )
        model = self._pipeline.stage.model
        fields = MessageToDict(request.generation)
        if cached and fields.setdefault("use_cache", True) is False:
            raise InvalidRequestError("use_cache=False, but a session keeps its keys and values: leave it out")
        strings = stops.asked(fields, model.generation_config)
        # Of a large vocabulary it takes its time, in which others' steps are computed.
        stop = await asyncio.to_thread(stops.criterion, strings, self._tokenizer) if strings else None
        decoding: Decoding = await self.compute(
            lambda: Decoding(
                model,
                input_ids,
                mask,
                fields,
                draws=partial(
                    Draws,
                    seed=request.seed if request.HasField("seed") else None,
                    state=request.generator_state,
                ),
                output_logits=request.output_logits,
                output_scores=request.output_scores,
                past=self.length,
                stop=stop,
            )
        )
        if past is not None and (decoding.rows != self.rows or not decoding.use_cache):
            raise InvalidRequestError(
                "a session's generation needs its own rows and its cache: no other number, no less"
            )
        if decoding.use_cache:
            # All that it may come to: who was let in is not sent away half-way.
            self._ticket.reserve(max(decoding.rows * decoding.max_length, self._reserved_tokens))
        self._check_prompt(decoding, mask)
        return decoding

    def _check_prompt(self, decoding: Decoding, mask: torch.Tensor | None) -> None:
        """Before the first of its passes. Raises as `_check_pass`."""
        length = decoding.prompt_tokens if decoding.use_cache else decoding.max_length
        is_padded = mask is not None and not bool(mask.all())
        chunk = min(decoding.prefill_chunk or length, length - self.length)
        rest = (length - self.length) % chunk
        if self._is_void:
            self._check_pass(Pass(rows=self.rows, new=self.length, past=0, is_padded=is_padded))
        # Of the whole ones the last has the longest past.
        for new, end in ((chunk, length - rest), (rest, length)):
            if new > 1:
                self._check_pass(Pass(rows=decoding.rows, new=new, past=end - new, is_padded=is_padded))

    async def _drive(
        self,
        decoding: Decoding,
        generated: torch.Tensor,
        steps: asyncio.Queue[list[inference_pb2.GenerateResponse] | Exception | None],
        account: Account,
    ) -> None:
        """Puts each step's messages into `steps`, and at the end None, or what it failed with."""
        try:
            forwards = await self._passes(decoding, generated)
            if decoding.finished:
                await steps.put(None)
                return
            for forward in forwards[:-1]:
                await self._pass(forward, lambda logits: None)
            following: Forward | None = forwards[-1]
            while following is not None:
                advanced = await self._pass(following, lambda logits: self._advance(decoding, logits))
                account.step()
                # Doesn't give the loop away unless the queue is full: the next step sets out with its group.
                await steps.put(advanced.responses)
                following = advanced.next
            await steps.put(None)
        except Exception as error:
            await steps.put(error)

    async def _passes(self, decoding: Decoding, generated: torch.Tensor) -> list[Forward]:
        """The passes up to the next new token: the prompt's, and those of tokens that are known already.

        Each of these is computed to the bits that it had when it came, by itself.
        """
        prefill: list[Forward] = await self.compute(decoding.prefill)
        count = generated.shape[1]
        if not count:
            return prefill
        if decoding.use_cache and self._is_changeable:
            following = prefill
            for column in generated.T:
                for forward in following:
                    await self._pass(forward, lambda logits: None)
                following = [await self.compute(partial(self._accept, decoding, column))]
            return following

        def accept_all() -> Forward:
            for column in generated.T:
                decoding.accept(column)
            forward = decoding.next_forward(None, count)
            return replace(forward, input=replace(forward.input, one_by_one=decoding.use_cache))

        last = await self.compute(accept_all)
        return [*prefill, last] if decoding.use_cache else [last]

    @property
    def _is_changeable(self) -> bool:
        """Whether the model may find, at a step, that its past is void: then each step is asked about."""
        return depends_on_the_longest(self._pipeline.stage)

    def _accept(self, decoding: Decoding, tokens: torch.Tensor) -> Forward:
        decoding.accept(tokens)
        return decoding.next_forward(self._cache)

    async def _pass(self, forward: Forward, then: Then) -> Any:
        return await self.forward(
            forward.input, reset=forward.reset_cache, logits_to_keep=forward.logits_to_keep, then=then
        )

    @property
    def _cache(self) -> object:
        """This stage's cache as transformers sees it, or None."""
        cache = self._pipeline.cache(self._name)
        return None if cache is None else cache.cache

    def _advance(self, decoding: Decoding, logits: torch.Tensor) -> _Advanced:
        """Chooses the next tokens and prepares their pass, in one turn on the computing thread.

        The bytes of tensors that don't fit one message follow it, the logits' first.
        """
        step = decoding.advance(logits)
        self._numbers.generated_tokens += step.chosen
        message = inference_pb2.GeneratedStep(token_ids=step.tokens)
        later: list[inference_pb2.GenerateResponse] = []
        for tensor, field in ((step.logits, message.logits), (step.scores, message.scores)):
            if tensor is not None:
                head, rest = _frames(tensor)
                field.CopyFrom(head)
                later += [inference_pb2.GenerateResponse(more=frame) for frame in rest]
        return _Advanced(
            responses=[inference_pb2.GenerateResponse(step=message), *later],
            next=None if step.finished else decoding.next_forward(self._cache),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Of a session between two actions. steps: that it has sent round."""

    steps: int
    tokens: int
    reserved_tokens: int
    keep: int | None
    select: tuple[int, ...]
    past: _Past | None
    is_void: bool
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Advanced:
    """What to tell of a step, and the next pass, if there is one."""

    responses: list[inference_pb2.GenerateResponse]
    next: Forward | None


class _Past:
    """What a session has been fed, on the host: ids and positions [B, L], and a mask [B, L] where something is
    padding. Kept in the pieces in which it came: a step adds one, however long the session is."""

    def __init__(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._ids, self._positions = [ids], [positions]
        self.rows, self.length = ids.shape
        self.mask = mask

    def add(self, step: StepInput, padding: torch.Tensor | None) -> None:
        """padding: the step's, over everything."""
        self._ids.append(step.input.cpu())
        self._positions.append(_positions(step))
        self.length += step.input.shape[1]
        self.mask = padding

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat(self._ids, dim=1)

    def first(self, length: int) -> StepInput:
        """The first so many positions, to be computed anew, or to go on from."""
        return StepInput(
            input=self.ids[:, :length],
            position_ids=torch.cat(self._positions, dim=1)[:, :length],
            attention_mask=None if self.mask is None else self.mask[:, :length],
        )

    def select(self, rows: tuple[int, ...]) -> _Past:
        chosen = list(rows)
        mask = None if self.mask is None else self.mask[chosen]
        return _Past(self.ids[chosen], torch.cat(self._positions, dim=1)[chosen], mask)


def _positions(step: StepInput) -> torch.Tensor:
    return step.position_ids.cpu().expand(step.input.shape[0], -1)


def _padding(step: StepInput) -> torch.Tensor | None:
    """The step's mask over past and new tokens, or None where it is true everywhere."""
    mask = step.attention_mask
    return None if mask is None or bool(mask.all()) else mask.cpu().bool()


def _frames(tensor: torch.Tensor) -> tuple[Tensor, list[bytes]]:
    head, rest = to_frames(tensor)
    return head, [bytes(frame) for frame in rest]


def _generated(request: inference_pb2.GenerateRequest, rows: int) -> torch.Tensor:
    """The tokens [rows, n] that an earlier call gave. Raises InvalidRequestError for another number of rows."""
    if not request.HasField("generated") or not request.generated.data:
        return torch.empty((rows, 0), dtype=torch.long)
    generated = check_ids("generated", from_message(request.generated))
    if generated.shape[0] != rows:
        raise InvalidRequestError(f"generated has {generated.shape[0]} rows; this request has {rows}")
    return generated


def _step_input(request: inference_pb2.ForwardRequest, past: int, stage: ResidentStage, *, cached: bool) -> StepInput:
    input_ids = check_ids("input_ids", from_message(request.input_ids))
    batch, length = input_ids.shape
    attention_mask = _mask(request.attention_mask) if request.HasField("attention_mask") else None
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
        raise InvalidRequestError(
            f"attention_mask has shape {list(attention_mask.shape)}; past and new tokens need {[batch, past + length]}"
        )
    if request.HasField("position_ids"):
        position_ids = check_ids("position_ids", from_message(request.position_ids))
        if position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
            raise InvalidRequestError(
                f"position_ids has shape {list(position_ids.shape)}; the new tokens need {[batch, length]}"
            )
    else:
        position_ids = stage.positions(attention_mask, past, length)
    return StepInput(
        input=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=cached,
        one_by_one=request.one_by_one and cached,
    )


def _mask(message: Tensor) -> torch.Tensor:
    return check_ids("attention_mask", from_message(message))
