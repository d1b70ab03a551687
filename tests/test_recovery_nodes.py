"""Nodes lost in the middle of streams: a stage goes to a spare device; without one the model says so, and waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.cluster_utils import Cluster

import shardlift
from shardlift.client.connection import Client
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1 import errors
from tests.support.checkpoints import tiny
from tests.support.cluster import eventually, start_gateway

IDS = torch.arange(5, 17)[None]
HEAD, FIRST, SECOND, SPARE, LATE, LAST = (f"127.0.0.{number}" for number in range(31, 37))


def node(address: str, slots: int) -> dict[str, Any]:
    return {
        "node_ip_address": address,
        # The head takes no work.
        "num_cpus": 2 * slots,
        "num_gpus": slots,
        "memory": 500 << 20,
        "object_store_memory": 80 << 20,
        "include_dashboard": False,
    }


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, dict[str, Any], str]]:
    """A cluster whose nodes have one made-up GPU each, the nodes by their addresses, and the gateway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("SHARDLIFT_CACHE", str(tmp_path_factory.mktemp("parts")))
        cluster = Cluster()
        try:
            found = {HEAD: cluster.add_node(**node(HEAD, 0))}
            for address in (FIRST, SECOND, SPARE):
                found[address] = cluster.add_node(**node(address, 1))
            yield cluster, found, start_gateway(cluster.address, tmp_path_factory.mktemp("home"))
        finally:
            cluster.shutdown()


@pytest.fixture
def client(nodes: tuple[Cluster, dict[str, Any], str]) -> Iterator[Client]:
    with shardlift.connect(nodes[2]) as connected:
        yield connected


def places(model: RemoteModel) -> list[str]:
    return [stage.place.partition("/")[0] for stage in model.info().plan.stages]


def health(address: str, model: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=model)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)


def test_a_lost_node(
    nodes: tuple[Cluster, dict[str, Any], str], client: Client, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One after the other: with a spare device, without one, and with one that comes later."""
    cluster, found, gateway = nodes
    folder = tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)
    by_module = {
        "": f"{FIRST}/cpu:0",
        **{f"model.layers.{layer}": f"{SECOND}/cpu:0" for layer in (2, 3)},
        "model.norm": f"{SECOND}/cpu:0",
        "lm_head": f"{SECOND}/cpu:0",
    }
    model = client.load(str(folder), name="movable", device_map=by_module)
    assert places(model) == [FIRST, SECOND]
    expected = model.generate(IDS, max_new_tokens=300, do_sample=False)

    def lose_in_the_middle(address: str) -> None:
        tokens: list[int] = []
        with model.stream(IDS, max_new_tokens=300, do_sample=False) as running:
            for step in running:
                tokens += step.token_ids
                if len(tokens) == 5:
                    cluster.remove_node(found[address], allow_graceful=False)
        assert tokens == expected[0, IDS.shape[1] :].tolist()

    # A spare device.
    lose_in_the_middle(SECOND)
    assert places(model) == [FIRST, SPARE]
    assert model.hf_device_map["lm_head"].startswith(SPARE)
    assert health(gateway, "movable") == health_pb2.HealthCheckResponse.SERVING
    assert model.residency()[1].measured_bytes == model.info().plan.stages[1].resident_bytes

    # None: running streams and new requests are told so, well before their deadline.
    failures: list[BaseException] = []

    def stream() -> None:
        try:
            for _ in model.stream(IDS, max_new_tokens=50_000, do_sample=False):
                pass
        except errors.ShardliftError as error:
            failures.append(error)

    thread = threading.Thread(target=stream)
    thread.start()
    time.sleep(0.5)
    cluster.remove_node(found[SPARE], allow_graceful=False)
    thread.join(60)
    assert [type(failure) for failure in failures] == [errors.ModelUnavailableError]
    assert "no other has free" in str(failures[0])
    eventually(lambda: model.info().state == "unavailable", "it is not said to be unavailable")
    assert health(gateway, "movable") == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(errors.ModelUnavailableError, match="stage 1 is lost"):
        model.generate(IDS, max_new_tokens=4)

    # Capacity returns.
    found[LATE] = cluster.add_node(**node(LATE, 1))
    eventually(lambda: model.info().state == "ready", "it did not come back", timeout_s=90)
    assert places(model) == [FIRST, LATE]
    assert torch.equal(model.generate(IDS, max_new_tokens=300, do_sample=False), expected)

    # The first stage's node, as well.
    found[LAST] = cluster.add_node(**node(LAST, 1))
    lose_in_the_middle(FIRST)
    assert places(model) == [LAST, LATE]
    model.unload()
    eventually(lambda: client.infos() == [], "it is not gone")
