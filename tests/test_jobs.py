"""`ray job submit -- shardlift load …`: the model outlives the job, and any process finds it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.job_submission import JobSubmissionClient
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import checkpoints
from tests.support.cluster import eventually
from tests.support.hub import HubServer, RequestInfo, Stall
from tests.support.ray_start import BIN, free_port, running, submit

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.5"
MEMORY = 3 << 30

FRESH_PROCESS = """
import json, sys, shardlift
assert "ray" not in sys.modules
model = shardlift.connect().model("from-a-job")
ids = json.loads(sys.argv[1])
print(json.dumps(model.generate(ids, max_new_tokens=8, do_sample=False).tolist()))
assert "ray" not in sys.modules
"""


@contextlib.contextmanager
def started_head(home: Path, host: str, **variables: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node as `ray start` makes it, with the job server: its address, and the environment to use it in."""
    home.mkdir(exist_ok=True)
    dashboard = free_port(host)
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "SHARDLIFT_HOME": str(home),
        "SHARDLIFT_PORT": str(free_port(host)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own authentication, as it is by default from 2.60 on.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # When it is ended, it ends.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        **variables,
    }
    environment.pop("SHARDLIFT_ADDRESS", None)
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={host}",
        f"--port={free_port(host)}",
        f"--dashboard-host={host}",
        f"--dashboard-port={dashboard}",
        # The agent that takes jobs also listens on 127.0.0.1, where another cluster's may be.
        f"--dashboard-agent-listen-port={free_port(host)}",
        "--num-cpus=2",
        f"--memory={MEMORY}",
        f"--object-store-memory={80 << 20}",
        "--disable-usage-stats",
    ]
    with running(command, environment, home / "ray.log", ready=(host, dashboard)):
        yield f"http://{host}:{dashboard}", environment


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    with started_head(tmp_path_factory.mktemp("home"), HOST) as started:
        yield started


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
    assert job.stdout.count("bottleneck: ") == 1

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


def settled(client: Any, job: str) -> str:
    """The job's status, once it is over."""
    eventually(lambda: client.get_job_status(job).is_terminal(), f"job {job} does not end", 240)
    return str(client.get_job_status(job).value)


def job_client(address: str, environment: dict[str, str]) -> JobSubmissionClient:
    """Ray's own client. It would take the token from its environment, which Ray has read once for this process."""
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"})


@pytest.fixture
def jobs(head: tuple[str, dict[str, str]]) -> JobSubmissionClient:
    # Ray's job server answers a while before it can take a job. The first load would start the gateway, too.
    up = submit(*head, ("shardlift", "up", "--ray-address", "auto"))
    assert up.returncode == 0, up.stdout + up.stderr
    return job_client(*head)


def listed(head: tuple[str, dict[str, str]]) -> Any:
    done = run(head, str(BIN / "shardlift"), "list", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_job_that_is_stopped_leaves_nothing(
    head: tuple[str, dict[str, str]], jobs: JobSubmissionClient, tmp_path: Path
) -> None:
    """In the middle of its load: `ray job stop` is a Ctrl-C. Its log has plain lines by then."""
    with HubServer() as hub:
        hub.add_repo("org/stalled", checkpoints.tiny("llama", tmp_path / "stalled"))
        waiting = threading.Event()

        def stall(request: RequestInfo) -> Stall | None:
            if request.origin == "cdn" and request.range is not None and request.range[0] > 0:
                waiting.set()
                return Stall(after_bytes=10, seconds=60)
            return None

        hub.fault = stall
        job = jobs.submit_job(
            entrypoint="shardlift load org/stalled --name stopped --num-stages 2 --no-cache",
            runtime_env={"env_vars": {"HF_ENDPOINT": hub.endpoint}},
        )
        eventually(waiting.is_set, "no worker reads", 120)
        assert [(each["name"], each["state"]) for each in listed(head)] == [("stopped", "loading")]
        assert jobs.stop_job(job)
        assert settled(jobs, job) == "STOPPED"
        log = jobs.get_job_logs(job)
        assert "stage " in log
        assert "SIGTERM: the load is cancelled" in log
        assert not {"\x1b", "\r"} & set(log), "a log is no terminal"
        eventually(lambda: listed(head) == [], "its load goes on", 60)
    resources = run(head, sys.executable, "-c", RESOURCES)
    assert resources.returncode == 0, resources.stderr
    assert json.loads(resources.stdout) == [], "something is set aside still"


RESOURCES = """
import json, ray, time
from ray.util.placement_group import placement_group_table
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
for _ in range(100):
    left = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    left += [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "stage" in actor["name"]]
    if not left:
        break
    time.sleep(0.1)
print(json.dumps(left))
"""


TOKENS = """
import json, os, ray
ray.init(address="auto", namespace="shardlift", log_to_driver=False, logging_level="ERROR")
gateway = ray.get_actor("controller", namespace="shardlift")
variables = ray.get(gateway.__ray_call__.remote(lambda self: dict(os.environ)))
print(json.dumps({name: value for name, value in variables.items() if name in ("HF_TOKEN", "SHARDLIFT_TOKEN", "MINE")}))
"""


def test_a_gateway_that_a_job_starts_keeps_nothing_secret_of_it(head: tuple[str, dict[str, str]]) -> None:
    """It outlives the job, and serves others: the job's Hub token is for the job's own loads, which send it along."""
    assert run(head, str(BIN / "shardlift"), "down", "--ray-address", "auto").returncode == 0
    jobs = job_client(*head)
    variables = {"HF_TOKEN": "hf_the_jobs", "SHARDLIFT_TOKEN": "the-jobs", "MINE": "kept"}
    job = jobs.submit_job(entrypoint="shardlift up --ray-address auto", runtime_env={"env_vars": variables})
    assert settled(jobs, job) == "SUCCEEDED", jobs.get_job_logs(job)
    looked = run(head, sys.executable, "-c", TOKENS)
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout) == {"HF_TOKEN": "", "SHARDLIFT_TOKEN": "", "MINE": "kept"}
    # For the tests that follow: one that wants no token.
    assert run(head, str(BIN / "shardlift"), "down", "--ray-address", "auto").returncode == 0


