"""A conversation with a remote model, whose keys and values stay on the workers between its turns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InvalidRequestError
from . import tensors
from .answer import Answer, Step
from .deadline import Deadline
from .described import DescribedModel
from .gateway import Gateway
from .session_call import SessionCall
from .session_record import Generating, SessionRecord, Turn

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput


class RemoteSession(SessionRecord):
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
        super().__init__(model, adapters, reserve_tokens)
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._call = SessionCall(gateway, model.name, idle_timeout_s)

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._call.closed

    def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._call.close()

    def rollback(self, length: int) -> None:
        """Forgets all but the first `length` ids of each row."""
        with self._alone():
            self._roll_back(length)

    def generate(
        self,
        new_ids: Any = None,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Appends `new_ids` [R, N] and what the model says to them; returns the whole sequences so far [R, L].

        As `RemoteModel.generate`, for greedy search and sampling. Without `new_ids` the model goes on by itself.
        `attention_mask` covers the new ids [R, N], or the whole sequence with them. What a row is filled up with after
        its end is masked in later turns. What isn't done in `timeout_s` seconds, once its turn has come, ends with
        DeadlineExceededError, and the session with it.
        """
        with self._alone(), self._in_time(timeout_s):
            running = self._generation(new_ids, generation_config, kwargs, attention_mask=attention_mask, seed=seed)
            collected = running.collected(streamer)
            try:
                with contextlib.closing(self._run(running)) as events:
                    for event in events:
                        if isinstance(event, Answer):
                            collected.start(event.batch)
                        else:
                            collected.add(event)
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
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Iterator[Step]:
        """As `generate`, step by step, each with `token_ids`: one per row. Leaving it early ends the session."""
        with self._alone(), self._in_time(timeout_s):
            running = self._generation(new_ids, generation_config, kwargs, attention_mask=attention_mask, seed=seed)
            with contextlib.closing(self._run(running)) as events:
                for event in events:
                    if isinstance(event, Step):
                        yield event

    def forward(self, ids: Any, *, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        """Appends `ids` [R, N]; returns the logits of their positions [R, N, vocabulary].

        Positions count what is not masked, as `generate` counts them, unless `position_ids` [R or 1, N] are given.
        """
        with self._alone():
            turn = Turn(self, ids, attention_mask)
            action = self._forward_action(turn, position_ids)
            try:
                assembly, state = self._call.forward(action)
                self._take(turn, turn.new, turn.mask, state)
            except BaseException:
                self._fail()
                raise
            return tensors.to_torch(assembly)

    __call__ = forward

    # Inside

    def _in_time(self, timeout_s: float | None) -> AbstractContextManager[None]:
        """Ends the session where what is done within takes longer."""

        def start(seconds: float) -> threading.Timer:
            timer = threading.Timer(seconds, self.close)
            timer.daemon = True
            timer.start()
            return timer

        return Deadline(timeout_s, self._model.name).within(start)

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

    def _run(self, running: Generating) -> Generator[Answer | Step]:
        """The turn: its answer once it is accepted, then each step."""
        action = running.begin()
        try:
            self._call.send(action)
            while not running.over:
                if (event := running.feed(self._call.receive())) is not None:
                    yield event
        except BaseException:  # the end of whoever reads it, too
            self._fail()
            raise
        finally:
            running.end()

    def _fail(self) -> None:
        """Ends the session, unless the turn was refused before it began."""
        if not self._call.was_refused:
            self.close()
