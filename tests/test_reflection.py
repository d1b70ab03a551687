"""A client in another language: all that it knows of the gateway is what reflection tells it, as grpcurl does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import shardlift
from tests.support import checkpoints
from tests.support.cluster import RunningCluster

# No import of ours, and no generated code but that of gRPC's own reflection service.
STRANGER = """
import json, sys
import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
pool = DescriptorPool(database)

def call(service, method, *requests):
    found = pool.FindServiceByName(service).FindMethodByName(method)
    take, give = message_factory.GetMessageClass(found.input_type), message_factory.GetMessageClass(found.output_type)
    kind = ("stream" if found.client_streaming else "unary") + "_" + ("stream" if found.server_streaming else "unary")
    rpc = getattr(channel, kind)(
        f"/{service}/{method}", request_serializer=take.SerializeToString, response_deserializer=give.FromString
    )
    made = [json_format.ParseDict(request, take()) for request in requests]
    answer = rpc(iter(made) if found.client_streaming else made[0], timeout=60)
    return [json_format.MessageToDict(each) for each in (answer if found.server_streaming else [answer])]

package = "shardlift.v1"
ids = {"shape": [1, 4], "dtype": "int64", "data": __import__("base64").b64encode(
    b"".join(number.to_bytes(8, "little") for number in (5, 6, 7, 8))).decode()}
print(json.dumps({
    "services": sorted(database.get_services()),
    "health": call("grpc.health.v1.Health", "Check", {"service": "told"}),
    "models": call(f"{package}.ModelRegistryService", "ListModels", {}),
    "generate": call(f"{package}.InferenceService", "Generate", {
        "model": "told", "inputIds": ids, "generation": {"max_new_tokens": 6, "do_sample": False}}),
    "session": call(f"{package}.InferenceService", "Session",
        {"model": "told", "forward": {"inputIds": ids, "logitsToKeep": 1}},
        {"keep": 2, "forward": {"inputIds": ids, "logitsToKeep": 1}}),
    "ours": sorted(name for name in sys.modules if name.startswith("shardlift")),
}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.tiny("llama", tmp_path)


def test_a_stranger_finds_its_way(cluster: RunningCluster, folder: Path) -> None:
    with shardlift.connect(cluster.gateway) as client:
        model = client.load(str(folder), name="told", num_stages=2)
        expected = model.generate([[5, 6, 7, 8]], max_new_tokens=6, do_sample=False)
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, cluster.gateway], capture_output=True, text=True, timeout=120, check=False
        )
        model.unload()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ours"] == []
    assert {"shardlift.v1.InferenceService", "shardlift.v1.ModelRegistryService", "grpc.health.v1.Health"} <= set(
        told["services"]
    )
    assert told["health"] == [{"status": "SERVING"}]
    assert [model["name"] for model in told["models"][0]["models"]] == ["told"]
    tokens = [int(step["step"]["tokenIds"][0]) for step in told["generate"] if "step" in step]
    assert tokens == expected[0, 4:].tolist()
    lengths = [int(answer["done"]["length"]) for answer in told["session"] if "done" in answer]
    assert lengths == [4, 6]
