"""`ray job submit -- shardlift load …`: the model outlives the job, and any process finds it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import checkpoints
from tests.support.ray_start import BIN, free_port, running, submit

HOST = "127.0.0.5"

FRESH_PROCESS = """
import json, sys, shardlift
assert "ray" not in sys.modules
model = shardlift.connect().model("from-a-job")
ids = json.loads(sys.argv[1])
print(json.dumps(model.generate(ids, max_new_tokens=8, do_sample=False).tolist()))
assert "ray" not in sys.modules
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node as `ray start` makes it, with the job server: its address, and the environment to use it in."""
    home = tmp_path_factory.mktemp("home")
    dashboard = free_port(HOST)
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "SHARDLIFT_HOME": str(home),
        "SHARDLIFT_PORT": str(free_port(HOST)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own authentication, as it is by default from 2.60 on.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    environment.pop("SHARDLIFT_ADDRESS", None)
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={HOST}",
        f"--port={free_port(HOST)}",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={dashboard}",
        # The agent that takes jobs also listens on 127.0.0.1, where another cluster's may be.
        f"--dashboard-agent-listen-port={free_port(HOST)}",
        "--num-cpus=2",
        f"--memory={3 << 30}",
        f"--object-store-memory={80 << 20}",
        "--disable-usage-stats",
    ]
    with running(command, environment, home / "ray.log", ready=(HOST, dashboard)):
        yield f"http://{HOST}:{dashboard}", environment


def run(head: tuple[str, dict[str, str]], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=head[1], capture_output=True, text=True, timeout=120, check=False, cwd=head[1]["SHARDLIFT_HOME"]
    )


def test_a_job_leaves_its_model_resident(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", dtype="bfloat16")
    flags = ("--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--num-stages", "2")
    job = submit(*head, ("shardlift", "load", str(folder), "--name", "from-a-job", *flags))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "from-a-job" in job.stdout

    ids = [list(range(5, 17))]
    fresh = run(head, sys.executable, "-c", FRESH_PROCESS, json.dumps(ids))
    assert fresh.returncode == 0, fresh.stderr
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    expected = whole.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False)
    assert json.loads(fresh.stdout) == expected.tolist()

    shown = json.loads(run(head, str(BIN / "shardlift"), "show", "from-a-job", "--json").stdout)
    assert [stage["node"] for stage in shown["stages"]] == [HOST, HOST]

    # The job's exit status is the load's.
    again = submit(*head, ("shardlift", "load", str(folder), "--name", "from-a-job", *flags))
    assert again.returncode != 0
    assert "from-a-job" in again.stdout + again.stderr

    gone = run(head, str(BIN / "shardlift"), "unload", "from-a-job")
    assert gone.returncode == 0, gone.stderr
    assert json.loads(run(head, str(BIN / "shardlift"), "list", "--json").stdout) == []
