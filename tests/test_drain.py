"""A node is drained in the middle of streams: its stages go elsewhere, and no token is lost or changed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from click.testing import CliRunner
from ray._private.state import available_resources_per_node

import shardlift
from shardlift.client.cli.main import cli
from shardlift.client.connection import Client
from shardlift.client.handle import RemoteModel
from shardlift.client.nodes import StageMove
from shardlift.proto.v1 import errors
from tests.support.checkpoints import tiny
from tests.support.cluster import ADDRESSES, RunningCluster, eventually

IDS = torch.arange(5, 17)[None]
HEAD, FIRST, SECOND = ADDRESSES
TOKENS = 300


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[Client]:
    with shardlift.connect(cluster.gateway) as connected:
        yield connected
        for address in ADDRESSES:
            connected.undrain(address)


@pytest.fixture
def model(cluster: RunningCluster, client: Client, tmp_path: Path) -> Iterator[RemoteModel]:
    folder = tiny("llama", tmp_path / "llama", max_position_embeddings=100_000)
    by_module = {
        "": f"{FIRST}/cpu",
        **{f"model.layers.{layer}": f"{SECOND}/cpu" for layer in (2, 3)},
        "model.norm": f"{SECOND}/cpu",
        "lm_head": f"{SECOND}/cpu",
    }
    loaded = client.load(str(folder), name="movable", device_map=by_module)
    assert places(loaded) == [FIRST, SECOND]
    yield loaded
    loaded.unload()
    cluster.assert_nothing_left()


def places(model: RemoteModel) -> list[str]:
    return [stage.node for stage in model.info().plan.stages]


def run(cluster: RunningCluster, *words: str) -> Any:
    return CliRunner().invoke(cli, [*words, "--address", cluster.gateway])


def test_a_node_is_drained_in_the_middle_of_a_stream(
    cluster: RunningCluster, client: Client, model: RemoteModel
) -> None:
    expected = model.generate(IDS, max_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = []
    moves: list[StageMove] = []
    with model.stream(IDS, max_new_tokens=TOKENS, do_sample=False) as running:
        for step in running:
            tokens += step.token_ids
            if len(tokens) == 5:
                found, done = client.drain(SECOND, on_move=moves.append)
    assert tokens == expected[0, IDS.shape[1] :].tolist()
    assert (found.drained, found.by_ray, found.stages) == (True, False, ())
    assert [(move.stage, move.source.partition("/")[0]) for move in done] == [(1, SECOND)]
    assert [bool(move.seconds) for move in moves] == [False, True]
    assert 0 < done[0].pause_seconds < done[0].seconds

    info = model.info()
    assert (info.state, info.moves, info.recoveries, info.drained_nodes) == ("ready", 1, 0, ())
    assert SECOND not in places(model)
    assert model.residency()[1].measured_bytes == info.plan.stages[1].resident_bytes
    # What it had set aside is free again: the node may go, or be used anew.
    ids = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    total = ray.nodes()[0]["Resources"]["memory"]
    eventually(
        lambda: available_resources_per_node()[ids[SECOND]]["memory"] == total, "the node's memory stays reserved"
    )
    assert len(cluster.stage_workers()) == 2

    # No plan takes it, and who names it is told why not.
    listed = json.loads(run(cluster, "nodes", "--json").stdout)
    assert {node["name"]: node["drained"] for node in listed} == {HEAD: False, FIRST: False, SECOND: True}
    path = model.info().path
    planned = client.plan(path, num_stages=4)
    assert SECOND not in {stage.node for stage in planned.stages}
    with pytest.raises(
        errors.InvalidDeviceMapError, match=rf"drained nodes are left out: {SECOND} \(`shardlift undrain`"
    ):
        client.plan(path, device_map={"": f"{SECOND}/cpu"})

    # A new controller knows it still, and where the stage went.
    at = places(model)
    os.kill(cluster.pid("controller"), signal.SIGKILL)

    def is_back() -> bool:
        try:
            with shardlift.connect(cluster.gateway, timeout_s=1) as again:
                return (
                    places(again.model("movable")) == at and [node.drained for node in again.nodes()].count(True) == 1
                )
        except errors.ShardliftError:
            return False

    eventually(is_back, "the new controller doesn't know what was drained", 60)
    assert torch.equal(model.generate(IDS, max_new_tokens=TOKENS, do_sample=False), expected)

    # Everything else drained, too: what is left has all stages.
    if HEAD in at:
        client.drain(HEAD)
    assert places(model) == [FIRST, FIRST]
    client.drain(HEAD)
    assert torch.equal(model.generate(IDS, max_new_tokens=TOKENS, do_sample=False), expected)

    # And that one can't be: nothing is touched.
    refused = run(cluster, "drain", FIRST)
    assert refused.exit_code == 1
    assert f"node {FIRST} can't be drained: stage" in refused.stderr
    assert "No stage was moved" in refused.stderr
    assert {node.name for node in client.nodes() if node.drained} == {HEAD, SECOND}
    assert places(model) == [FIRST, FIRST]

    undrained = run(cluster, "undrain", SECOND)
    assert undrained.exit_code == 0, undrained.stderr
    drained = run(cluster, "drain", FIRST, "--json")
    assert drained.exit_code == 0, drained.stderr
    values = json.loads(drained.stdout)
    assert [(move["stage"], move["target"]) for move in values["moves"]] == [(0, f"{SECOND}/cpu"), (1, f"{SECOND}/cpu")]
    assert values["stages"] == []
    assert torch.equal(model.generate(IDS, max_new_tokens=TOKENS, do_sample=False), expected)


def test_a_drain_that_is_given_up_takes_back_what_it_began(
    cluster: RunningCluster, client: Client, model: RemoteModel
) -> None:
    def give_up(move: StageMove) -> None:
        raise KeyboardInterrupt  # while the stage is loaded elsewhere

    with pytest.raises(KeyboardInterrupt):
        client.drain(SECOND, on_move=give_up)
    assert places(model) == [FIRST, SECOND]
    eventually(lambda: len(cluster.stage_workers()) == 2, "the second worker is left", 30)
    eventually(lambda: len(cluster.placement_groups()) == 2, "its placement group is left", 30)
    eventually(lambda: model.info().drained_nodes == (SECOND,), "the node is not marked")
    shown = run(cluster, "show", "movable")
    assert f"drained, with a stage still: {SECOND}" in shown.stdout
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, IDS.shape[1] + 4)
    with pytest.raises(TimeoutError):
        client.drain(SECOND, timeout_s=0.01)
    assert places(model) == [FIRST, SECOND]


def test_nodes_have_several_names(cluster: RunningCluster, client: Client) -> None:
    (node,) = (node for node in client.nodes() if node.name == SECOND)
    assert client.drain(node.node_id[:10])[0].name == SECOND
    assert client.undrain(node.node_id).drained is False
    with pytest.raises(
        errors.InvalidRequestError, match=r"'nowhere' is no node of this cluster; nodes are 127\.0\.0\.2"
    ):
        client.drain("nowhere")
    with pytest.raises(errors.InvalidRequestError, match="means 3 nodes"):
        client.drain(node.hostname)
