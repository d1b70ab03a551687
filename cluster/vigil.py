"""Watches a model's stages over the data plane: who has gone is known at once, or within seconds, and not from Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..proto.v1.credentials import failed_handshake, stage_channel
from ..proto.v1.errors import InvalidRequestError, ModelUnavailableError
from ..proto.v1.tls import TLS
from ..proto.v1.wire import STAGE_CHANNEL_OPTIONS

_CHECK_TIMEOUT_S = 2.0
_TRIES = 2

Metadata = Sequence[tuple[str, str]]


class Vigil:
    """Holds a stream open to each stage, until `close`; `on_loss(index)` is called when one ends."""

    def __init__(
        self, addresses: Sequence[str], metadata: Metadata, on_loss: Callable[[int], None], tls: TLS | None = None
    ) -> None:
        self._tasks = [
            asyncio.create_task(_watch(address, metadata, tls, index, on_loss))
            for index, address in enumerate(addresses)
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _watch(address: str, metadata: Metadata, tls: TLS | None, index: int, on_loss: Callable[[int], None]) -> None:
    # With TLS files that can't be used just now, a stage is as good as lost: what is done about it finds out.
    with contextlib.suppress(grpc.RpcError, InvalidRequestError):
        async with stage_channel(address, tls, STAGE_CHANNEL_OPTIONS) as channel:
            call = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), metadata=metadata, wait_for_ready=False
            )
            async for _ in call:
                pass
    on_loss(index)


async def lost_stages(addresses: Mapping[int, str], metadata: Metadata, tls: TLS | None = None) -> dict[int, bool]:
    """The stages that don't answer, by index, and whether they are silent: a refusal is taken at its word, silence is
    asked about twice.

    Raises ModelUnavailableError where it is TLS that stands between: such a stage is there, and is not to be replaced.
    """
    answers = await asyncio.gather(*(_answers(address, metadata, tls) for address in addresses.values()))
    found = dict(zip(addresses, answers, strict=True))
    for index, answer in found.items():
        if answer not in ("well", "gone", "silent"):
            raise ModelUnavailableError(
                f"TLS with stage {index} at {addresses[index]} fails ({answer}): look at the files of --stage-tls-cert "
                "and --stage-tls-ca, here and on its node"
            )
    return {index: answer == "silent" for index, answer in found.items() if answer != "well"}


async def _answers(address: str, metadata: Metadata, tls: TLS | None) -> str:
    """ "well", "gone", "silent", or what is wrong with the TLS."""
    answer = "silent"
    for _ in range(_TRIES):
        async with stage_channel(address, tls, STAGE_CHANNEL_OPTIONS) as channel:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), metadata=metadata, timeout=_CHECK_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    continue
                text = error.details() or ""
                if tls is None or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    return "gone"
                if (why := failed_handshake(text)) is not None:
                    return why
                # Who takes a connection and closes it may be on its way out: the next one is then not taken.
                if "Socket closed" not in text:
                    return "gone"
                answer = "it may not believe our certificate: it closes the connection"
                continue
            return "well"
    return answer
