"""`shardlift doctor`: each check made to fail, for real where a machine without GPUs allows it, and judged rightly."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray._private.state import actors
from ray.cluster_utils import Cluster

import shardlift
from shardlift.client import doctor as examination
from shardlift.client.cli.main import cli
from shardlift.client.nodes import Finding, version_finding
from shardlift.cluster.doctor import kernels, probes, verdicts
from shardlift.cluster.doctor.cluster import _examine, _Patient
from shardlift.cluster.doctor.echo import Counter, measure
from shardlift.cluster.doctor.seen import Disk, Gpu, Hub, Kernel, Kernels
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.cluster.nodes import Node
from shardlift.proto.v1.tls import TLS
from tests.support.certificates import Authority
from tests.support.cluster import ADDRESSES, RunningCluster, eventually
from tests.support.gateway import serve

GIB = 1 << 30


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_versions() -> None:
    found = {"python": "3.11.7", "shardlift": "0.1.0", "torch": "2.6.0+cu124", "transformers": "4.50.0", "ray": ""}
    required = ["torch>=2.6", "transformers>=5.17", "ray[default]>=2.52", "pytest>=8; extra == 'dev'"]
    missing, wrong = verdicts.versions(found, required, ">=3.10")
    assert (missing.verdict, missing.finding) == ("fail", "not installed: ray")
    assert (wrong.verdict, wrong.finding) == ("fail", "out of range: transformers 4.50.0 (needs >=5.17)")
    (old,) = verdicts.versions(found, ["torch>=2.6"], ">=3.12")
    assert old.finding == "out of range: Python 3.11.7 (needs >=3.12)"
    assert [each.verdict for each in verdicts.versions(found, ["torch>=2.6"], ">=3.10")] == ["ok"]
    assert [each.verdict for each in verdicts.versions(found, [], "")] == ["warn"]


def test_versions_of_nodes_are_compared() -> None:
    same = {"torch": "2.13", "ray": "2.60"}
    assert verdicts.skew({"a": same, "b": same}).verdict == "ok"
    differing = verdicts.skew({"a": same, "b": {**same, "torch": "2.12"}, "c": same})
    assert differing.verdict == "fail"
    assert differing.finding == "torch: 2.12 on b, 2.13 on a c"


def test_gpus_are_counted_three_times() -> None:
    assert verdicts.gpu_counts(8, 8, 8).verdict == "ok"
    assert verdicts.gpu_counts(0, 0, 0).verdict == "ok"
    assert verdicts.gpu_counts(8, 7, 7).verdict == "fail"
    assert verdicts.gpu_counts(4, 8, 8).verdict == "warn"
    assert "made up" in verdicts.gpu_counts(1, 0, 0).finding


def test_a_driver_that_is_too_old() -> None:
    seen = Kernels(library="bitsandbytes 0.50.2", cuda="13.0", torch_gpus=0, devices=(Kernel(device="cpu", values=8),))
    old, cpu = verdicts.kernels(seen, driver="470.82.01", gpus=8)
    assert (old.check, old.verdict, cpu.verdict) == ("cuda", "fail", "ok")
    assert old.finding == "the driver 470.82.01 has 8 GPUs, and torch can use none: torch is built for CUDA 13.0"
    without, _ = verdicts.kernels(replace(seen, cuda=""), driver="580.1", gpus=1)
    assert without.remedy == "install a torch with CUDA"


def test_a_gpu_that_computes_wrongly() -> None:
    devices = (Kernel(device="cuda:0", values=4096, wrong=3), Kernel(device="cuda:1", problem="no kernel image"))
    found = verdicts.kernels(Kernels(torch_gpus=2, devices=devices), "580.1", 2)
    assert [each.verdict for each in found] == ["fail", "fail"]
    assert "3 of 4096 values" in found[0].finding
    (nan,) = verdicts.kernels(Kernels(devices=(Kernel(device="cpu", matmul_error=float("nan")),)))
    assert nan.verdict == "fail"


def test_memory_that_strangers_hold() -> None:
    output = (
        "0, GPU-aaaa1111, 580.95.05, 61440, 81920, NVIDIA H100 80GB HBM3\n1, GPU-bbbb2222, 580.95.05, 5, [N/A], X\n"
    )
    driver, gpus = probes.read_driver(output)
    assert driver == "580.95.05"
    assert gpus[0] == Gpu(index=0, name="NVIDIA H100 80GB HBM3", used_bytes=60 * GIB, total_bytes=80 * GIB)
    (found,) = verdicts.strangers(gpus)
    assert found.finding.startswith("60.00 GiB of cuda:0")
    assert verdicts.strangers([replace(gpus[0], expected_bytes=60 * GIB)]) == []
    assert probes.read_driver("No devices were found\n") == ("", ())
    assert [gpu.name for gpu in probes.read_driver(output, ["GPU-bbbb"])[1]] == ["X"]
    assert [(gpu.index, gpu.name[0]) for gpu in probes.read_driver(output, ["1", "0"])[1]] == [(0, "X"), (1, "N")]


def test_clocks() -> None:
    assert verdicts.clock(0.2, 0.1).verdict == "ok"
    assert verdicts.clock(-30.0, 0.1).finding == "30.0 s behind"
    assert verdicts.clock(1.5, 2.0).verdict == "ok", "it can't be told so exactly"


def test_versions_of_client_and_gateway() -> None:
    assert version_finding(shardlift.__version__).verdict == "ok"
    assert version_finding("1.2.4", "1.2.3").verdict == "warn"
    assert version_finding("1.3.0", "1.2.3").verdict == "fail"


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_kernels_are_tried_against_values_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts.kernels(probes.kernels())
    assert [(each.verdict, "4 bits on cpu" in each.finding) for each in found][:1] == [("ok", True)]
    # The same, with a table of another kind: the check can fail.
    monkeypatch.setattr(kernels, "_NF4", tuple(0.35 if 0.33 < code < 0.34 else code for code in kernels._NF4))
    assert kernels._try("cpu")["wrong"] > 100


def test_a_bitsandbytes_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libcudart.so.11.0: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = verdicts.kernels(probes.kernels())
    assert found.verdict == "fail"
    assert "libcudart.so.11.0" in found.finding


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setenv("SHARDLIFT_CACHE", str(small / "parts"))
    assert verdicts.cache(probes.cache()).verdict in ("ok", "warn")
    with mounted(small):
        assert verdicts.cache(probes.cache()).verdict == "fail", "4 MiB are nothing"
        with contextlib.suppress(OSError):
            (small / "filled").write_bytes(bytes(8 << 20))
        full = verdicts.cache(probes.cache())
        assert (full.verdict, "No space left on device" in full.finding) == ("fail", True)
        assert verdicts.shared_memory(probes.disk(small)).verdict == "fail"
    assert list(small.iterdir()) == [], "nothing is left there"
    monkeypatch.setenv("SHARDLIFT_CACHE", "/proc/nowhere")
    assert verdicts.cache(probes.cache()).verdict == "fail"
    monkeypatch.setenv("SHARDLIFT_CACHE", "off")
    assert verdicts.cache(probes.cache()).verdict == "ok"
    assert verdicts.cache(Disk(folder="/x", free_bytes=2 * GIB, total_bytes=9 * GIB)).verdict == "warn"


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A disk of 4 MiB at `folder`."""
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def hub_that_answers(status: int) -> Iterator[tuple[str, list[Any]]]:
    """A Hub's address, and the headers of the requests that came."""
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def ask(endpoint: str, token: str) -> tuple[str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", token)
        found = verdicts.hub(probes.hub())
        assert "hf_secret" not in json.dumps(found.to_dict())
        return found.verdict, found.finding

    for name in probes._PROXIES:
        monkeypatch.delenv(name, raising=False)
    with hub_that_answers(200) as (endpoint, asked):
        assert ask(endpoint, "hf_secret") == ("ok", f"{endpoint} takes the token")
        assert asked[0][1]["authorization"] == "Bearer hf_secret"
    with hub_that_answers(401) as (endpoint, _):
        assert ask(endpoint, "hf_secret")[0] == "fail"
        assert ask(endpoint, "") == ("ok", f"{endpoint} answers; no token is set, which gated models need")
    with hub_that_answers(200) as (endpoint, asked):
        verdict, finding = ask(endpoint, "hf_secr\u200bet")
        assert (verdict, finding.endswith("has characters that a header can't carry"), asked) == ("fail", True, [])
    with hub_that_answers(503) as (endpoint, _):
        assert ask(endpoint, "")[0] == "warn"
    verdict, finding = ask("http://127.0.0.1:9", "hf_secret")
    assert (verdict, "nobody answers at http://127.0.0.1:9" in finding) == ("fail", True)
    assert ask("http://user:hf_secret@127.0.0.1:9", "")[0] == "fail"
    assert verdicts.hub(Hub(endpoint="x", is_offline=True)).verdict == "ok"
    assert verdicts.hub(Hub(endpoint="x", status=200, seconds=9.0)).verdict == "warn"


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert verdicts.port(probes.port("127.0.0.1", number, "the gateway")).verdict == "warn"
    assert verdicts.port(probes.port("127.0.0.1", number, "the gateway")).verdict == "ok"


def test_links() -> None:
    counter = Counter("127.0.0.1")
    try:
        measured = measure(counter.address, counter.secret, 20)
        good = verdicts.link("a", "b", measured.bytes_per_s, measured.round_trip_s, measured.problem)
        assert good.verdict == "ok", good
        assert "UNAUTHENTICATED" in measure(counter.address, "wrong", 20).problem
    finally:
        counter.stop()
    gone = measure(counter.address, counter.secret, 5)
    assert verdicts.link("a", "b", 0.0, 0.0, gone.problem).verdict == "fail"
    assert verdicts.link("a", "b", 1e6, 0.1, "").verdict == "warn"


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*words: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings of the command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "shardlift.client.cli.main", "doctor", "--json", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout, done.stderr
    values = json.loads(done.stdout)
    assert values["ok"] is (done.returncode == 0)
    return done.returncode, values["findings"]


def verdict_of(findings: list[dict[str, Any]], check: str, node: str = "") -> set[str]:
    return {each["verdict"] for each in findings if (each["check"], each["node"]) == (check, node)}


def test_a_machine_by_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, findings = run(SHARDLIFT_PORT=str(port), HF_HUB_OFFLINE="1")
    assert code == 0, findings
    assert verdict_of(findings, f"port-{port}") == {"warn"}
    assert {each["check"] for each in findings} >= {"versions", "kernels", "cache", "shared-memory", "hub"}
    assert not {each["check"] for each in findings} & {"gateway", "node"}, "no gateway is known"


def test_a_gateway_that_is_not_there() -> None:
    findings: list[Finding] = []
    findings += examination.gateway_and_nodes("127.0.0.1:9", None, 5)
    assert [(each.check, each.verdict) for each in findings] == [("gateway", "fail")]


def test_the_way_to_the_gateway() -> None:
    def verdict(where: str) -> str | None:
        finding = examination._transport(where)
        return None if finding is None else finding.verdict

    assert verdict("grpcs://10.0.0.1:50051") == verdict("grpcs://127.0.0.1:50051") == "ok"
    assert verdict("grpc://10.0.0.1:50051") == "ok", "it says itself that plain text is meant"
    assert verdict("127.0.0.1:50051") is None
    assert verdict("10.0.0.1:50051") == "warn"
    warned = examination._transport("10.0.0.1:50051")
    assert warned is not None
    assert "grpcs://10.0.0.1:50051" in warned.remedy


async def test_a_gateway_with_tls_and_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_nodes(*_: object) -> AsyncIterator[list[Finding]]:
        """Ray's part."""
        return
        yield []

    monkeypatch.setattr("shardlift.cluster.gateway.diagnose", no_nodes)
    server = Authority(tmp_path).issue("server")
    monkeypatch.setenv("SHARDLIFT_TLS_CA", str(server.ca))
    (tmp_path / "token").write_text("the-token")

    async def checks(address: str, token: str | None) -> dict[str, str]:
        found = await asyncio.to_thread(lambda: list(examination.gateway_and_nodes(address, token, 5)))
        return {each.check: each.verdict for each in found}

    secured = GatewayOptions(tls=TLS(cert=server.cert, key=server.key), token_file=str(tmp_path / "token"))
    async with serve(secured) as address:
        well = {"transport": "ok", "gateway": "ok", "token": "ok", "gateway-version": "ok"}
        assert await checks(address, "the-token") == well
        for wrong in ("another", None):
            assert await checks(address, wrong) == {"transport": "ok", "gateway": "ok", "token": "fail"}
    async with serve(GatewayOptions()) as address:
        assert await checks(f"grpc://{address}", None) == {"gateway": "ok", "token": "ok", "gateway-version": "ok"}


def test_all_nodes(cluster: RunningCluster) -> None:
    """The whole way, with a Hub that is out of reach and a disk that can't be written on the nodes' side."""
    code, findings = run("--address", cluster.gateway, HF_HUB_OFFLINE="1")
    assert code == 1
    for node in ADDRESSES:
        assert verdict_of(findings, "kernels", node) == {"ok"}
        assert verdict_of(findings, "gpus", node) == {"ok"}
        assert verdict_of(findings, "clock", node) == {"ok"}
        assert verdict_of(findings, "link", node) == {"ok"}
        assert verdict_of(findings, "hub", node) == {"fail"}, "the cluster's nodes are not told to be offline"
    assert verdict_of(findings, "version-skew") == {"ok"}
    assert verdict_of(findings, "gateway-version") == {"ok"}
    assert verdict_of(findings, "token") == {"ok"}
    assert verdict_of(findings, "hub") == {"ok"}
    assert [each for each in findings if each["verdict"] != "ok" and not each["remedy"]] == []
    shown = CliRunner().invoke(cli, ["list", "--address", cluster.gateway])
    assert shown.exit_code == 0

    def examiners() -> list[str]:
        return [actor["State"] for actor in actors().values() if actor["ActorClassName"] == "Examiner"]

    assert len(examiners()) == len(ADDRESSES)
    eventually(lambda: "ALIVE" not in examiners(), "examiners are left")


async def test_a_node_that_does_not_answer_gets_a_verdict() -> None:
    class Hanging:
        class examine:  # noqa: N801 - as Ray's handles have methods
            @staticmethod
            def remote() -> asyncio.Future[None]:
                return asyncio.get_running_loop().create_future()

    node = Node(name="10.0.0.7", node_id="a" * 56, address="10.0.0.7", hostname="h", is_drained=False, by_ray=False)
    patient = _Patient(node=node, gpus=0, examiner=Hanging())
    (found,), well = await _examine(patient, 0.1, [])
    assert well is None
    assert (found.check, found.node, found.verdict) == ("node", "10.0.0.7", "fail")
    assert found.finding == "it did not answer within 0.1 s"


@pytest.fixture
def odd_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head, a node whose bitsandbytes says that it is another version, and one that can be made to hang."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    odd = tmp_path / "odd" / "bitsandbytes-0.48.1.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.48.1\n")
    path = os.environ.get("PYTHONPATH", "")
    cluster = Cluster()
    try:
        nodes = []
        for index in range(3):
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(odd.parent)] * (index == 1) + [path]))
            nodes.append(
                cluster.add_node(
                    node_ip_address=f"127.0.0.{41 + index}",
                    num_cpus=1,
                    num_gpus=int(index == 1),
                    object_store_memory=80 << 20,
                    include_dashboard=False,
                )
            )
        yield cluster, nodes
    finally:
        cluster.shutdown()


@pytest.mark.soak  # for as long as the nodes that don't hang may need
def test_nodes_that_differ_and_one_that_hangs(odd_nodes: tuple[Cluster, list[Any]], tmp_path: Path) -> None:
    cluster, nodes = odd_nodes
    raylet = nodes[2].all_processes["raylet"][0].process.pid
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ["PYTHONPATH"].replace("odd", "")}
    os.kill(raylet, signal.SIGSTOP)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "shardlift.cluster.doctor", "--ray-address", cluster.address, "--timeout", "45"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        os.kill(raylet, signal.SIGCONT)
    findings = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 1, done.stderr
    assert verdict_of(findings, "ray") == {"ok"}
    (skew,) = (each for each in findings if each["check"] == "version-skew")
    assert skew["verdict"] == "fail"
    assert "bitsandbytes: 0.48.1 on 127.0.0.42" in skew["finding"]
    assert verdict_of(findings, "gpus", "127.0.0.42") == {"warn"}, "a GPU that is made up"
    assert verdict_of(findings, "node", "127.0.0.43") == {"fail"}
    assert verdict_of(findings, "kernels", "127.0.0.41") == {"ok"}
