"""A conversation with a remote model, whose keys and values stay on the workers between its turns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.limits import MOST_RESERVED_TOKENS
from . import asking, forward, tensors
from .answer import Answer, Step
from .collected import Collected, Wanted
from .described import DescribedModel
from .gateway import Gateway
from .session_call import SessionCall, done

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput


class RemoteSession:
    """One sequence per row, which grows turn by turn. Each turn computes what is new in it, and nothing else.

    The keys and values are freed by `close()`, by the end of a `with` block, or when nothing refers to it any more.
    Thread-safe: its turns are taken one after another. A turn that is refused before anything is computed leaves it as
    it was; any other failure ends it.

    Shapes: R rows, N new ids, L ids so far.
    """

    def __init__(
        self,
        model: DescribedModel,
        gateway: Gateway,
        *,
        idle_timeout_s: float | None = None,
        adapters: inference_pb2.AdapterChoice | None = None,
        reserve_tokens: int | None = None,
    ) -> None:
        if reserve_tokens is not None and not 0 <= reserve_tokens <= MOST_RESERVED_TOKENS:
            raise InvalidRequestError(
                f"reserve_tokens={reserve_tokens}: write a number of tokens, {MOST_RESERVED_TOKENS} at most"
            )
        self._reserve_tokens = reserve_tokens  # until the workers have heard of it
        self._model = model
        self._adapters = adapters
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._tokens = torch.empty((0, 0), dtype=torch.long)
        self._mask = torch.empty((0, 0), dtype=torch.bool)
        self._cached = 0  # positions whose keys and values the workers hold, of those that count
        self._held = 0  # … and with those that do not count any more
        self._call = SessionCall(gateway, model.name, idle_timeout_s)

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._tokens)} rows of {self.length} tokens"
        return f"RemoteSession({self._model.name!r}: {state})"

    def __reduce__(self) -> Any:
        raise TypeError("a RemoteSession belongs to an open call and can't be pickled or copied")

    @property
    def tokens(self) -> torch.Tensor:
        """The ids of all turns so far, padding included: int64 [R, L]."""
        return self._tokens.clone()

    @property
    def length(self) -> int:
        """How many ids each row has."""
        return self._tokens.shape[1]

    @property
    def closed(self) -> bool:
        return self._call.closed

    def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._call.close()

    def rollback(self, length: int) -> None:
        """Forgets all but the first `length` ids of each row."""
        with self._alone():
            if not 0 <= length <= self.length:
                raise InvalidRequestError(f"the session has {self.length} tokens: it can't go back to {length}")
            self._tokens, self._mask = self._tokens[:, :length], self._mask[:, :length]
            self._cached = min(self._cached, length)

    def generate(
        self,
        new_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Appends `new_ids` [R, N] and what the model says to them; returns the whole sequences so far [R, L].

        As `RemoteModel.generate`, for greedy search and sampling. Without `new_ids` the model goes on by itself.
        `attention_mask` covers the new ids [R, N], or the whole sequence with them. What a row is filled up with after
        its end is masked in later turns.
        """
        with self._alone():
            turn = _Turn(self, new_ids, attention_mask)
            wanted = self._wanted(turn, generation_config, kwargs, seed)
            collected = Collected(
                Wanted(request=self._request_of_new(wanted, turn), as_dict=wanted.as_dict), streamer, turn.before
            )
            try:
                with contextlib.closing(self._run(turn, wanted, collected)) as events:
                    for event in events:
                        if isinstance(event, Answer):
                            collected.start(event.batch)
            finally:
                collected.end()
            return collected.result

    def stream(
        self,
        new_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Step]:
        """As `generate`, step by step, each with `token_ids`: one per row. Leaving it early ends the session."""
        with self._alone():
            turn = _Turn(self, new_ids, attention_mask)
            wanted = self._wanted(turn, generation_config, kwargs, seed)
            collected = Collected(wanted, None)
            with contextlib.closing(self._run(turn, wanted, collected)) as events:
                for event in events:
                    if isinstance(event, Step):
                        yield event

    def forward(self, ids: Any, *, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        """Appends `ids` [R, N]; returns the logits of their positions [R, N, vocabulary].

        Positions count what is not masked, as `generate` counts them, unless `position_ids` [R or 1, N] are given.
        """
        with self._alone():
            turn = _Turn(self, ids, attention_mask)
            asked = forward.request(
                self._model.name,
                turn.sent,
                turn.mask,
                turn.positions(position_ids),
                # What was not cached yet comes before them.
                logits_to_keep=turn.new.shape[1] or turn.sent.shape[1],
                use_cache=True,
                adapters=self._adapters,
            )
            action = self._action(turn)
            action.forward.CopyFrom(asked)
            try:
                assembly, state = self._call.forward(action)
                self._take(turn, turn.new, turn.mask, state)
            except BaseException:
                self._fail()
                raise
            return tensors.to_torch(assembly)

    __call__ = forward

    # Inside

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One turn at a time. A stream's lasts until its end, so one within it would wait for ever."""
        if self._owner == threading.get_ident():
            raise InvalidRequestError("a turn of this session is still being streamed: read it to its end first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def _wanted(self, turn: _Turn, generation_config: Any, kwargs: dict[str, Any], seed: int | None) -> Wanted:
        if "adapter" in kwargs:
            raise InvalidRequestError(
                "a session keeps the adapters that it began with, as its keys and values were made with them: name "
                "them when it begins, model.session(adapter=…), or begin another"
            )
        local, others = asking.split(kwargs)
        if self._model._is_stepwise(generation_config, local, others):
            raise InvalidRequestError(
                "a session runs greedy search and sampling: use model.generate for beams, assistants and code of yours"
            )
        count = {**asking.config_values(generation_config), **others}.get("num_return_sequences")
        if count not in (None, 1):
            raise InvalidRequestError(f"num_return_sequences is {count}: a session goes on with one sequence per row")
        return self._model._wanted(
            tensors.integers(turn.sent, "new_ids"),
            generation_config,
            others,
            attention_mask=turn.mask,
            seed=seed,
            past=turn.cached,
            adapters=self._adapters,
        )

    def _request_of_new(self, wanted: Wanted, turn: _Turn) -> inference_pb2.GenerateRequest:
        """`wanted`'s request as its user sees it: with the new ids alone."""
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(wanted.request)
        request.input_ids.CopyFrom(tensors.integers(turn.new, "new_ids"))
        return request

    def _action(self, turn: _Turn) -> inference_pb2.SessionRequest:
        if self.closed:
            raise InvalidRequestError("this session is closed: start another one with its tokens")
        return inference_pb2.SessionRequest(
            keep=turn.cached if turn.cached < self._held else None, reserve_tokens=self._reserve_tokens
        )

    def _fail(self) -> None:
        """Ends the session, unless the turn was refused before it began."""
        if not self._call.was_refused:
            self.close()

    def _run(self, turn: _Turn, wanted: Wanted, collected: Collected) -> Generator[Answer | Step]:
        """The turn: its answer once it is accepted, then each step."""
        action = self._action(turn)
        action.generate.CopyFrom(wanted.request)
        answer = Answer(wanted.request)
        try:
            self._call.send(action)
            while True:
                response = self._call.receive()
                if response.WhichOneof("event") == "done":
                    break
                if response.WhichOneof("event") != "generate":
                    raise InternalError("the gateway sent something else in a session where a step was due")
                greeted = answer.accepted
                if (step := answer.feed(response.generate)) is not None:
                    collected.add(step)
                    yield step
                elif answer.accepted and not greeted:
                    yield answer
            answer.feed(None)
            new = torch.cat([turn.new, collected.new_ids], dim=1)
            mask = torch.cat([turn.mask, self._attended(collected.new_ids, wanted)], dim=1)
            self._take(turn, new, mask, done(response))
        except BaseException:  # the end of whoever reads it, too
            self._fail()
            raise

    def _take(self, turn: _Turn, new: torch.Tensor, mask: torch.Tensor, state: inference_pb2.SessionState) -> None:
        tokens = torch.cat([turn.before, new], dim=1)
        # The last token of a generation has had no pass of its own yet.
        if state.rows != len(tokens) or not 0 <= tokens.shape[1] - state.length <= 1:
            raise InternalError(
                f"the session holds {state.length} positions of {state.rows} rows after {list(tokens.shape)} tokens"
            )
        self._reserve_tokens = None
        self._tokens, self._mask = tokens, mask
        self._cached = self._held = state.length

    def _attended(self, new_ids: torch.Tensor, wanted: Wanted) -> torch.Tensor:
        """Which of a generation's tokens count: those up to the end of their row [R, new]."""
        chosen = dict(wanted.request.generation)
        ends = chosen.get("eos_token_id", self._model.generation_config.eos_token_id)
        if ends is None:
            return torch.ones_like(new_ids, dtype=torch.bool)
        numbers = [int(end) for end in ends] if hasattr(ends, "__iter__") else [int(ends)]
        is_end = torch.isin(new_ids, torch.tensor(numbers, dtype=torch.long))
        return (is_end.cumsum(dim=1) - is_end.long()) == 0


class _Turn:
    """What a session sends for new ids: those that the workers lack, and the mask over everything."""

    def __init__(self, session: RemoteSession, new_ids: Any, attention_mask: Any) -> None:
        self.before = session._tokens
        rows, length = self.before.shape
        if new_ids is None:
            self.new = torch.empty((rows, 0), dtype=torch.long)
        else:
            self.new = tensors.ids_to_torch(tensors.integers(new_ids, "new_ids"))
        if not length:
            self.before = torch.empty((len(self.new), 0), dtype=torch.long)
            rows = len(self.new)
        if len(self.new) != rows:
            raise InvalidRequestError(f"new_ids has {len(self.new)} rows, but the session {rows}")
        self.cached = session._cached
        if self.cached == length and not self.new.shape[1]:
            self.cached -= 1  # to go on from what is cached, its last token is passed again
        if self.cached < 0:
            raise InvalidRequestError("new_ids is needed: the session has no tokens yet")
        self.sent = torch.cat([self.before[:, self.cached :], self.new], dim=1)
        before_mask = session._mask if length else torch.empty((rows, 0), dtype=torch.bool)
        self.mask = self._whole_mask(attention_mask, before_mask)

    def positions(self, given: Any) -> torch.Tensor:
        """Of what is sent: int64 [R, sent]. `given` [R or 1, N] are those of the new ids."""
        counted = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, self.cached :]
        if given is None:
            return counted
        new = tensors.ids_to_torch(tensors.integers(given, "position_ids"))
        pending = counted[:, : counted.shape[1] - self.new.shape[1]]
        if new.shape[1] != self.new.shape[1] or len(new) not in (1, len(pending)):
            raise InvalidRequestError(f"position_ids has shape {list(new.shape)}: {list(self.new.shape)} is needed")
        return torch.cat([pending, new.expand(len(pending), -1)], dim=1)

    def _whole_mask(self, given: Any, before: torch.Tensor) -> torch.Tensor:
        """Over all that is there and what is new: bool [R, L + N]."""
        new = torch.ones_like(self.new, dtype=torch.bool)
        if given is None:
            return torch.cat([before, new], dim=1)
        mask = tensors.ids_to_torch(tensors.mask(given, "attention_mask"))
        if mask.shape == new.shape:
            return torch.cat([before, mask], dim=1)
        whole = (len(new), before.shape[1] + new.shape[1])
        if tuple(mask.shape) != whole:
            raise InvalidRequestError(
                f"attention_mask has shape {list(mask.shape)}: {list(new.shape)} for the new ids is needed, "
                f"or {list(whole)} for all"
            )
        return mask
