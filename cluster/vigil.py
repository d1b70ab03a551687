"""Watches a model's stages over the data plane: who has gone is known at once, or within seconds, and not from Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..proto.v1.wire import STAGE_CHANNEL_OPTIONS

_CHECK_TIMEOUT_S = 2.0
_TRIES = 2

Metadata = Sequence[tuple[str, str]]


class Vigil:
    """Holds a stream open to each stage, until `close`; `on_loss(index)` is called when one ends."""

    def __init__(self, addresses: Sequence[str], metadata: Metadata, on_loss: Callable[[int], None]) -> None:
        self._tasks = [
            asyncio.create_task(_watch(address, metadata, index, on_loss)) for index, address in enumerate(addresses)
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _watch(address: str, metadata: Metadata, index: int, on_loss: Callable[[int], None]) -> None:
    async with grpc.aio.insecure_channel(address, options=STAGE_CHANNEL_OPTIONS) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), metadata=metadata, wait_for_ready=False
        )
        with contextlib.suppress(grpc.RpcError):
            async for _ in call:
                pass
    on_loss(index)


async def lost_stages(addresses: Mapping[int, str], metadata: Metadata) -> dict[int, bool]:
    """The stages that don't answer, by index, and whether they are silent: a refusal is taken at its word, silence is
    asked about twice."""
    answers = await asyncio.gather(*(_answers(address, metadata) for address in addresses.values()))
    return {index: answer == "silent" for index, answer in zip(addresses, answers, strict=True) if answer != "well"}


async def _answers(address: str, metadata: Metadata) -> Literal["well", "gone", "silent"]:
    for _ in range(_TRIES):
        async with grpc.aio.insecure_channel(address, options=STAGE_CHANNEL_OPTIONS) as channel:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), metadata=metadata, timeout=_CHECK_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue
                return "gone"
            return "well"
    return "silent"
