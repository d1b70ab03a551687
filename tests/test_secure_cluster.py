"""A local instance with everything on: token, mutual TLS to clients, mutual TLS between stages, a gated repository. A
stage is killed in the middle of a stream, after all certificates were replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import transformers

import shardlift
from shardlift.proto.v1.errors import AuthenticationError, InvalidRequestError, UnsupportedModelError
from shardlift.proto.v1.tls import TLS
from tests.support import checkpoints
from tests.support.certificates import Authority
from tests.support.cluster import eventually
from tests.support.hub import HubServer

IDS = torch.arange(5, 17)[None]
TOKEN = "the-gateways-own-token"
HUB_TOKEN = "hf_a-token-that-goes-to-workers-alone"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardlift.client.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certificates")


@pytest.fixture
def instance(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What `shardlift up --json` says; this process's environment is that of its client."""
    server, client, stage = authority.issue("server"), authority.issue("client"), authority.stages()
    for name, value in (("CA", client.ca), ("CLIENT_CERT", client.cert), ("CLIENT_KEY", client.key)):
        monkeypatch.setenv(f"SHARDLIFT_TLS_{name}", str(value))
    monkeypatch.setenv("SHARDLIFT_TOKEN", TOKEN)
    monkeypatch.setenv("SHARDLIFT_PORT", "0")
    # A cluster that another test has left in the environment is not meant.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    files = {
        "--tls-cert": server.cert,
        "--tls-key": server.key,
        "--tls-client-ca": server.ca,
        "--stage-tls-cert": stage.cert,
        "--stage-tls-key": stage.key,
        "--stage-tls-ca": stage.ca,
    }
    up = ("up", "--json", "--num-cpus", "2", *(str(word) for pair in files.items() for word in pair))
    started = run(*up)
    assert started.returncode == 0, started.stderr
    try:
        # Up already, and the same is asked for; and then something else.
        assert json.loads(run(*up).stdout) == json.loads(started.stdout)
        other = run(*up, "--stage-tls-name", "another")
        assert other.returncode == 1
        assert "run `shardlift down` before other flags" in other.stderr
        yield json.loads(started.stdout)
    finally:
        assert run("down").returncode == 0


def stage_processes(instance: dict[str, object]) -> list[psutil.Process]:
    """The stages' workers, the first that was started first."""
    found = []
    for process in psutil.Process(int(str(instance["pid"]))).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that is just ending
            if "StageWorker" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda each: each.pid)


@pytest.mark.timeout(600)
def test_everything_on(
    instance: dict[str, object],
    authority: Authority,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = str(instance["address"])
    assert address.startswith("grpcs://127.0.0.1:")
    folder = checkpoints.tiny("llama", tmp_path / "llama", max_position_embeddings=100_000)
    local = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = local.generate(IDS, max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0)
    hub.add_repo("org/secured", folder, gated_token=HUB_TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    seen: list[object] = []

    with shardlift.connect() as client:
        assert client.address == address
        with pytest.raises(UnsupportedModelError, match="--allow-remote-code"):
            client.load("org/secured", name="secured", trust_remote_code=True, token=HUB_TOKEN)
        model = client.load("org/secured", name="secured", num_stages=2, token=HUB_TOKEN, on_event=seen.append)
        # Others get nowhere, and change nothing.
        for tls in (TLS(ca=authority.file), Authority(tmp_path / "stranger").issue("client")):
            with pytest.raises(AuthenticationError):
                shardlift.connect(address, TOKEN, tls=tls, timeout_s=1)
        with pytest.raises(AuthenticationError, match="SHARDLIFT_TOKEN"):
            shardlift.connect(address, "guessed").models()
        with pytest.raises(InvalidRequestError):
            shardlift.connect(address, TOKEN, tls=TLS(ca=str(tmp_path / "nothing")))

        # New certificates for everybody, while everything runs.
        for name in ("server", "client"):
            authority.issue(name)
        authority.stages()
        workers = stage_processes(instance)
        assert len(workers) == 2
        tokens: list[int] = []
        with model.stream(IDS, max_new_tokens=80, do_sample=False, eos_token_id=None) as running:
            for step in running:
                tokens += step.token_ids
                if len(tokens) == 5:
                    os.kill(workers[0].pid, signal.SIGKILL)
        assert tokens == expected[0, IDS.shape[1] :].tolist()
        eventually(lambda: model.info().state == "ready", "it did not come back", timeout_s=60)
        assert model.info().recoveries == 1
        with shardlift.connect() as another:
            again = another.model("secured").generate(IDS, max_new_tokens=8, do_sample=False)
        assert torch.equal(again, expected[:, : IDS.shape[1] + 8])
        # A node without the files is named before anything is fetched, and nothing of the load is left.
        key = authority.folder / "stage.key"
        keys = [Path(authority.folder / f"{name}.key").read_bytes() for name in ("server", "client", "stage")]
        key.unlink()
        with pytest.raises(InvalidRequestError, match=r"stage\.key can't be read.*on node .*--stage-tls-cert"):
            client.load(str(folder), name="nowhere", num_stages=2)
        key.write_bytes(keys[-1])
        eventually(lambda: len(stage_processes(instance)) == 2, "a stage is left")
        said = repr(seen) + repr(model.info()) + json.dumps(model.plan.to_dict())

    # No secret in what was told, nor in any log.
    shown = run("show", "secured", "--json")
    assert shown.returncode == 0, shown.stderr
    secrets = [HUB_TOKEN.encode(), TOKEN.encode(), *(key.splitlines()[1] for key in keys)]
    texts = [said.encode(), shown.stdout.encode(), *(each.read_bytes() for each in logs(instance))]
    assert len(texts) > 10
    assert not [text[:200] for text in texts for secret in secrets if secret in text]


def logs(instance: dict[str, object]) -> list[Path]:
    """Of this instance's Ray, and its own."""
    raylet = next(
        each for each in psutil.Process(int(str(instance["pid"]))).children(recursive=True) if each.name() == "raylet"
    )
    words = [word for word in raylet.cmdline() if "session_" in word]
    session = next(
        Path(word[word.index("/") :]).resolve()
        for word in words
        if word.startswith(("--session_dir=", "--session-dir="))
    )
    home = Path(os.environ["SHARDLIFT_HOME"])
    own = [home / "up.log", home / "up.out", home / "instance.json", home / "gateway.log"]
    return [*own, *(each for each in (session / "logs").rglob("*") if each.is_file() and not each.is_symlink())]
