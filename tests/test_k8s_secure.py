"""The overlay `secure`, run without Kubernetes: its containers' commands with certificates in the Secrets' places, TLS
between clients and the gateway, between stages, and on Ray's own connections."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shardlift
from shardlift.cluster import up
from shardlift.proto.v1.tls import TLS
from tests.support import checkpoints
from tests.support.certificates import Authority
from tests.support.cluster import eventually
from tests.support.ray_start import free_port, running
from tests.test_k8s import BIN, ENVIRONMENT, env, flags, needs_kubectl, ray_cluster

ROOT = "overlays/secure"
HEAD, STAGE = "127.0.0.9", "127.0.0.10"
SECRETS = {"gateway": "the-gateways-token", "auth_token": "placeholder-of-the-length-of-a-token-of-rays", "token": ""}


def free_ports() -> int:
    """The first of three in a row, as the manifests have them: gateway, page, health."""
    while True:
        first = free_port("127.0.0.1")
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as held:
            for port in range(first, first + 3):
                held.enter_context(socket.create_server(("0.0.0.0", port)))
            return first


class Pods:
    """Where what the pods would mount lies: one folder for each, with the Secrets in it."""

    def __init__(self, home: Path, ray_ca: Authority, secrets: dict[str, TLS]) -> None:
        self.home = home
        self._ray_ca = ray_ca
        self._secrets = secrets
        self.port = free_ports()
        self.gcs = free_port(HEAD)

    def start(self, group: dict[str, Any], address: str) -> None:
        """What comes before its containers: Secrets as they are mounted, and its own certificate."""
        folder = self.home / address
        (folder / "run" / "shardlift").mkdir(parents=True)
        token = folder / "run" / "shardlift" / "token"
        token.write_text(SECRETS["gateway"])
        token.chmod(0o600)
        (folder / "run" / "ray-certificate").mkdir()
        ca = folder / "run" / "ray-ca"
        ca.mkdir()
        shutil.copy(self._ray_ca.file, ca / "tls.crt")
        shutil.copy(self._ray_ca.key_file(), ca / "tls.key")
        for kind, tls in self._secrets.items():
            place = folder / "run" / "shardlift-tls" / kind
            place.mkdir(parents=True)
            for file, name in ((tls.cert, "tls.crt"), (tls.key, "tls.key"), (tls.ca, "ca.crt")):
                shutil.copy(str(file), place / name)
        (made,) = group["template"]["spec"]["initContainers"]
        done = subprocess.run(
            [self.here(word, address) for word in made["command"]],
            env=ENVIRONMENT | {"POD_IP": address, "POD_NAMESPACE": "shardlift"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (folder / "run" / "ray-certificate" / "tls.key").stat().st_mode & 0o077 == 0

    def here(self, text: str, address: str) -> str:
        """A path of the pod's, as it is on this machine."""
        return text.replace("/run/", f"{self.home}/{address}/run/")

    def environment(self, container: dict[str, Any], address: str) -> dict[str, str]:
        given = {
            name: self.here(value, address) if isinstance(value, str) else SECRETS[value["secretKeyRef"]["key"]]
            for name, value in env(container).items()
        }
        ours = {
            "RAY_ADDRESS": f"{HEAD}:{self.gcs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": SECRETS["auth_token"],
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "SHARDLIFT_PORT": str(self.port),
            "SHARDLIFT_CACHE": "off",
        }
        return {**ENVIRONMENT, **given, **ours}


@contextlib.contextmanager
def ray_nodes(pods: Pods) -> Iterator[None]:
    spec = ray_cluster(ROOT)
    head, stages = spec["headGroupSpec"], spec["workerGroupSpecs"][0]
    pods.start(head, HEAD)
    pods.start(stages, STAGE)
    dashboard = free_port(HEAD)
    command = [
        *(str(BIN / "ray"), "start", "--head", f"--node-ip-address={HEAD}", f"--port={pods.gcs}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port(HEAD)}"),
        *flags(head, dashboard_host=HEAD),
    ]
    worker = [
        *(str(BIN / "ray"), "start", f"--address={HEAD}:{pods.gcs}", f"--node-ip-address={STAGE}"),
        *(f"--dashboard-agent-listen-port={free_port(STAGE)}", *flags(stages, num_cpus="2", memory=str(3 << 30))),
    ]
    own = [group["template"]["spec"]["containers"][0] for group in (head, stages)]
    log = pods.home / "worker.log"
    with (
        running(command, pods.environment(own[0], HEAD), pods.home / "head.log", ready=(HEAD, dashboard)),
        running(worker, pods.environment(own[1], STAGE), log),
    ):
        eventually(lambda: "Ray runtime started" in log.read_text(), "no node for the stages", 120)
        yield


