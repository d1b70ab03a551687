"""What ends in the middle ends cleanly: loads, generations, workers, the gateway itself."""

from __future__ import annotations

import concurrent.futures
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import ray
import torch

import shardlift
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1 import errors, inference_pb2, inference_pb2_grpc
from shardlift.proto.v1.status import from_rpc_error
from shardlift.proto.v1.tensor_pb2 import Tensor
from tests.support import checkpoints, interrupts
from tests.support.cluster import RunningCluster, eventually
from tests.support.hub import HubServer, RequestInfo, Stall

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Positions enough for a generation that lasts.
    return checkpoints.tiny(
        "llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16", max_position_embeddings=100_000
    )


@pytest.fixture
def model(cluster: RunningCluster, folder: Path) -> Iterator[RemoteModel]:
    """A resident model of three stages; a test that leaves it whole leaves it to the next one."""
    with shardlift.connect(cluster.gateway) as client:
        if any(info.name == "interrupted" for info in client.infos()):
            yield client.model("interrupted")
        else:
            yield client.load(str(folder), name="interrupted", num_stages=3)


@pytest.fixture(scope="module", autouse=True)
def nothing_left(cluster: RunningCluster) -> Iterator[None]:
    yield
    with shardlift.connect(cluster.gateway) as client:
        for info in client.infos():
            client.unload(info.name)
    cluster.assert_nothing_left()


def sessions(cluster: RunningCluster) -> list[tuple[int, int]]:
    """Sessions, and bytes of keys and values, of each stage."""
    workers = [ray.get_actor(name, namespace="shardlift") for name in cluster.stage_workers()]
    return ray.get([worker.sessions.remote() for worker in workers])


