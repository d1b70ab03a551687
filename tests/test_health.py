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

REFLECTION = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


async def test_services_are_healthy_by_their_names() -> None:
    async with gateway.serve(GatewayOptions()) as address, grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "shardlift.v1.InferenceService", "shardlift.v1.ModelRegistryService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="shardlift.v1.Nothing"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch", REFLECTION])
async def test_grpcs_own_services_refuse_what_is_no_message(method: str, caplog: pytest.LogCaptureFixture) -> None:
    async with gateway.serve(GatewayOptions()) as address, grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{method}")(iter([b"\xff\xff"]), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "can't be read" in str(caught.value.details())
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


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
