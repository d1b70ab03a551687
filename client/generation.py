"""A running `Generate` call, for code that blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import DeadlineExceededError, GatewayUnavailableError
from .answer import Answer, Answered, Step
from .deadline import Deadline
from .gateway import Gateway
from .patience import Patience


class Generation(Answered, Iterator[Step]):
    """A running `Generate` call: iterate over its steps.

    `batch`, `prompt_tokens` and `prompt_ids` are known after `start()` or the first step, `new_tokens` and
    `finish_reason` at the end. Leaving it early (`close`, the end of a `with` block, Ctrl-C) cancels the call. A
    gateway that goes away meanwhile is waited for, and asked to go on behind the last step.
    """

    def __init__(
        self,
        gateway: Gateway,
        asked: inference_pb2.GenerateRequest,
        *,
        draws: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """draws: from torch's global generator. timeout_s: beyond which it ends with DeadlineExceededError."""
        super().__init__(Answer(asked, draws=draws))
        self._closed = False
        self._gateway = gateway
        self._patience = Patience(gateway.retry_s)
        self._deadline = Deadline(timeout_s, asked.model)
        try:
            self._call = gateway.inference_stream("Generate", self._answer.begin(), self._deadline.left_s)
        except BaseException:
            self._answer.abandon()
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self.close()

    def close(self) -> None:
        """Cancels the call where it is still running."""
        self._closed = True
        self._call.cancel()
        self._answer.abandon()

    def start(self) -> None:
        """Returns once the gateway has accepted the prompt. Raises what it refused it with."""
        while not self._closed and not self._answer.accepted:
            self._advance()

    def __next__(self) -> Step:
        while not self._closed and not self._answer.over:
            if (step := self._advance()) is not None:
                return step
        raise StopIteration

    def _advance(self) -> Step | None:
        """Takes one message; a step, where that makes one whole."""
        try:
            try:
                response = self._receive()
            except GatewayUnavailableError as error:
                self._go_on(error)
                return None
            except DeadlineExceededError as error:
                raise self._deadline.error(error) from None
            self._patience.heard()
            return None if self._closed else self._answer.feed(response)
        except BaseException:
            self.close()
            raise

    def _go_on(self, lost: GatewayUnavailableError) -> None:
        if self._answer.finished:
            self._answer.feed(None)  # nothing but the call's end was lost
            return
        if (asked := self._answer.resumed()) is None:
            raise lost
        try:
            self._gateway.wait_for_return(self._patience.within(self._deadline.left_s), lost)
        except GatewayUnavailableError:
            if self._deadline.passed:
                raise self._deadline.error(lost) from None
            raise
        call = self._gateway.inference_stream("Generate", asked, self._deadline.left_s)
        self._call = call
        if self._closed:  # by another thread, while nobody answered
            call.cancel()

    def _receive(self) -> Any:
        with self._gateway.errors():
            try:
                return next(self._call, None)
            except grpc.RpcError:
                if self._closed:  # it was our own `close`
                    return None
                raise
