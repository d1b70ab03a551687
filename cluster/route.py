"""The way from the gateway to a resident model: a channel to its last stage."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio

from ..proto.v1 import inference_pb2, inference_pb2_grpc
from ..proto.v1.credentials import stage_channel
from ..proto.v1.errors import InternalError, ModelUnavailableError
from ..proto.v1.status import from_rpc_error, sent_by_us
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.tls import TLS
from ..proto.v1.wire import STAGE_CHANNEL_OPTIONS
from ..worker.service import SECRET_HEADER

CANARY_TIMEOUT_S = 120.0


class Route:
    """`address`: the last stage's; `secret`: the model's own; `tls`: the stages'."""

    def __init__(self, address: str, secret: str, tls: TLS | None = None) -> None:
        self.address = address
        self.closed = False
        self.metadata = [(SECRET_HEADER, secret)]
        self._channel = stage_channel(address, tls, STAGE_CHANNEL_OPTIONS)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def canary(self, timeout_s: float = CANARY_TIMEOUT_S) -> None:
        """One token through every stage. Raises what stands in its way."""

        async def one_token() -> AsyncIterator[inference_pb2.ForwardRequest]:
            ids = Tensor(shape=[1, 1], dtype="int64", data=bytes(8))
            yield inference_pb2.ForwardRequest(input_ids=ids, logits_to_keep=1, use_cache=True)

        call = self.stub.Forward(one_token(), metadata=self.metadata, timeout=timeout_s)
        try:
            async for answer in call:
                if answer.WhichOneof("part") == "logits":
                    return
        except grpc.aio.AioRpcError as error:
            raise self.explain(error) from None
        finally:
            call.cancel()
        raise InternalError("the canary came back without logits")

    def explain(self, error: grpc.aio.AioRpcError) -> Exception:
        """What a failed call means to a client: the stage's own error, else that the model is unavailable."""
        if sent_by_us(error):
            return from_rpc_error(error, self.address)
        text = " ".join(str(error.details() or "").split())
        return ModelUnavailableError(
            f"the model's last stage at {self.address} doesn't answer ({error.code().name}: {text})"
        )

    async def close(self) -> None:
        """Ends the calls under way."""
        self.closed = True
        await self._channel.close(None)
