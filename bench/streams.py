"""When each token of each stream came, and the rates that this makes. For models with transformers' `generate`."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Streams that began together at `started`: `times[i]` are the moments at which stream i's tokens came."""

    started: float
    times: Sequence[Sequence[float]]

    @property
    def first_token_s(self) -> float:
        return statistics.median(times[0] for times in self.times) - self.started

    @property
    def step_ms(self) -> float:
        """Between two tokens of a stream."""
        return 1e3 * statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in self.times)

    @property
    def tokens_per_s(self) -> float:
        """While all decode: from the last stream's first token to the first stream's last one."""
        begun, ended = max(times[0] for times in self.times), min(times[-1] for times in self.times)
        if ended <= begun:
            return self.all_tokens_per_s
        return sum(begun < moment <= ended for times in self.times for moment in times) / (ended - begun)

    @property
    def all_tokens_per_s(self) -> float:
        """From the request to the last token: prompts and the streams' stragglers count."""
        return sum(map(len, self.times)) / (max(times[-1] for times in self.times) - self.started)


def medians(runs: Sequence[Streams]) -> dict[str, float]:
    names = ("first_token_s", "step_ms", "tokens_per_s", "all_tokens_per_s")
    return {name: statistics.median(getattr(run, name) for run in runs) for name in names}


class Stopwatch:
    """A streamer that notes when each token comes. The prompt comes first, and is no token."""

    def __init__(self, rows: int = 1) -> None:
        self.times: list[float] = []
        self._rows = rows
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times += [time.perf_counter()] * self._rows
        self._prompt_seen = True

    def end(self) -> None:
        pass


def prompt(index: int) -> torch.Tensor:
    """One of unequal length for each stream; the first has PROMPT_TOKENS."""
    first = 100 + PROMPT_TOKENS * index
    return torch.arange(first, first + PROMPT_TOKENS - index % 4)[None]


def exactly(tokens: int) -> dict[str, Any]:
    """Greedy, and as long as wanted whatever comes out."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


def one(model: Any, tokens: int) -> Streams:
    watch, started = Stopwatch(), time.perf_counter()
    model.generate(prompt(0), streamer=watch, **exactly(tokens))
    return Streams(started=started, times=[watch.times])


def together(model: Any, count: int, tokens: int) -> Streams:
    """`count` callers at the same moment, in threads of their own."""
    watches = [Stopwatch() for _ in range(count)]
    gate = threading.Barrier(count + 1)

    def call(index: int) -> None:
        gate.wait()
        model.generate(prompt(index), streamer=watches[index], **exactly(tokens))

    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(call, index) for index in range(count)]
        gate.wait()
        started = time.perf_counter()
        for each in calls:
            each.result()
    return Streams(started=started, times=[watch.times for watch in watches])


def padded(model: Any, count: int, tokens: int) -> Streams:
    """The same prompts in one call, padded on the left: the best that one process can do, where all come at once."""
    prompts = [prompt(index) for index in range(count)]
    longest = max(each.shape[1] for each in prompts)

    def pad(each: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(each, (longest - each.shape[1], 0))

    ids = torch.cat([pad(each) for each in prompts])
    mask = torch.cat([pad(torch.ones_like(each)) for each in prompts])
    watch, started = Stopwatch(), time.perf_counter()
    model.generate(ids, attention_mask=mask, streamer=watch, **exactly(tokens))
    return Streams(started=started, times=[watch.times] * count)


def repeated(run: Callable[[], Streams], repeat: int) -> dict[str, float]:
    """Medians of `repeat` runs, after one that doesn't count."""
    run()
    return medians([run() for _ in range(repeat)])
