"""Rings of stages in processes of their own, whose computation is a fixed wait: what remains is the way between them.

A tiny llama with wide hidden states, one layer per stage of the longest ring. Its stages' forward passes are replaced
by ones that wait and give tensors of the right shapes; all else is a worker's: servers, links, batches, decoding.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio
import torch

from shardlift.proto.v1 import inference_pb2, inference_pb2_grpc
from shardlift.proto.v1.wire import CHANNEL_OPTIONS
from shardlift.worker.kv import StageCache
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.service import SECRET_HEADER, StageServer
from shardlift.worker.spec import StageSpec
from shardlift.worker.stage import ResidentStage, StepInput
from shardlift.worker.tensors import to_message
from tests.support import checkpoints
from tests.support.ring import SECRET, specs

from .streams import PROMPT_TOKENS, Streams

WIDTH = 8192  # of hidden states: 16 KiB a token in bf16, as in a model of 70B
_START_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """wait_s: what a forward pass takes, of one step or of a batch. batches: several sessions' steps go as one."""

    wait_s: float = 0.0
    batches: bool = True


# ---- a stage's process -----------------------------------------------------------------------------------------------


class _Waiting:
    """What takes the place of a stage's forward passes."""

    def __init__(self, stage: ResidentStage) -> None:
        self._stage = stage
        config = stage.model.config
        self._heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self._width = config.vocab_size if stage.cut.is_last else config.hidden_size
        self._wait_s = 0.0
        stage.forward, stage.forward_rows = self.forward, self.forward_rows  # type: ignore[method-assign]

    def behave(self, behaviour: Behaviour) -> None:
        self._wait_s, self._stage.can_batch = behaviour.wait_s, behaviour.batches

    def forward(self, step: StepInput, cache: StageCache | None, logits_to_keep: int = 0) -> torch.Tensor:
        if self._wait_s:
            time.sleep(self._wait_s)
        rows, tokens = step.input.shape[:2]
        if cache is not None:
            self._grow(cache, rows, tokens)
        kept = logits_to_keep if self._stage.cut.is_last and logits_to_keep else tokens
        return torch.zeros((rows, kept, self._width), dtype=torch.bfloat16)

    def forward_rows(self, steps: Sequence[StepInput], caches: Sequence[StageCache]) -> list[torch.Tensor]:
        if self._wait_s:
            time.sleep(self._wait_s)
        rows = [step.input.shape[0] for step in steps]
        for cache, count in zip(caches, rows, strict=True):
            self._grow(cache, count, 1)
        return list(torch.zeros((sum(rows), 1, self._width), dtype=torch.bfloat16).split(rows))

    def _grow(self, cache: StageCache, rows: int, tokens: int) -> None:
        """Sessions' lengths are asked of their caches."""
        new = torch.zeros((rows, self._heads, tokens, self._head_dim), dtype=torch.bfloat16)
        for layer in cache.held:
            layer.update(new, new)
        cache.advance(tokens)


def _process(parts: dict[int, StageSpec], pipe: Connection) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        asyncio.run(_serve(parts, pipe))


async def _serve(parts: dict[int, StageSpec], pipe: Connection) -> None:
    """parts: this process' stage of each ring, by the ring's number of stages. Ends when the pipe does."""
    stages = {ring: load_stage(spec, None, LoadProgress()).stage for ring, spec in parts.items()}
    waiting = [_Waiting(stage) for stage in stages.values()]
    servers = {ring: StageServer(stage, secret=SECRET, num_stages=ring) for ring, stage in stages.items()}
    try:
        pipe.send({ring: await server.start("127.0.0.1") for ring, server in servers.items()})
        for ring, address in (await asyncio.to_thread(pipe.recv)).items():
            await servers[ring].join(address)
        while True:
            pipe.send(None)
            behaviour = await asyncio.to_thread(pipe.recv)
            for each in waiting:
                each.behave(behaviour)
    finally:
        logging.disable()  # neighbours' streams break as they go
        for server in servers.values():
            await server.stop()


# ---- the caller's side -----------------------------------------------------------------------------------------------


class Rings:
    """A ring for each number of stages, and a caller at its last stage, as the gateway is one."""

    def __init__(self, pipes: Sequence[Connection], addresses: dict[int, str]) -> None:
        self._pipes = pipes
        self._loop = asyncio.new_event_loop()
        self._channels = self._loop.run_until_complete(self._open(addresses))
        self._stubs = {
            ring: inference_pb2_grpc.InferenceServiceStub(channel) for ring, channel in self._channels.items()
        }

    def behave(self, behaviour: Behaviour) -> None:
        for pipe in self._pipes:
            pipe.send(behaviour)
        for pipe in self._pipes:
            _answer(pipe)

    def streams(self, ring: int, count: int, tokens: int) -> Streams:
        return self._loop.run_until_complete(self._streams(ring, count, tokens))

    def close(self) -> None:
        for channel in self._channels.values():
            self._loop.run_until_complete(channel.close())
        self._loop.close()

    async def _open(self, addresses: dict[int, str]) -> dict[int, grpc.aio.Channel]:
        return {
            ring: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for ring, address in addresses.items()
        }

    async def _streams(self, ring: int, count: int, tokens: int) -> Streams:
        started = time.perf_counter()
        times = await asyncio.gather(*(self._stream(ring, tokens) for _ in range(count)))
        return Streams(started=started, times=times)

    async def _stream(self, ring: int, tokens: int) -> list[float]:
        request = inference_pb2.GenerateRequest(input_ids=to_message(torch.arange(3, 3 + PROMPT_TOKENS)[None]))
        request.generation.update({"max_new_tokens": tokens, "do_sample": False})
        times = []
        async for response in self._stubs[ring].Generate(request, metadata=[(SECRET_HEADER, SECRET)]):
            if response.WhichOneof("event") == "step":
                times.append(time.perf_counter())
        return times


@contextlib.contextmanager
def rings(stages: Sequence[int]) -> Iterator[Rings]:
    """One for each of `stages`. A process holds a stage of each: only one ring is used at a time."""
    context = multiprocessing.get_context("spawn")
    longest = max(stages)
    with tempfile.TemporaryDirectory(prefix="shardlift-bench-") as scratch, contextlib.ExitStack() as exits:
        folder = checkpoints.tiny(
            "llama",
            Path(scratch) / "llama",
            layers=longest,
            dtype="bfloat16",
            hidden_size=WIDTH,
            head_dim=16,
            max_position_embeddings=1 << 16,
        )
        cut = {count: specs(folder, [longest * end // count for end in range(1, count)]) for count in stages}
        pipes: list[Connection] = []
        for index in range(longest):
            ours, theirs = context.Pipe()
            parts = {count: each[index] for count, each in cut.items() if index < count}
            process = context.Process(target=_process, args=(parts, theirs), daemon=True)
            process.start()
            theirs.close()
            exits.callback(process.join, 20)
            exits.callback(ours.close)  # it ends the process
            pipes.append(ours)
        addresses: list[dict[int, str]] = [_answer(pipe) for pipe in pipes]
        for index, pipe in enumerate(pipes):
            pipe.send({count: addresses[(index + 1) % count][count] for count in addresses[index]})
        for pipe in pipes:
            _answer(pipe)
        opened = Rings(pipes, {count: addresses[count - 1][count] for count in stages})
        exits.callback(opened.close)
        yield opened


def _answer(pipe: Connection) -> dict[int, str]:
    if not pipe.poll(_START_S):
        raise TimeoutError(f"a stage's process said nothing for {_START_S:.0f} s")
    answer: dict[int, str] = pipe.recv()
    return answer
