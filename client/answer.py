"""What one generation tells, message by message, over one call or, where a gateway is lost, over several. No I/O."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import Assembly
from .tensors import check_request_size

if TYPE_CHECKING:
    from .draws import Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: an id per row, its text where the request was text, its logits where they were asked for."""

    token_ids: list[int]
    text: str = ""
    logits: Assembly | None = None
    scores: Assembly | None = None


class Answer:
    """The answer to `asked` so far: `feed` it each message of the call, in order.

    A step is given once it is whole. After a loss, `resumed` is the request that makes another call go on behind the
    last step given: nothing is told twice, and nothing left out.
    """

    def __init__(self, asked: inference_pb2.GenerateRequest, *, draws: bool = False) -> None:
        """draws: from torch's global generator, once `begin` says so."""
        self.batch = 0
        self.prompt_tokens = 0
        self.prompt_ids: list[int] = []
        self.new_tokens = 0
        self.row_tokens: list[int] = []
        self.finish_reason = ""
        self.accepted = False
        self.finished = False
        self.over = False
        self._asked = asked
        self._is_drawn = draws
        self._draws: Draws | None = None
        self._rounds: list[list[int]] = []  # the tokens of each step given
        self._tail_given = False
        self._greeted = False  # by the call that is running
        self._step: inference_pb2.GeneratedStep | None = None
        self._tensors: list[Assembly] = []  # of `_step`, those that lack bytes

    def begin(self) -> inference_pb2.GenerateRequest:
        """The request to begin with."""
        if self._is_drawn:
            from .draws import Draws

            self._draws = Draws(self._asked)
        return self._asked

    def abandon(self) -> None:
        """To be called when no more will be fed. An answer of which nothing came has drawn nothing."""
        draws, self._draws = self._draws, None
        if draws is not None and not self._rounds:
            draws.over()

    def feed(self, response: inference_pb2.GenerateResponse | None) -> Step | None:
        """Takes the call's next message, or None for its end. Raises InternalError for one that can't come here."""
        event = None if response is None else response.WhichOneof("event")
        if not self._greeted:
            if response is None or event != "accepted":
                raise InternalError("the gateway's answer did not start with the prompt's acceptance")
            self._greet(response.accepted)
            return None
        if self._step is not None:
            if response is None or event != "more":
                raise InternalError("the gateway broke off in the middle of a tensor")
            self._tensors[0].add(response.more)
            return self._whole()
        if self.finished:
            if response is not None:
                raise InternalError("the gateway went on after the end of its answer")
            self.over = True
            return None
        if response is None:
            raise InternalError("the gateway's answer stopped before its end")
        match event:
            case "step":
                return self._open(response.step)
            case "finished":
                self.new_tokens = response.finished.new_tokens
                self.row_tokens = list(response.finished.row_tokens)
                self.finish_reason = response.finished.reason
                self.finished = True
                draws, self._draws = self._draws, None
                if draws is not None:
                    draws.over(response.finished.generator_state)
            case None:
                pass  # an event that this client is too old to know
            case other:
                raise InternalError(f"the gateway sent {other!r} where a step was due")
        return None

    def resumed(self) -> inference_pb2.GenerateRequest | None:
        """The request to go on with over another call; None where it would not fit a message."""
        self._greeted, self._step, self._tensors = False, None, []
        again = inference_pb2.GenerateRequest()
        again.CopyFrom(self._asked)
        if self._rounds:
            numbers = array("q", [token for row in zip(*self._rounds, strict=True) for token in row])
            if sys.byteorder == "big":
                numbers.byteswap()
            shape = [len(self._rounds[0]), len(self._rounds)]
            again.generated.CopyFrom(Tensor(shape=shape, dtype="int64", data=numbers.tobytes()))
            try:
                check_request_size(again.input_ids, again.attention_mask, again.generated)
            except InvalidRequestError:
                return None
        return again

    def _greet(self, accepted: inference_pb2.PromptAccepted) -> None:
        self._greeted = True
        if self.accepted:
            if accepted.batch != self.batch:
                raise InternalError(f"the gateway goes on with {accepted.batch} rows where there were {self.batch}")
            return
        self.accepted = True
        self.batch = accepted.batch
        self.prompt_tokens = accepted.prompt_tokens
        self.prompt_ids = list(accepted.prompt_ids)

    def _open(self, step: inference_pb2.GeneratedStep) -> Step | None:
        self._step = step
        self._logits = Assembly(step.logits) if step.HasField("logits") else None
        self._scores = Assembly(step.scores) if step.HasField("scores") else None
        # What one message could not hold follows: first the rest of the logits, then that of the scores.
        self._tensors = [tensor for tensor in (self._logits, self._scores) if tensor is not None]
        return self._whole()

    def _whole(self) -> Step | None:
        while self._tensors and self._tensors[0].complete:
            self._tensors.pop(0)
        if self._tensors or self._step is None:
            return None
        token_ids, text = list(self._step.token_ids), self._step.text
        self._step = None
        if token_ids:
            self._rounds.append(token_ids)
        elif self._tail_given:
            return None  # the text that was held back to the end, once more after a loss
        self._tail_given = not token_ids
        return Step(token_ids=token_ids, text=text, logits=self._logits, scores=self._scores)


class Answered:
    """What a running generation tells of its answer, whoever carries it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    @property
    def batch(self) -> int:
        return self._answer.batch

    @property
    def prompt_tokens(self) -> int:
        return self._answer.prompt_tokens

    @property
    def prompt_ids(self) -> list[int]:
        return self._answer.prompt_ids

    @property
    def new_tokens(self) -> int:
        return self._answer.new_tokens

    @property
    def finish_reason(self) -> str:
        return self._answer.finish_reason
