"""Stages land on the very devices of their plan: several raylets with made-up GPUs, uneven in number and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

import shardlift
from shardlift.client.connection import Client
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1 import errors
from tests.support.checkpoints import tiny
from tests.support.cluster import start_gateway

IDS = torch.arange(5, 17)[None]
# Address, GPUs, memory.
NODES = [("127.0.0.21", 0, 512 << 20), ("127.0.0.22", 3, 900 << 20), ("127.0.0.23", 2, 600 << 20)]
WIDE, NARROW = NODES[1][0], NODES[2][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), layers=4, dtype="bfloat16")


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Of the gateway and of Ray. A cluster that this process isn't connected to: another may be in the same run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster()
        try:
            for address, gpus, memory in NODES:
                cluster.add_node(
                    node_ip_address=address,
                    num_cpus=2,
                    num_gpus=gpus,
                    memory=memory,
                    object_store_memory=80 << 20,
                    include_dashboard=False,
                )
            yield start_gateway(cluster.address, tmp_path_factory.mktemp("home")), cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture
def client(addresses: tuple[str, str]) -> Iterator[Client]:
    with shardlift.connect(addresses[0]) as connected:
        yield connected
        for info in connected.infos():
            connected.unload(info.name)


def load(client: Client, folder: Path, name: str, *devices: str, **options: Any) -> RemoteModel:
    """One layer on each of `devices`; the last takes the rest."""
    by_module = {"": devices[0]} | {
        f"model.layers.{layer}": devices[min(layer, len(devices) - 1)] for layer in range(4)
    }
    by_module |= {"model.norm": devices[-1], "lm_head": devices[-1]}
    return client.load(str(folder), name=name, device_map=by_module, **options)


def places(model: RemoteModel) -> list[str]:
    """As the workers themselves tell them."""
    return [stage.place for stage in model.info().plan.stages]


def free(client: Client, folder: Path) -> set[str]:
    """Made-up GPUs of which something may be used."""
    devices = client.plan(str(folder)).devices
    return {f"{each.node}/{each.device}" for each in devices if each.capacity_bytes and each.device != "cpu"}


def test_each_stage_is_on_its_very_device(client: Client, folder: Path) -> None:
    # On both nodes others than Ray would pick.
    wanted = [f"{WIDE}/cpu:2", f"{NARROW}/cpu:1", f"{WIDE}/cpu:0"]
    model = load(client, folder, "crossed", *wanted)
    assert places(model) == wanted
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = whole.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    assert model.hf_device_map["model.embed_tokens"] == wanted[0]
    assert model.hf_device_map["lm_head"] == wanted[-1]


def test_what_is_held_is_not_given_again_and_what_is_freed_is(client: Client, folder: Path) -> None:
    first = load(client, folder, "first", f"{WIDE}/cpu:1")
    second = load(client, folder, "second", f"{WIDE}/cpu:2", f"{NARROW}/cpu:0")
    assert places(second) == [f"{WIDE}/cpu:2", f"{NARROW}/cpu:0"]
    assert free(client, folder) == {f"{WIDE}/cpu:0", f"{NARROW}/cpu:1"}
    with pytest.raises(errors.OutOfMemoryError):
        load(client, folder, "third", f"{WIDE}/cpu:1")
    first.unload()
    assert free(client, folder) == {f"{WIDE}/cpu:0", f"{WIDE}/cpu:1", f"{NARROW}/cpu:1"}
    # The middle one is free, the last one held: not the order in which Ray hands them out.
    third = load(client, folder, "third", f"{WIDE}/cpu:1")
    assert places(third) == [f"{WIDE}/cpu:1"]
    second.unload()
    third.unload()
    assert len(free(client, folder)) == 5


@pytest.mark.soak
def test_a_device_that_somebody_else_holds_is_seen(client: Client, folder: Path, addresses: tuple[str, str]) -> None:
    """By a task of Ray's that is none of ours."""
    script = (
        "import os, ray, time\n"
        f"ray.init(address={addresses[1]!r}, log_to_driver=False, logging_level='ERROR')\n"
        "from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On\n"
        f"node = next(n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == {WIDE!r})\n"
        "@ray.remote(num_gpus=1, num_cpus=0)\n"
        "class Holder:\n"
        "    def which(self): return int(ray.get_gpu_ids()[0])\n"
        "holder = Holder.options(scheduling_strategy=On(node, soft=False)).remote()\n"
        "print(ray.get(holder.which.remote()), flush=True)\n"
        "time.sleep(120)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert holder.stdout is not None
        with holder.stdout:
            taken = int(holder.stdout.readline())
        others = {f"{WIDE}/cpu:{index}" for index in range(3)} - {f"{WIDE}/cpu:{taken}"}
        assert free(client, folder) == {*others, f"{NARROW}/cpu:0", f"{NARROW}/cpu:1"}
        model = load(client, folder, "beside", *sorted(others, reverse=True))
        assert places(model) == sorted(others, reverse=True)
        with pytest.raises(errors.ShardliftError):
            load(client, folder, "onto", f"{WIDE}/cpu:{taken}")
    finally:
        holder.kill()
        holder.wait()