def drain(running: Iterator[object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    for _ in running:
        assert time.monotonic() < deadline, "the generation goes on"


def test_a_generation_that_is_left_frees_its_caches(model: RemoteModel, cluster: RunningCluster) -> None:
    running = model.stream(IDS, max_new_tokens=50_000)
    for _ in range(3):
        next(running)
    assert all(count == 1 and size > 0 for count, size in sessions(cluster))
    running.close()
    eventually(lambda: sessions(cluster) == [(0, 0)] * 3, "keys and values are left", timeout_s=5)


def test_a_deadline_ends_a_generation_on_every_stage(model: RemoteModel, cluster: RunningCluster) -> None:
    ids = Tensor(shape=[1, 3], dtype="int64", data=b"".join(number.to_bytes(8, "little") for number in (5, 6, 7)))
    request = inference_pb2.GenerateRequest(model="interrupted", input_ids=ids)
    request.generation.update({"max_new_tokens": 50_000})
    with grpc.insecure_channel(cluster.gateway) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stub.Generate(request, timeout=1.0):
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: sessions(cluster) == [(0, 0)] * 3, "keys and values are left", timeout_s=5)


def test_an_idle_session_ends_by_itself(model: RemoteModel, cluster: RunningCluster) -> None:
    """The client is told so when it happens, not when it comes back."""
    ids = Tensor(shape=[1, 1], dtype="int64", data=bytes(8))
    asked: queue.SimpleQueue[inference_pb2.SessionRequest | None] = queue.SimpleQueue()
    asked.put(
        inference_pb2.SessionRequest(
            model="interrupted", idle_timeout_s=0.5, forward=inference_pb2.ForwardRequest(input_ids=ids)
        )
    )
    with grpc.insecure_channel(cluster.gateway) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Session(iter(asked.get, None), timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        asked.put(None)
    assert isinstance(from_rpc_error(caught.value, cluster.gateway), errors.SessionExpiredError)
    eventually(lambda: sessions(cluster) == [(0, 0)] * 3, "keys and values are left", timeout_s=5)
    with model.session(idle_timeout_s=0.5) as session:
        session.generate(IDS, max_new_tokens=3)
        time.sleep(1.5)
        with pytest.raises(errors.SessionExpiredError, match="idle"):
            session.generate(IDS, max_new_tokens=3)


def test_two_models_are_used_at_once(model: RemoteModel, cluster: RunningCluster, tmp_path: Path) -> None:
    folder = checkpoints.tiny("gpt2", tmp_path, dtype="bfloat16", seed=3)
    with shardlift.connect(cluster.gateway) as client:
        other = client.load(str(folder), name="other", num_stages=2)
        try:
            expected = [each.generate(IDS, max_new_tokens=24, do_sample=False) for each in (model, other)]
            assert not torch.equal(*expected)
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                futures = [
                    pool.submit(each.generate, IDS, max_new_tokens=24, do_sample=False) for each in (model, other) * 2
                ]
                for future, tokens in zip(futures, expected * 2, strict=True):
                    assert torch.equal(future.result(60), tokens)
        finally:
            other.unload()
    assert model.info().state == "ready"


def test_a_handle_goes_along_into_a_ray_task(model: RemoteModel) -> None:
    """By its pickle; the task's process connects by itself, and samples as its own generator says."""

    @ray.remote(num_cpus=0)
    def task(model: RemoteModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
        torch.manual_seed(3)
        return greedy, model.generate(ids, max_new_tokens=6, do_sample=True)

    greedy, sampled = ray.get(task.remote(model, IDS), timeout=90)
    assert torch.equal(greedy, model.generate(IDS, max_new_tokens=6, do_sample=False))
    assert torch.equal(sampled, model.generate(IDS, max_new_tokens=6, do_sample=True, seed=3))


def test_a_client_that_is_killed_frees_its_caches(model: RemoteModel, cluster: RunningCluster) -> None:
    script = (
        "import shardlift\n"
        f"model = shardlift.connect({cluster.gateway!r}).model('interrupted')\n"
        "for step in model.stream([[5, 6, 7]], max_new_tokens=50_000):\n"
        "    print(step.token_ids, flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    with client.stdout:
        client.stdout.readline()
        assert all(count == 1 for count, _ in sessions(cluster))
        client.send_signal(signal.SIGKILL)
        client.wait(10)
    eventually(lambda: sessions(cluster) == [(0, 0)] * 3, "keys and values are left", timeout_s=5)


def test_a_new_controller_finds_the_models(model: RemoteModel, cluster: RunningCluster) -> None:
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    footprint = model.get_memory_footprint()
    os.kill(cluster.pid("controller"), signal.SIGKILL)

    def answers() -> bool:
        try:
            with shardlift.connect(cluster.gateway, timeout_s=1) as client:
                return client.model("interrupted").info().state == "ready"
        except errors.ShardliftError:
            return False

    eventually(answers, "no controller came back", timeout_s=60)
    with shardlift.connect(cluster.gateway) as client:
        found = client.model("interrupted")
        assert torch.equal(found.generate(IDS, max_new_tokens=8, do_sample=False), expected)
        assert found.get_memory_footprint() == footprint


def test_unloading_ends_generations_with_a_reason(model: RemoteModel, cluster: RunningCluster) -> None:
    running = model.stream(IDS, max_new_tokens=50_000)
    next(running)
    threading.Timer(0.2, model.unload).start()
    with pytest.raises(errors.ModelUnavailableError, match="unload"):
        drain(running)
    cluster.assert_nothing_left()


@pytest.fixture
def stalled(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """org/stalled: its tensors' bytes never come. Set once a worker waits for them."""
    hub.add_repo("org/stalled", folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    waiting = threading.Event()

    def stall(request: RequestInfo) -> Stall | None:
        if request.origin == "cdn" and request.range is not None and request.range[0] > 0:
            waiting.set()
            return Stall(after_bytes=10, seconds=60)
        return None

    hub.fault = stall
    yield waiting
    hub.fault = None


def test_an_interrupted_load_command_gives_everything_back(cluster: RunningCluster, stalled: threading.Event) -> None:
    load = subprocess.Popen(
        [sys.executable, "-m", "shardlift.client.cli.main", "load", "org/stalled", "--name", "given-up"],
        env=os.environ | {"SHARDLIFT_ADDRESS": cluster.gateway},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=interrupts.heed,  # noqa: PLW1509 - nothing else would do
    )
    assert stalled.wait(60)
    assert cluster.stage_workers()
    load.send_signal(signal.SIGINT)
    load.communicate(timeout=20)
    assert load.returncode == 130
    cluster.assert_nothing_left()


def test_unload_ends_a_load(cluster: RunningCluster, stalled: threading.Event) -> None:
    failures: list[BaseException] = []

    def load() -> None:
        with shardlift.connect(cluster.gateway) as client:
            try:
                client.load("org/stalled", name="called-off")
            except errors.ShardliftError as error:
                failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    assert stalled.wait(60)
    with shardlift.connect(cluster.gateway) as client:
        assert [info.state for info in client.infos()] == ["loading"]
        client.unload("called-off")
        assert client.infos() == []
    thread.join(20)
    assert [type(failure) for failure in failures] == [errors.LoadCancelledError]
    cluster.assert_nothing_left()
