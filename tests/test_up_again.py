"""`up` on a cluster whose gateway runs: taken as it is, or what it lacks is named, and nothing is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.cluster import RunningCluster


def run(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardlift.client.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"SHARDLIFT_HOME": str(home), **environment},
    )


def test_what_runs_is_not_what_is_asked(cluster: RunningCluster, tmp_path: Path) -> None:
    up = ("up", "--json", "--ray-address", cluster.ray_address)
    other = run(tmp_path, *up, "--host", "0.0.0.0", "--port", "53199", SHARDLIFT_TOKEN="a-token-of-mine")
    assert other.returncode == 1
    (line,) = other.stderr.splitlines()
    assert line.startswith(
        f"error: a gateway already runs at {cluster.gateway}, with other settings of --host, --port, "
    )
    assert "the token (SHARDLIFT_TOKEN)" in line
    assert "shardlift down --ray-address auto" in line
    assert "a-token-of-mine" not in line
    assert not (tmp_path / "token").exists()
    assert not (tmp_path / "instance.json").exists()

    # Whoever asks for nothing takes what is there; a job's load, with whatever token it has.
    plain = run(tmp_path, *up, SHARDLIFT_PORT="53199")
    assert plain.returncode == 0, plain.stderr
    told = json.loads(plain.stdout)
    assert (told["address"], told["token_file"]) == (cluster.gateway, None)
    listed = run(tmp_path, "list", "--json")
    assert (listed.returncode, json.loads(listed.stdout)) == (0, []), listed.stderr
    job = [sys.executable, "-m", "shardlift.cluster.up", "--ray-address", cluster.ray_address, "--any-token"]
    environment = os.environ | {"SHARDLIFT_TOKEN": "another", "SHARDLIFT_HOME": str(tmp_path)}
    joined = subprocess.run(job, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert joined.returncode == 0, joined.stdout
    assert json.loads(joined.stdout.splitlines()[-1])["address"] == cluster.gateway
    assert not (tmp_path / "token").exists()
