"""What the gateway's health service and its errors say to clients that know nothing but gRPC."""

from __future__ import annotations

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.proto.v1 import registry_pb2, registry_pb2_grpc
from tests.support import gateway


async def test_services_are_healthy_by_their_names() -> None:
    async with gateway.serve(GatewayOptions()) as address, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "shardlift.v1.InferenceService", "shardlift.v1.ModelRegistryService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="shardlift.v1.Nothing"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_error_names_the_model() -> None:
    async with gateway.serve(GatewayOptions()) as address, grpc.aio.insecure_channel(address) as channel:
        registry = registry_pb2_grpc.ModelRegistryServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await registry.GetModel(registry_pb2.GetModelRequest(name="llama"))
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type] # it is a Call, too
        assert status is not None
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.reason, dict(info.metadata)) == ("ModelNotFoundError", {"model": "llama"})
        assert len(status.details) == 1
