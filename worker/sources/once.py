"""What is asked of a store once for each file, however many threads want it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Generic, TypeVar

AnswerT = TypeVar("AnswerT")


class OncePerFile(Generic[AnswerT]):
    """Answers by file. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._answers: dict[str, AnswerT] = {}

    def __repr__(self) -> str:
        with self._lock:
            return f"OncePerFile({self._answers!r})"

    def get(self, file: str, ask: Callable[[], AnswerT]) -> AnswerT:
        """The file's answer: where there is none, one thread asks, and the others wait for what it gets."""
        with self._lock:
            asking = self._asking[file]
        with asking:
            with self._lock:
                if file in self._answers:
                    return self._answers[file]
            answer = ask()
            self.put(file, answer)
            return answer

    def put(self, file: str, answer: AnswerT) -> None:
        with self._lock:
            self._answers[file] = answer

    def forget(self, file: str, stale: AnswerT) -> None:
        """Drops the answer, unless another one has come in its place."""
        with self._lock:
            if self._answers.get(file) is stale:
                del self._answers[file]
