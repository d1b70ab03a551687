"""What a session with a model is, turn by turn, whoever carries it. No I/O."""

from __future__ import annotations

from typing import Any

import torch

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.limits import MOST_RESERVED_TOKENS
from . import asking, forward, tensors
from .answer import Answer, Step
from .collected import Collected, Wanted
from .described import DescribedModel
from .session_call import done


class SessionRecord:
    """One sequence per row, which grows turn by turn: the base of both forms of sessions.

    Shapes: R rows, N new ids, L ids so far.
    """

    def __init__(
        self, model: DescribedModel, adapters: inference_pb2.AdapterChoice | None, reserve_tokens: int | None
    ) -> None:
        if reserve_tokens is not None and not 0 <= reserve_tokens <= MOST_RESERVED_TOKENS:
            raise InvalidRequestError(
                f"reserve_tokens={reserve_tokens}: write a number of tokens, {MOST_RESERVED_TOKENS} at most"
            )
        self._reserve_tokens = reserve_tokens  # until the workers have heard of it
        self._model = model
        self._adapters = adapters
        self._tokens = torch.empty((0, 0), dtype=torch.long)
        self._mask = torch.empty((0, 0), dtype=torch.bool)
        self._cached = 0  # positions whose keys and values the workers hold, of those that count
        self._held = 0  # … and with those that do not count any more

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._tokens)} rows of {self.length} tokens"
        return f"{type(self).__name__}({self._model.name!r}: {state})"

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} belongs to an open call and can't be pickled or copied")

    @property
    def closed(self) -> bool:
        raise NotImplementedError

    @property
    def tokens(self) -> torch.Tensor:
        """The ids of all turns so far, padding included: int64 [R, L]."""
        return self._tokens.clone()

    @property
    def length(self) -> int:
        """How many ids each row has."""
        return self._tokens.shape[1]

    # Inside

    def _roll_back(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InvalidRequestError(f"the session has {self.length} tokens: it can't go back to {length}")
        self._tokens, self._mask = self._tokens[:, :length], self._mask[:, :length]
        self._cached = min(self._cached, length)

    def _action(self, turn: Turn) -> inference_pb2.SessionRequest:
        if self.closed:
            raise InvalidRequestError("this session is closed: start another one with its tokens")
        return inference_pb2.SessionRequest(
            keep=turn.cached if turn.cached < self._held else None, reserve_tokens=self._reserve_tokens
        )

    def _forward_action(self, turn: Turn, position_ids: Any) -> inference_pb2.SessionRequest:
        """The request for a pass over a turn's new ids."""
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
        return action

    def _generation(
        self, new_ids: Any, generation_config: Any, kwargs: dict[str, Any], *, attention_mask: Any, seed: int | None
    ) -> Generating:
        """The turn that a generation takes, of what its user passes."""
        if "adapter" in kwargs:
            raise InvalidRequestError(
                "a session keeps the adapters that it began with, as its keys and values were made with them: name "
                "them when it begins, model.session(adapter=…), or begin another"
            )
        turn = Turn(self, new_ids, attention_mask)
        local, others = asking.split(kwargs)
        if self._model._is_stepwise(generation_config, local, others):
            raise InvalidRequestError(
                "a session runs greedy search and sampling: use model.generate for beams, assistants and code of yours"
            )
        count = {**asking.config_values(generation_config), **others}.get("num_return_sequences")
        if count not in (None, 1):
            raise InvalidRequestError(f"num_return_sequences is {count}: a session goes on with one sequence per row")
        wanted = self._model._wanted(
            tensors.integers(turn.sent, "new_ids"),
            generation_config,
            others,
            attention_mask=turn.mask,
            seed=seed,
            past=turn.cached,
            adapters=self._adapters,
        )
        return Generating(self, turn, wanted)

    def _take(self, turn: Turn, new: torch.Tensor, mask: torch.Tensor, state: inference_pb2.SessionState) -> None:
        tokens = torch.cat([turn.before, new], dim=1)
        # The last token of a generation has had no pass of its own yet.
        if state.rows != len(tokens) or not 0 <= tokens.shape[1] - state.length <= 1:
            raise InternalError(
                f"the session holds {state.length} positions of {state.rows} rows after {list(tokens.shape)} tokens"
            )
        self._reserve_tokens = None
        self._tokens, self._mask = tokens, mask
        self._cached = self._held = state.length


class Generating:
    """A generation in a session: `begin` gives the request, `feed` takes each message of its answer.

    `end` is to be called whatever happens.
    """

    def __init__(self, session: SessionRecord, turn: Turn, wanted: Wanted) -> None:
        self._session = session
        self._turn = turn
        self._wanted = wanted
        self._answer = Answer(wanted.request, draws=wanted.draws)
        self._new: list[list[int]] = []
        self.over = False

    def collected(self, streamer: Any) -> Collected:
        """What collects its steps, and tells them: of the prompt the new ids alone, as its user sees it."""
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._wanted.request)
        request.input_ids.CopyFrom(tensors.integers(self._turn.new, "new_ids"))
        return Collected(Wanted(request=request, as_dict=self._wanted.as_dict), streamer, self._turn.before)

    def begin(self) -> inference_pb2.SessionRequest:
        action = self._session._action(self._turn)
        action.generate.CopyFrom(self._answer.begin())
        return action

    def feed(self, response: inference_pb2.SessionResponse) -> Answer | Step | None:
        """The answer when its prompt is accepted, and each step once it is whole."""
        if response.WhichOneof("event") == "done":
            self._answer.feed(None)
            generated = torch.tensor(self._new, dtype=torch.long).reshape(len(self._new), len(self._turn.new)).T
            new = torch.cat([self._turn.new, generated], dim=1)
            mask = torch.cat([self._turn.mask, _attended(generated, self._answer)], dim=1)
            self._session._take(self._turn, new, mask, done(response))
            self.over = True
            return None
        if response.WhichOneof("event") != "generate":
            raise InternalError("the gateway sent something else in a session where a step was due")
        greeted = self._answer.accepted
        if (step := self._answer.feed(response.generate)) is not None:
            if step.token_ids:
                self._new.append(step.token_ids)
            return step
        return self._answer if self._answer.accepted and not greeted else None

    def end(self) -> None:
        self._answer.abandon()


def _attended(new_ids: torch.Tensor, answer: Answer) -> torch.Tensor:
    """Which of a generation's tokens count: those up to the end of their row [R, new]."""
    if len(answer.row_tokens) != len(new_ids):
        raise InternalError(f"the gateway counts {len(answer.row_tokens)} rows where {len(new_ids)} were generated")
    return torch.arange(new_ids.shape[1]) < torch.tensor(answer.row_tokens, dtype=torch.long)[:, None]


class Turn:
    """What a session sends for new ids: those that the workers lack, and the mask over everything."""

    def __init__(self, session: SessionRecord, new_ids: Any, attention_mask: Any) -> None:
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
