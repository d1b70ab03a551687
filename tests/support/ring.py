"""A model's stages served over real gRPC on loopback, in this process: everything but Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import torch

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import CanKeep, ModelOptions, outline_model
from shardlift.proto.v1 import inference_pb2, inference_pb2_grpc
from shardlift.proto.v1.credentials import stage_channel
from shardlift.proto.v1.tls import TLS
from shardlift.proto.v1.wire import CHANNEL_OPTIONS, Assembly
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.service import SECRET_HEADER, StageServer
from shardlift.worker.spec import SessionLimits, StageSpec
from shardlift.worker.stage import ResidentStage
from shardlift.worker.tensors import from_bytes, to_message
from shardlift.worker.trial import try_batches

SECRET = "the ring's secret"


def specs(
    folder: Path,
    ends: Sequence[int],
    *,
    quantization: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantize_experts: bool | None = False,
    requantize: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    model: ModelOptions | None = None,
    can_keep: CanKeep | None = None,
    request: CheckpointRequest | None = None,
    token: str | None = None,
) -> list[StageSpec]:
    """Specs of the stages that end before the layers `ends`; the last one takes the rest. All on one device.

    model: in place of the options that are given one by one. request: in place of one for `folder`.
    """
    ends = [*ends, -1]
    options = model or ModelOptions(
        dtype=dtype,
        quantization=quantization,
        attn_implementation=attn_implementation,
        quantize_experts=quantize_experts,
        requantize=requantize,
    )
    request = request or CheckpointRequest(path=str(folder), trust_remote_code=trust_remote_code)
    outlined = outline_model(request, token, options, can_keep)
    outline = outlined.layout.outline
    layers = len(outline.sizes.layers)
    by_module: dict[str, str] = {"": "0"}
    base = next(name for name, place in outline.modules if place.part == "layer").rsplit(".", 1)[0]
    first = 0
    for index, end in enumerate(ends):
        last = layers if end < 0 else end
        by_module |= {f"{base}.{layer}": str(index) for layer in range(first, last)}
        first = last
    for name, place in outline.modules:
        if place.part == "after":
            by_module[name] = str(len(ends) - 1)
    spread = PlanOptions(by_module=by_module)
    planned = outlined.spread(spread, parse_devices(f"{len(ends)}x1TiB"))
    return [replace(spec, device=device) for spec in planned.specs("model", "load", SECRET)]


class Ring:
    """The client's side of a ring: what the gateway would do."""

    def __init__(
        self, stages: list[ResidentStage], servers: list[StageServer], addresses: list[str], tls: TLS | None
    ) -> None:
        self.stages = stages
        self.servers = servers
        self.addresses = addresses
        self.tls = tls
        self.channel = stage_channel(addresses[-1], tls, CHANNEL_OPTIONS)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.metadata = [(SECRET_HEADER, SECRET)]

    def session(self) -> ForwardSession:
        return ForwardSession(self)

    async def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        seed: int | None = None,
        output_logits: bool = False,
        **fields: Any,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """New tokens [rows, new], and each step's logits [rows, vocabulary] if asked for."""
        request = inference_pb2.GenerateRequest(input_ids=to_message(input_ids), seed=seed, output_logits=output_logits)
        if attention_mask is not None:
            request.attention_mask.CopyFrom(to_message(attention_mask))
        request.generation.update(fields)
        tokens: list[list[int]] = []
        logits: list[torch.Tensor] = []
        assembly: Assembly | None = None
        async for response in self.stub.Generate(request, metadata=self.metadata):
            kind = response.WhichOneof("event")
            if kind == "step":
                tokens.append(list(response.step.token_ids))
                assembly = Assembly(response.step.logits) if response.step.HasField("logits") else None
            elif kind == "more":
                assert assembly is not None
                assembly.add(response.more)
            if assembly is not None and assembly.complete:
                logits.append(from_bytes(assembly.shape, assembly.dtype, assembly.data))
                assembly = None
        return torch.tensor(tokens).T, logits

    @property
    def kv_bytes(self) -> list[int]:
        return [server.pipeline.kv_bytes for server in self.servers]

    async def idle(self, timeout_s: float = 5.0) -> None:
        """Returns once no stage holds a session; fails when one still does after `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while any(server.pipeline.sessions for server in self.servers):
            assert asyncio.get_running_loop().time() < deadline, f"sessions that ended hold {self.kv_bytes} bytes"
            await asyncio.sleep(0.01)
        assert self.kv_bytes == [0] * len(self.servers)


class ForwardSession:
    """One Forward call: passes that share a cache."""

    def __init__(self, ring: Ring) -> None:
        self._call = ring.stub.Forward(metadata=ring.metadata)

    async def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        request = inference_pb2.ForwardRequest(
            input_ids=to_message(input_ids), use_cache=use_cache, logits_to_keep=logits_to_keep
        )
        if attention_mask is not None:
            request.attention_mask.CopyFrom(to_message(attention_mask))
        if position_ids is not None:
            request.position_ids.CopyFrom(to_message(position_ids))
        await self._call.write(request)
        response = await self._call.read()
        if response is grpc.aio.EOF:
            await self._call  # raises what ended it
            raise AssertionError("the call ended without an answer")
        assembly = Assembly(response.logits)
        while not assembly.complete:
            assembly.add((await self._call.read()).more)
        return from_bytes(assembly.shape, assembly.dtype, assembly.data)

    async def close(self) -> None:
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF


def load(folder: Path, ends: Sequence[int], **options: Any) -> list[ResidentStage]:
    return [load_stage(spec, None, LoadProgress()).stage for spec in specs(folder, ends, **options)]


@contextlib.asynccontextmanager
async def serve(
    stages: list[ResidentStage],
    *,
    batches: bool = True,
    limits: SessionLimits | None = None,
    tokenizer: Callable[[], Any] | None = None,
    tls: TLS | None = None,
) -> AsyncIterator[Ring]:
    """Serves loaded stages as a closed ring."""
    servers = [
        StageServer(stage, secret=SECRET, num_stages=len(stages), limits=limits, tokenizer=tokenizer, tls=tls)
        for stage in stages
    ]
    for server in servers:
        server.pipeline.stage.can_batch = server.pipeline.stage.is_row_blind = False
        if batches:
            await server.pipeline.run("", lambda stage=server.pipeline.stage: try_batches(stage))
    addresses = [await server.start("127.0.0.1") for server in servers]
    for index, server in enumerate(servers):
        await server.join(addresses[(index + 1) % len(addresses)])
    ring = Ring(stages, servers, addresses, tls)
    try:
        yield ring
    finally:
        await ring.channel.close()
        # Together: each waits for its neighbour's call to end.
        await asyncio.gather(*(server.stop() for server in servers))
