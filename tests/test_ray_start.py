"""A head and two workers as the manifests start them, each in a network of its own: what happens between machines.

`ray start` with KubeRay's flags, in separate processes; a job over HTTP; the handle from outside; a node whose cable is
cut; a gateway that is stopped and started in the middle of a stream.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import shardlift
from shardlift.client.connection import Client
from shardlift.proto.v1 import errors
from shardlift.worker.byte_sizes import parse_size
from tests.support import checkpoints
from tests.support.cluster import eventually
from tests.support.machines import Machine, machines
from tests.support.ray_start import BIN, submit
from tests.test_k8s import KUBECTL, env, ray_cluster

pytestmark = [
    pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed (the dev extra brings it)"),
    pytest.mark.timeout(600),
]

IDS = torch.arange(5, 17)[None]
TOKENS = 800
TOKEN = "the-gateways-token"
# The machines' addresses are nobody's: a proxy would look for them elsewhere.
PROXIES = [name for each in ("http_proxy", "https_proxy", "all_proxy") for name in (each, each.upper())]
GATEWAY_PORT, GCS_PORT, DASHBOARD_PORT = 50051, 6379, 8265


@dataclass
class Running:
    """`head`, `first`, `second`: the machines; `spare`: one that has not joined. processes: their `ray start`."""

    head: Machine
    first: Machine
    second: Machine
    spare: Machine
    environment: dict[str, str]
    folder: Path
    stack: contextlib.ExitStack
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_stages(self, *machines: Machine) -> None:
        """Pods of the stages' group; returns once they have joined."""
        (group,) = ray_cluster("overlays/cpu")["workerGroupSpecs"]
        container = group["template"]["spec"]["containers"][0]
        drain_s = env(container)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        for machine in machines:
            own = {
                "SHARDLIFT_CACHE": f"{self.folder}/{machine.address}",
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": drain_s,
            }
            command = ["ray", "start", f"--address={self.head.address}:{GCS_PORT}"]
            command += [f"--node-ip-address={machine.address}", *flags(group)]
            running = machine.running(command, self.environment | own, self.log(machine))
            self.processes[machine.address] = self.stack.enter_context(running)
        for machine in machines:
            eventually(partial(self.has_joined, machine), f"{machine.address} did not join", 180)

    def has_joined(self, machine: Machine) -> bool:
        return "Ray runtime started" in self.log(machine).read_text()

    def log(self, machine: Machine) -> Path:
        return self.folder / f"{machine.address}.log"

    @property
    def address(self) -> str:
        """The gateway's. The overlay has no TLS, and the network is this machine's own: plain text is meant."""
        return f"grpc://{self.head.address}:{GATEWAY_PORT}"

    @property
    def jobs(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @contextlib.contextmanager
    def gateway(self) -> Iterator[subprocess.Popen[bytes]]:
        """The gateway's container."""
        (container,) = (
            each
            for each in ray_cluster("overlays/cpu")["headGroupSpec"]["template"]["spec"]["containers"]
            if each["name"] == "gateway"
        )
        log = self.folder / "gateway.log"
        with self.head.running(container["command"], self.environment, log) as process:
            yield process

    def is_up(self) -> bool:
        try:
            with shardlift.connect(self.address, TOKEN, timeout_s=1) as client:
                client.infos()
        except errors.ShardliftError:
            return False
        return True


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The cluster of k8s/overlays/cpu, without its gateway."""
    folder = tmp_path_factory.mktemp("machines")
    spec = ray_cluster("overlays/cpu")
    (folder / "run").mkdir()
    (folder / "run" / "token").write_text(TOKEN)
    with machines(4, folder / "ray") as (head, first, second, spare):
        environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            # As the head's and the gateway's containers have it, with folders of this test.
            "SHARDLIFT_HOME": str(folder / "run"),
            "RAY_ADDRESS": f"{head.address}:{GCS_PORT}",
            # What KubeRay adds.
            "RAY_AUTH_MODE": spec["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in ("SHARDLIFT_TOKEN", "SHARDLIFT_PORT", *PROXIES):
            environment.pop(name, None)
        # Jobs run in the head's container, and ask the gateway beside them.
        job = environment | {"SHARDLIFT_TOKEN": TOKEN, "SHARDLIFT_ADDRESS": f"127.0.0.1:{GATEWAY_PORT}"}
        with contextlib.ExitStack() as stack:
            command = ["ray", "start", "--head", f"--node-ip-address={head.address}", f"--port={GCS_PORT}"]
            command += flags(spec["headGroupSpec"])
            stack.enter_context(head.running(command, job, folder / "head.log", ready=(head.address, DASHBOARD_PORT)))
            cluster = Running(head, first, second, spare, environment, folder, stack)
            cluster.start_stages(first, second)
            with pytest.MonkeyPatch.context() as patch:
                for name in PROXIES:
                    patch.delenv(name, raising=False)
                yield cluster
            for machine in (head, first, second, spare):
                machine.end()  # rather than wait for Ray's own end


def flags(group: dict[str, Any]) -> list[str]:
    """`ray start`'s, as KubeRay makes them of a group: all of them, ports too."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    values = {"num-cpus": limits["cpu"], "memory": str(parse_size(f"{limits['memory']}B")), **group["rayStartParams"]}
    return [f"--{name}={value}" for name, value in values.items()] + ["--block", "--disable-usage-stats"]


def stream(client: Client, name: str, at: int, disturb: object) -> list[int]:
    """The tokens of a generation that is disturbed after some of them."""
    tokens: list[int] = []
    with client.model(name).stream(IDS, max_new_tokens=TOKENS, do_sample=False) as steps:
        for step in steps:
            tokens += step.token_ids
            if len(tokens) == at:
                disturb()  # type: ignore[operator]
    return tokens


def test_a_cluster_as_the_manifests_start_it(running: Running) -> None:
    folder = checkpoints.tiny("llama", running.folder / "llama", max_position_embeddings=100_000)
    with running.gateway():
        eventually(running.is_up, "the gateway does not answer", 120)

        # A job over HTTP, its progress in its log; the model outlives it.
        command = ["shardlift", "load", str(folder), "--name", "many", "--num-stages", "2"]
        job = submit(running.jobs, running.environment, command)
        assert job.returncode == 0, job.stdout + job.stderr
        assert f"many at 127.0.0.1:{GATEWAY_PORT}" in job.stdout
        assert "stage 0 on" in job.stdout
        assert "\r" not in job.stdout, "no bars where there is no terminal"

        # From outside: another machine's process, with the gateway's token and nothing of Ray.
        with shardlift.connect(running.address, TOKEN) as client:
            model = client.model("many")
            nodes = {stage.node for stage in model.info().plan.stages}
            assert nodes == {running.first.address, running.second.address}
            expected = model.generate(IDS, max_new_tokens=TOKENS, do_sample=False)[0, IDS.shape[1] :].tolist()
        with pytest.raises(errors.AuthenticationError), shardlift.connect(running.address, "wrong") as client:
            client.infos()

    # The gateway's container was told to end, and the model stayed: the next one finds it.
    with running.gateway(), shardlift.connect(running.address, TOKEN, timeout_s=120) as client:
        eventually(running.is_up, "the gateway does not come back", 120)
        assert client.model("many").info().state == "ready"

        # A pod is told to end: Ray says so, and its stage is elsewhere before it goes.
        ending = running.processes[running.second.address]
        assert stream(client, "many", 5, ending.terminate) == expected
        ending.wait(200)
        info = client.model("many").info()
        assert {stage.node for stage in info.plan.stages} == {running.first.address}
        assert (info.moves, info.recoveries) == (1, 0)

        # Another pod comes in its place; then the cable of the first one is cut. Ray needs long to notice.
        running.start_stages(running.spare)
        try:
            assert stream(client, "many", 5, running.first.cut) == expected
        finally:
            running.first.mend()
        info = client.model("many").info()
        assert {stage.node for stage in info.plan.stages} == {running.spare.address}
        assert info.recoveries == 1
        client.unload("many")