def test_a_job_whose_load_fails_has_failed(head: tuple[str, dict[str, str]], jobs: JobSubmissionClient) -> None:
    job = jobs.submit_job(entrypoint="shardlift load /no/such/folder --name never")
    assert settled(jobs, job) == "FAILED"
    assert "error: folder /no/such/folder does not exist" in jobs.get_job_logs(job)
    assert "exit code 1" in str(jobs.get_job_info(job).message)
    assert listed(head) == []


def test_two_jobs_at_once_share_what_there_is(
    head: tuple[str, dict[str, str]], jobs: JobSubmissionClient, tmp_path: Path
) -> None:
    """Each alone would fit, both together don't: one is loaded, and the other is told so."""
    folder = checkpoints.tiny("llama", tmp_path / "llama")
    # Keys and values for so many tokens are two thirds of the node's memory.
    planned = json.loads(run(head, str(BIN / "shardlift"), "plan", str(folder), "--json").stdout)
    per_token = sum(stage["kv_bytes_per_token"] for stage in planned["stages"])
    tokens = (MEMORY * 2 // 3) // per_token
    command = f"shardlift load {folder} --reserve-tokens {tokens} --name"
    both = [jobs.submit_job(entrypoint=f"{command} {name}") for name in ("one", "two")]
    statuses = [settled(jobs, job) for job in both]
    assert sorted(statuses) == ["FAILED", "SUCCEEDED"], [jobs.get_job_logs(job) for job in both]
    failed = jobs.get_job_logs(both[statuses.index("FAILED")])
    assert "error: " in failed
    assert "bytes" in failed or "GiB" in failed
    (loaded,) = listed(head)
    assert loaded["name"] == ("one", "two")[statuses.index("SUCCEEDED")]
    assert run(head, str(BIN / "shardlift"), "unload", loaded["name"]).returncode == 0


WHERE = """
import json, pathlib, ray, shardlift
ray.init(address="auto", namespace="shardlift", log_to_driver=False, logging_level="ERROR")
found = [shardlift.__file__]
names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == "shardlift"]
for name in names:
    actor = ray.get_actor(name, namespace="shardlift")
    found.append(ray.get(actor.__ray_call__.remote(lambda self: __import__("shardlift").__file__)))
print(json.dumps([names, found]))
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_job_brings_the_wheel_where_the_image_lacks_it(tmp_path: Path) -> None:
    """`runtime_env` with a wheel, and no registry: the gateway, the stages and the job's own process run on it."""
    wheel = built_wheel(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_SHARDLIFT)
    folder = checkpoints.tiny("llama", tmp_path / "llama")
    with started_head(
        tmp_path / "home",
        "127.0.0.8",
        # What an image without shardlift has: everything else. Its pip asks nobody.
        PYTHONPATH=str(tmp_path / "site"),
        PIP_NO_DEPS="1",
        PIP_NO_INDEX="1",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    ) as (address, environment):
        bare = submit(address, environment, (sys.executable, "-c", "import shardlift"))
        assert bare.returncode != 0
        assert "No module named 'shardlift'" in bare.stdout + bare.stderr
        client = job_client(address, environment)
        command = f"{sys.executable} -m shardlift.client.cli.main load {folder} --name from-a-wheel --num-stages 2"
        script = tmp_path / "where.py"
        script.write_text(WHERE)
        job = client.submit_job(
            entrypoint=f"bash -ec '{command}; {sys.executable} {script}'",
            runtime_env={"py_modules": [str(wheel)]},
        )
        assert settled(client, job) == "SUCCEEDED", client.get_job_logs(job)
        log = client.get_job_logs(job)
        names, files = json.loads(log.strip().splitlines()[-1])
        assert len([name for name in names if name.startswith("stage:")]) == 2
        assert [file for file in files if "runtime_resources/py_modules" not in file] == [], (
            "another shardlift was used"
        )


WITHOUT_SHARDLIFT = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "shardlift" not in getattr(each, "__module__", "")]
"""


def built_wheel(tmp_path: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    return wheel