@needs_kubectl
@pytest.mark.timeout(600)
def test_the_secure_overlays_commands_run(tmp_path: Path) -> None:
    gateways, stages = Authority(tmp_path / "gateway"), Authority(tmp_path / "stage")
    ray_ca = Authority(tmp_path / "ray", "ray ca")
    issued = {"gateway": gateways.issue("server", hosts=["shardlift-gateway"]), "stage": stages.stages()}
    pods = Pods(tmp_path, ray_ca, issued)
    gateway = ray_cluster(ROOT)["headGroupSpec"]["template"]["spec"]["containers"][1]
    command = [pods.here(word, HEAD) for word in gateway["command"]]
    # The same distance from the gateway's port as in the manifest.
    at = command.index("--health-port") + 1
    health = pods.port + int(command[at]) - up.DEFAULT_PORT
    command[at] = str(health)
    environment = pods.environment(gateway, HEAD)
    log = tmp_path / "gateway.log"
    with (
        ray_nodes(pods),
        running(command, environment, log, ready=("127.0.0.1", health)),
        grpc.insecure_channel(f"127.0.0.1:{health}", options=[("grpc.enable_http_proxy", 0)]) as probe,
    ):
        # What a probe asks, and what a browser gets.
        answer = health_pb2_grpc.HealthStub(probe).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        eventually(lambda: f"page: https://0.0.0.0:{pods.port + 1}/" in log.read_text().splitlines(), "no page", 60)
        assert "warning" not in log.read_text()
        trusting = ssl.create_default_context(cafile=gateways.file)
        trusting.check_hostname = False
        page = urllib.request.Request(
            f"https://127.0.0.1:{pods.port + 1}/state", headers={"Authorization": f"Bearer {SECRETS['gateway']}"}
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting)
        )
        with opener.open(page, timeout=30) as shown:
            assert shown.status == 200

        # Ray's own port shows the certificate that the pod has made for itself.
        believing = ssl.create_default_context(cafile=ray_ca.file)
        eventually(partial(handshake, believing, HEAD, pods.gcs), "Ray's GCS speaks no TLS", 10)
        assert not handshake(ssl.create_default_context(cafile=gateways.file), HEAD, pods.gcs)

        # A client, with the certificate's name as the manifest has it: a load, and an answer.
        head = ray_cluster(ROOT)["headGroupSpec"]["template"]["spec"]["containers"][0]
        tls = TLS(ca=gateways.file, name=env(head)["SHARDLIFT_TLS_NAME"])
        folder = checkpoints.tiny("llama", tmp_path / "llama")
        with shardlift.connect(f"grpcs://127.0.0.1:{pods.port}", SECRETS["gateway"], tls=tls) as client:
            model = client.load(str(folder), name="secure", num_stages=2)
            assert {stage.node for stage in model.info().plan.stages} == {STAGE}
            assert model.generate(torch.arange(5, 17)[None], max_new_tokens=4, do_sample=False).shape == (1, 16)

        # Another token is for another gateway: this one's file stays what it was.
        again = [str(BIN / "shardlift"), "up", "--ray-address", "auto"]
        refused = subprocess.run(
            again,
            env=environment | {"SHARDLIFT_TOKEN": "another-token"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert refused.returncode == 1
        assert "with other settings of the token (SHARDLIFT_TOKEN)" in refused.stderr
        assert "another-token" not in refused.stderr
        assert SECRETS["gateway"] not in refused.stderr
        assert Path(environment["SHARDLIFT_HOME"], "token").read_text() == SECRETS["gateway"]


def handshake(context: ssl.SSLContext, host: str, port: int) -> bool:
    try:
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ssl.SSLError):
        return False
