"""A Session call to a ring of stages."""

from __future__ import annotations

from typing import Any

import grpc.aio
import torch

from shardlift.proto.v1 import inference_pb2
from shardlift.proto.v1.status import from_refusal
from shardlift.proto.v1.wire import Assembly
from shardlift.worker.tensors import from_bytes, to_message

from .ring import Ring


class Session:
    """A Session call, action by action."""

    def __init__(self, pipeline: Ring) -> None:
        self.call = pipeline.stub.Session(metadata=pipeline.metadata)
        self.length = self.rows = 0

    async def act(self, **fields: Any) -> tuple[torch.Tensor | None, list[list[int]]]:
        """Logits of a pass, tokens of a generation. Raises what it was refused with."""
        await self.call.write(inference_pb2.SessionRequest(**fields))
        logits: Assembly | None = None
        tokens: list[list[int]] = []
        while True:
            response = await self.call.read()
            assert response is not grpc.aio.EOF
            kind = response.WhichOneof("event")
            if kind == "refused":
                raise from_refusal(response.refused)
            if kind == "done":
                self.length, self.rows = response.done.length, response.done.rows
                break
            if kind == "forward":
                if response.forward.HasField("logits"):
                    logits = Assembly(response.forward.logits)
                else:
                    assert logits is not None
                    logits.add(response.forward.more)
            elif response.generate.HasField("step"):
                tokens.append(list(response.generate.step.token_ids))
        return None if logits is None else from_bytes(logits.shape, logits.dtype, logits.data), tokens

    async def forward(self, ids: torch.Tensor, **fields: Any) -> torch.Tensor:
        logits, _ = await self.act(forward=inference_pb2.ForwardRequest(input_ids=to_message(ids)), **fields)
        assert logits is not None
        return logits

    async def generate(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, keep: int | None = None, **fields: Any
    ) -> torch.Tensor:
        """New tokens [rows, new]."""
        request = inference_pb2.GenerateRequest(input_ids=to_message(ids), seed=fields.pop("seed", None))
        if mask is not None:
            request.attention_mask.CopyFrom(to_message(mask))
        request.generation.update(fields)
        _, tokens = await self.act(generate=request, keep=keep)
        return torch.tensor(tokens).T

    async def close(self) -> None:
        await self.call.done_writing()
        assert await self.call.read() is grpc.aio.EOF
