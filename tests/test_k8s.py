"""k8s/ keeps its word: what it renders is valid, and names nothing that the code doesn't have; and its commands run.

The validator (the API server's rules, and the KubeRay operator's) lies beside the repository, not in it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shardlift
from shardlift.client import channel
from shardlift.client.cli.main import cli
from shardlift.cluster import up
from shardlift.cluster.gateway_options import GRACE_S
from shardlift.proto.v1.tls import STAGE_NAME
from shardlift.worker.byte_sizes import parse_size
from tests.support.cluster import eventually
from tests.support.hub import HubServer
from tests.support.ray_start import BIN, free_port, running, submit

ROOT = Path(__file__).resolve().parents[1]
K8S = ROOT / "k8s"
VALIDATOR = ROOT.parent / "shared" / "k8s" / "validate.py"
VALIDATOR_NEEDS = ("yaml", "jsonschema", "kubernetes_validate", "celpy", "referencing")
# Made by hand or by k8s/secrets; and for k8s/load, the cluster that is there.
EXTERNAL = (
    *("Secret/shardlift-tokens", "Secret/shardlift-hub", "RayCluster/shardlift"),
    # Where TLS is, cert-manager's.
    *("Secret/shardlift-gateway-tls", "Secret/shardlift-stage-tls", "Secret/shardlift-ray-ca"),
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
DOCKERFILE = (K8S / "Dockerfile").read_text(encoding="utf-8")
# An environment for programs of this one's own folder: the venv's kubectl, ray and shardlift.
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
KUBECTL = shutil.which("kubectl", path=ENVIRONMENT["PATH"])

ROOTS = sorted(
    file.parent.relative_to(K8S).as_posix()
    for file in K8S.rglob("kustomization.yaml")
    if "kind: Kustomization" in file.read_text(encoding="utf-8")
)
ENCRYPTED = ["overlays/secure", "overlays/production"]
RAY_TLS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
CLUSTERS = [root for root in ROOTS if root.startswith("overlays/") or root == "job"]

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed (the dev extra brings it)")


@cache
def rendered(root: str, k8s: Path = K8S) -> tuple[dict[str, Any], ...]:
    """The objects of a kustomize root."""
    assert KUBECTL is not None
    done = subprocess.run(
        [KUBECTL, "kustomize", str(k8s / root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def one(root: str, kind: str, name: str | None = None) -> dict[str, Any]:
    (found,) = (each for each in rendered(root) if each["kind"] == kind and name in (None, each["metadata"]["name"]))
    return found


def ray_cluster(root: str) -> dict[str, Any]:
    """The spec of its Ray cluster, which may be a job's own."""
    spec: dict[str, Any] = (
        one("job", "RayJob")["spec"]["rayClusterSpec"] if root == "job" else one(root, "RayCluster")["spec"]
    )
    return spec


def pods(root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod spec in it, with what it is a part of."""

    def search(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if isinstance(value.get("containers"), list):
                yield path, value
            for key, each in value.items():
                yield from search(each, f"{path}.{key}")
        elif isinstance(value, list):
            for index, each in enumerate(value):
                yield from search(each, f"{path}[{index}]")

    for each in rendered(root):
        yield from search(each, f"{root}: {each['kind']}/{each['metadata']['name']}")


def containers(root: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every container in it, with its name and its pod's spec."""
    for path, pod in pods(root):
        for container in pod["containers"]:
            yield f"{path}/{container['name']}", container, pod


def env(container: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}


def commands(root: str) -> Iterator[list[str]]:
    """Every command line in it that a shell, or nobody, stands between."""
    for _, container, _ in containers(root):
        yield [*container.get("command", []), *container.get("args", [])]
        for hook in container.get("lifecycle", {}).values():
            yield hook["exec"]["command"]
    for each in rendered(root):
        if each["kind"] == "RayJob":
            words = shlex.split(each["spec"]["entrypoint"])
            if words[:2] == ["bash", "-ec"]:
                yield from (shlex.split(line) for line in words[2].split(";"))
            else:
                yield words


def parse(words: list[str]) -> None:
    """Raises click's errors for what the command line doesn't take. Runs nothing."""
    assert words[0] == "shardlift", words
    with cli.make_context("shardlift", words[1:]) as context:
        name, command, rest = cli.resolve_command(context, words[1:])
        assert command is not None
        command.make_context(name, rest, parent=context).close()


# ---- valid -----------------------------------------------------------------------------------------------------------


def validate(folder: Path) -> subprocess.CompletedProcess[str]:
    """The validator's word on every kustomize root under `folder`/k8s."""
    if not VALIDATOR.exists():
        pytest.skip(f"there is no validator at {VALIDATOR}")
    if missing := [name for name in VALIDATOR_NEEDS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"the validator needs {', '.join(missing)} (the dev extra brings them)")
    if KUBECTL is None:
        pytest.skip("the validator needs kubectl (the dev extra brings it)")
    external = [word for each in EXTERNAL for word in ("--external", each)]
    return subprocess.run(
        [sys.executable, str(VALIDATOR), "--werror", *external],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_root_is_valid() -> None:
    done = validate(ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert re.search(rf"\d+ objects in {len(ROOTS)} roots: 0 errors, 0 warnings", done.stderr), done.stderr


def test_a_fault_would_be_found(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "base" / "raycluster.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("minReplicas", "minimumReplicas"), encoding="utf-8")
    for root in ROOTS:
        if root not in ("base", "overlays/gpu"):
            shutil.rmtree(tmp_path / "k8s" / root, ignore_errors=True)
    done = validate(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "minimumReplicas" in done.stdout


def test_the_overlays_are_there() -> None:
    assert {f"overlays/{name}" for name in ("cpu", "gpu", "secure", "gcs-ft", "production")} <= set(ROOTS)
    assert {"load", "job", "namespace", "secrets"} <= set(ROOTS)


# ---- what the validator can't know: the code -------------------------------------------------------------------------


@needs_kubectl
@pytest.mark.parametrize("root", ROOTS)
def test_commands_parse(root: str) -> None:
    for words in commands(root):
        if words and words[0] == "shardlift":
            parse(words)
        else:
            assert not words or "redis" in " ".join(words) or words[0].startswith("--"), words


@needs_kubectl
def test_commands_are_found() -> None:
    found = [" ".join(words[:2]) for root in ROOTS for words in commands(root) if words]
    assert {"shardlift up", "shardlift down", "shardlift load", "shardlift generate"} <= set(found)
    with pytest.raises(click.UsageError):
        parse(["shardlift", "up", "--blocked"])


@needs_kubectl
@pytest.mark.parametrize("root", CLUSTERS)
def test_the_gateway_is_where_it_is_looked_for(root: str) -> None:
    port = up.DEFAULT_PORT
    assert port == channel.DEFAULT_PORT
    head, gateway = ray_cluster(root)["headGroupSpec"]["template"]["spec"]["containers"][:2]
    assert "--port" not in gateway["command"]
    # The page is on the port after it, as nobody says otherwise.
    page = {"name": "page", "containerPort": port + 1}
    assert gateway["ports"] == [{"name": "grpc", "containerPort": port}, page]
    probes = [gateway[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in gateway]
    # Probes speak no TLS: a port of their own, then.
    probed = int(gateway["command"][gateway["command"].index("--health-port") + 1]) if root in ENCRYPTED else port
    assert (probed == port) is (root not in ENCRYPTED)
    assert probed != port + 1, "health listens first, and the page would have no port"
    assert [probe["grpc"] for probe in probes] == [{"port": probed}] * len(probes)
    assert "readinessProbe" in gateway
    # With a restartPolicy of Never, a container that is killed is gone for good.
    never = ray_cluster(root)["headGroupSpec"]["template"]["spec"].get("restartPolicy") == "Never"
    assert ("livenessProbe" in gateway) is ("startupProbe" in gateway) is not never
    assert env(head)["SHARDLIFT_ADDRESS"] == f"127.0.0.1:{port}"
    assert channel.is_loopback(env(head)["SHARDLIFT_ADDRESS"])  # or the Hub token would stay at home
    if root != "job":
        exposed = one(root, "Service", "shardlift-gateway")["spec"]["ports"]
        assert [(each["port"], each["targetPort"]) for each in exposed] == [(port, "grpc"), (port + 1, "page")]
        spoken = ["https", "https"] if root in ENCRYPTED else ["kubernetes.io/h2c", "http"]
        assert [each["appProtocol"] for each in exposed] == spoken
        for policy in rendered(root):
            if (policy["kind"], policy["metadata"]["name"]) == ("NetworkPolicy", "shardlift-gateway"):
                allowed = policy["spec"]["ingress"][0]["ports"]
                assert allowed == [{"port": each, "protocol": "TCP"} for each in (port, port + 1)]


@needs_kubectl
@pytest.mark.parametrize("root", CLUSTERS)
def test_no_port_of_rays_is_the_gateways(root: str) -> None:
    params = ray_cluster(root)["headGroupSpec"]["rayStartParams"]
    pinned = {int(value) for name, value in params.items() if name.endswith("-port")}
    assert len(pinned) == 4
    # 10002 to 19999 are its workers', 52365 its agent's, and these its head's own.
    assert not pinned & {6379, 8080, 8265, 10001, 52365, up.DEFAULT_PORT}
    assert not [port for port in pinned if 10002 <= port <= 19999]


@needs_kubectl
@pytest.mark.parametrize("root", ENCRYPTED)
def test_tls_files_lie_where_they_are_looked_for(root: str) -> None:
    """The gateway's on the head, the stages' on every node at the same path, each from its Secret; and the name in
    their certificates is what is expected of them."""
    head, gateway = ray_cluster(root)["headGroupSpec"]["template"]["spec"]["containers"][:2]
    words = gateway["command"]
    given = {word: words[index + 1] for index, word in enumerate(words) if "-tls-" in word or word.startswith("--tls")}
    assert {"--tls-cert", "--tls-key", "--stage-tls-cert", "--stage-tls-key", "--stage-tls-ca"} == set(given)
    secrets = {"gateway": "shardlift-gateway-tls", "stage": "shardlift-stage-tls"}
    files = {Path(file) for file in (*given.values(), env(head)["SHARDLIFT_TLS_CA"])}
    groups = [ray_cluster(root)["headGroupSpec"], *ray_cluster(root)["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {each["name"]: each.get("secret", {}).get("secretName") for each in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
            for file in files:
                kind = file.parent.name
                if kind == "gateway" and group is not groups[0]:
                    assert str(file.parent) not in mounts, "its key is nobody else's"
                    continue
                assert volumes[mounts[str(file.parent)]["name"]] == secrets[kind]
                assert mounts[str(file.parent)]["readOnly"]
    assert {file.name for file in files} == {"tls.crt", "tls.key", "ca.crt"}
    for kind, secret in secrets.items():
        certificate = re.search(rf"^  secretName: {secret}$(.*?)^```", SECURITY, flags=re.MULTILINE | re.DOTALL)
        assert certificate is not None
        assert (env(head)["SHARDLIFT_TLS_NAME"] if kind == "gateway" else STAGE_NAME) in certificate[1]


@needs_kubectl
@pytest.mark.parametrize("root", CLUSTERS)
def test_whoever_speaks_to_ray_speaks_tls_or_nobody_does(root: str) -> None:
    """Every container with Ray in it, and the autoscaler: with a certificate that its pod has made for itself."""
    cluster = ray_cluster(root)
    speakers, made = [], []
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        speakers += pod["containers"]
        made += [each for each in pod.get("initContainers", ()) if each["name"] == "ray-certificate"]
    speakers += [cluster["autoscalerOptions"]] if "autoscalerOptions" in cluster else []
    if root not in ENCRYPTED:
        assert made == []
        assert [each for each in speakers if set(RAY_TLS) & set(env(each))] == []
        return
    assert len(made) == 1 + len(cluster["workerGroupSpecs"])
    assert all(each == made[0] for each in made)
    for each in speakers:
        given = [env(each)[name] for name in RAY_TLS]
        assert given[0] == "1"
        folders = {Path(file).parent.as_posix() for file in given[1:]}
        mounts = {mount["mountPath"]: mount for mount in each["volumeMounts"]}
        assert [mounts[folder]["name"] for folder in folders] == ["ray-certificate"]
        assert "/run/ray-ca" not in mounts, "the CA's key is where certificates are made, and nowhere else"
        assert [Path(file).name for file in given[1:]] == ["tls.crt", "tls.key", "ca.crt"]
    assert made[0]["image"] == cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]


@needs_kubectl
@pytest.mark.parametrize(("overlay", "groups"), [("cpu", ["stages"]), ("gpu", ["mine", "yours"])])
def test_components_are_for_any_groups(overlay: str, groups: list[str], tmp_path: Path) -> None:
    """Whatever the groups are called, and however many they are: each has its certificates, and the cache's volume."""
    k8s = tmp_path / "k8s"
    shutil.copytree(K8S, k8s)
    renamed = k8s / "overlays" / "gpu" / "raycluster.yaml"
    text = renamed.read_text(encoding="utf-8").replace("a100-80gb", "mine").replace("l4-24gb", "yours")
    renamed.write_text(text, encoding="utf-8")
    components = ["secure", "tls", "ray-tls", "gcs-ft", "cache-pvc", "grafana", "autoscaling"]
    overlay_of_mine = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../{overlay}"],
        "components": [f"../../components/{name}" for name in components],
    }
    (k8s / "overlays" / "mine").mkdir()
    (k8s / "overlays" / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(overlay_of_mine), encoding="utf-8")
    (cluster,) = (each["spec"] for each in rendered("overlays/mine", k8s) if each["kind"] == "RayCluster")
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == groups
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert set(RAY_TLS) <= set(env(container))
        assert {"stage-tls", "ray-certificate"} <= {each["name"] for each in container["volumeMounts"]}
        assert [each["name"] for each in pod["initContainers"]] == ["ray-certificate"]
        assert pod["initContainers"][0]["image"] == container["image"]
        assert pod["restartPolicy"] == "Never"
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert len(volumes) == len(pod["volumes"])
        assert {"stage-tls", "ray-ca", "ray-certificate"} <= set(volumes)
        assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "shardlift-cache"}}


@needs_kubectl
def test_a_job_runs_the_image_of_the_cluster_that_it_brings(tmp_path: Path) -> None:
    k8s = tmp_path / "k8s"
    shutil.copytree(K8S, k8s)
    file = k8s / "job" / "cluster" / "kustomization.yaml"
    text = file.read_text(encoding="utf-8")
    assert "../../overlays/cpu" in text
    file.write_text(text.replace("../../overlays/cpu", "../../overlays/gpu"), encoding="utf-8")
    (job,) = (each["spec"] for each in rendered("job", k8s) if each["kind"] == "RayJob")
    cluster = job["rayClusterSpec"]
    assert len(cluster["workerGroupSpecs"]) == 2
    pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    images = {each["image"] for pod in (*pods, job["submitterPodTemplate"]) for each in pod["spec"]["containers"]}
    assert images == {f"shardlift:{shardlift.__version__}-cuda"}


@needs_kubectl
@pytest.mark.parametrize("root", ROOTS)
def test_environment_variables_are_the_codes(root: str) -> None:
    table = set(re.findall(r"^\| `(\w+)` \|", README.partition("## Configuration")[2], flags=re.MULTILINE))
    known = table | {"HF_HOME", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "REDISCLI_AUTH"}
    known |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", *RAY_TLS}
    for where, container, _ in containers(root):
        assert set(env(container)) <= known, where


@needs_kubectl
@pytest.mark.parametrize("root", CLUSTERS)
def test_pods_have_time_for_their_grace(root: str) -> None:
    """The head's for calls that run; a stage's for its stages to be loaded elsewhere."""
    head = ray_cluster(root)["headGroupSpec"]["template"]["spec"]
    assert head["terminationGracePeriodSeconds"] >= GRACE_S + 20
    assert [each for each in head["containers"] if "--grace" in each.get("command", [])] == [], "it would count, too"
    for group in ray_cluster(root)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        drain_s = float(env(pod["containers"][0])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 60 <= drain_s <= pod["terminationGracePeriodSeconds"] - 20


@needs_kubectl
@pytest.mark.parametrize("root", CLUSTERS)
def test_the_gateways_container_and_rays_agree(root: str) -> None:
    head, gateway = ray_cluster(root)["headGroupSpec"]["template"]["spec"]["containers"][:2]
    home = env(head)["SHARDLIFT_HOME"]
    assert env(gateway)["SHARDLIFT_HOME"] == home
    # The gateway's token is the file that `up` would make; a job's comes from the same place.
    assert [each["subPath"] for each in head["volumeMounts"] if each["mountPath"] == f"{home}/token"] == ["token"]
    volumes = {each["name"]: each for each in ray_cluster(root)["headGroupSpec"]["template"]["spec"]["volumes"]}
    reference = env(head)["SHARDLIFT_TOKEN"]["secretKeyRef"]
    assert volumes["token"]["secret"]["secretName"] == reference["name"]
    assert volumes["token"]["secret"]["items"] == [{"key": reference["key"], "path": "token"}]
    assert "SHARDLIFT_TOKEN" not in env(gateway), "it would be written to that file, which can't be written"
    # The token file, Ray's sockets and its object store.
    assert head["volumeMounts"] == gateway["volumeMounts"]
    assert {"/tmp/ray", "/dev/shm", home} <= {each["mountPath"] for each in head["volumeMounts"]}
    auth = ray_cluster(root)["authOptions"]
    assert env(gateway)["RAY_AUTH_MODE"] == auth["mode"] == "token"
    assert env(gateway)["RAY_AUTH_TOKEN"] == {"secretKeyRef": {"name": auth["secretName"], "key": "auth_token"}}


@needs_kubectl
@pytest.mark.parametrize("root", ROOTS)
def test_what_is_written_lies_on_a_volume(root: str) -> None:
    for where, container, pod in containers(root):
        if container["image"].startswith("redis"):
            continue
        assert container["securityContext"]["readOnlyRootFilesystem"], where
        mounted = [each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")]
        assert {"/tmp", "/home/shardlift"} <= set(mounted), where
        for name in ("SHARDLIFT_HOME", "SHARDLIFT_CACHE", "HF_HOME"):
            folder = env(container).get(name)
            assert folder is None or any(folder == each or folder.startswith(f"{each}/") for each in mounted), where
        volumes = {each["name"]: each for each in pod["volumes"]}
        if limit := env(container).get("SHARDLIFT_CACHE_SIZE"):
            room = volumes["cache"].get("emptyDir", {}).get("sizeLimit")
            assert room is None or parse_size(limit) < parse_size(f"{room}B"), where


@needs_kubectl
@pytest.mark.parametrize("root", ROOTS)
def test_pods_are_restricted(root: str) -> None:
    """As the namespace demands (pod-security.kubernetes.io/enforce: restricted), which the validator doesn't check."""
    for where, pod in pods(root):
        context = pod["securityContext"]
        assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"}), where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), where
        assert {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"} <= {
            "emptyDir",
            "persistentVolumeClaim",
            "secret",
        }, where
        asks_kubernetes = ray_cluster(root).get("enableInTreeAutoscaling", False) if root in CLUSTERS else False
        assert pod["automountServiceAccountToken"] is ("headGroupSpec" in where and asks_kubernetes), where
        # A Service's SHARDLIFT_PORT is no port.
        assert pod["enableServiceLinks"] is False, where
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
    if root in CLUSTERS and (options := ray_cluster(root).get("autoscalerOptions")):
        assert options["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@needs_kubectl
@pytest.mark.parametrize("root", CLUSTERS)
def test_a_budget_counts_every_stage(root: str) -> None:
    if root == "job":
        return
    replicas = sum(group["replicas"] for group in ray_cluster(root)["workerGroupSpecs"])
    assert one(root, "PodDisruptionBudget", "shardlift-stages")["spec"]["minAvailable"] == replicas


@needs_kubectl
@pytest.mark.parametrize("root", ROOTS)
def test_versions_are_the_codes(root: str) -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    images = {f"shardlift:{shardlift.__version__}-{target}" for target in ("cpu", "cuda")}
    for where, container, _ in containers(root):
        if container["image"].startswith("shardlift") and root != "base":
            assert container["image"] in images, where
    if root in CLUSTERS:
        assert f"ray=={ray_cluster(root)['rayVersion']}\n" in constraints


@needs_kubectl
def test_secrets_are_placeholders_and_have_every_key() -> None:
    import base64

    given = {
        each["metadata"]["name"]: {key: base64.b64decode(value).decode() for key, value in each["data"].items()}
        for each in rendered("secrets")
    }
    values = [value for secret in given.values() for value in secret.values()]
    assert all(not value or value.startswith("placeholder") for value in values)

    def wanted(value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            if isinstance(reference := value.get("secretKeyRef"), dict):
                yield reference["name"], reference["key"]
            for each in value.values():
                yield from wanted(each)
        elif isinstance(value, list):
            for each in value:
                yield from wanted(each)

    references = {pair for root in ROOTS for each in rendered(root) for pair in wanted(each)}
    assert {("shardlift-tokens", "gateway"), ("shardlift-tokens", "redis"), ("shardlift-hub", "token")} <= references
    assert [pair for pair in references if pair[1] not in given[pair[0]]] == []
    for name, key in references:
        assert f"{key}=" in GUIDE, f"{name} is made with {key} in docs/kubernetes.md"


# ---- the image, and the guide ----------------------------------------------------------------------------------------


def test_the_images_steps_are_the_readmes() -> None:
    steps = re.findall(r"^pip install .*$", README, flags=re.MULTILINE)
    assert len(steps) == 2
    for target in ("cpu", "cuda"):
        stage = DOCKERFILE.partition(f"FROM base AS {target}\n")[2].partition("\nFROM ")[0]
        assert [line[line.index("pip install") :] for line in re.findall(r"^RUN .*$", stage, flags=re.M)] == steps
        assert stage.rpartition("\nRUN ")[2].count("\nUSER 1000\n") == 1, "the last word on who runs it"
        assert f"--target {target} --tag shardlift:{shardlift.__version__}-{target} ." in DOCKERFILE
        assert f"--target {target} --tag shardlift:{shardlift.__version__}-{target} ." in GUIDE


def test_the_image_gets_what_the_package_needs() -> None:
    ignore = (K8S / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    taken = {line[1:] for line in ignore if line.startswith("!")}
    assert [name for name in taken if not (ROOT / name).exists()] == []
    assert {"client", "cluster", "worker", "proto", "__init__.py", "py.typed", "pyproject.toml"} <= taken


def test_the_guides_commands_name_what_exists() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    firsts = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words:
            continue
        firsts.add(words[0])
        if "shardlift" in words:
            start = len(words) - 1 - words[::-1].index("shardlift")
            if words[start + 1 : start + 2] and words[start + 1] in cli.commands:
                parse(words[start:])
        for flag in ("--kustomize", "--file"):
            if flag in words:
                assert (ROOT / words[words.index(flag) + 1]).exists(), line
    assert firsts <= {"docker", "kind", "kubectl", "helm", "export", "shardlift", "grpcurl"}
    assert [root for root in ROOTS if root.startswith("overlays/") and f"k8s/{root}" not in GUIDE] == []
    named = re.findall(r"`(k8s/[\w./-]+)`", GUIDE)
    assert [name for name in named if not (ROOT / name).exists()] == []


# ---- the commands, run -----------------------------------------------------------------------------------------------

HEAD, STAGE = "127.0.0.6", "127.0.0.7"


def flags(group: dict[str, Any], **ours: str) -> list[str]:
    """`ray start`'s, as KubeRay makes them of a group; `ours` are those that have to differ on one machine."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    memory = str(parse_size(f"{limits['memory']}B"))
    values = {"num-cpus": limits["cpu"], "memory": memory, **group["rayStartParams"]}
    values = {name: value for name, value in values.items() if not name.endswith("-port")}
    values |= {name.replace("_", "-"): value for name, value in ours.items()}
    return [f"--{name}={value}" for name, value in values.items()] + ["--block", "--disable-usage-stats"]


@needs_kubectl
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_containers_commands_run(hub: HubServer, smollm2_folder: Path, tmp_path: Path) -> None:
    """The head, a stage's node, the gateway's container, and then the job that loads and asks, as in k8s/job."""
    spec, job = ray_cluster("job"), one("job", "RayJob")["spec"]
    head, gateway = spec["headGroupSpec"]["template"]["spec"]["containers"]
    secrets = {"gateway": "a-token", "auth_token": "placeholder-of-the-length-of-a-token-of-rays", "token": ""}
    gcs, dashboard, port = (free_port(HEAD) for _ in range(3))

    def environment(container: dict[str, Any]) -> dict[str, str]:
        given = {
            name: value if isinstance(value, str) else secrets[value["secretKeyRef"]["key"]]
            for name, value in env(container).items()
        }
        folders = {name: str(tmp_path) + value for name, value in given.items() if value.startswith("/")}
        # What KubeRay adds; and the ports, which others on this machine may have.
        ours = {
            "RAY_ADDRESS": f"{HEAD}:{gcs}",
            "RAY_AUTH_MODE": spec["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": secrets["auth_token"],
            "RAY_USAGE_STATS_ENABLED": "0",
            "SHARDLIFT_PORT": str(port),
            "HF_ENDPOINT": hub.endpoint,
        }
        if "SHARDLIFT_ADDRESS" in given:
            ours["SHARDLIFT_ADDRESS"] = f"127.0.0.1:{port}"
        return {**ENVIRONMENT, **given, **folders, **ours}

    model = shlex.split(job["entrypoint"])[2].split()[2]
    hub.add_repo(model, smollm2_folder)
    (tmp_path / "run" / "shardlift").mkdir(parents=True)
    (tmp_path / "run" / "shardlift" / "token").write_text(secrets["gateway"])
    command = [
        *("ray", "start", "--head", f"--node-ip-address={HEAD}", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port(HEAD)}"),
        *flags(spec["headGroupSpec"], dashboard_host=HEAD),
    ]
    (stages,) = spec["workerGroupSpecs"]
    worker = [
        *("ray", "start", f"--address={HEAD}:{gcs}", f"--node-ip-address={STAGE}"),
        *(f"--dashboard-agent-listen-port={free_port(STAGE)}", *flags(stages)),
    ]
    with (
        running(command, environment(head), tmp_path / "head.log", ready=(HEAD, dashboard)),
        running(worker, environment(stages["template"]["spec"]["containers"][0]), tmp_path / "worker.log"),
        running(
            gateway["command"], environment(gateway), tmp_path / "gateway.log", ready=("127.0.0.1", port)
        ) as keeper,
        grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as connection,
    ):
        health = health_pb2_grpc.HealthStub(connection)

        def serves(service: str) -> bool:
            status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            return bool(status == health_pb2.HealthCheckResponse.SERVING)

        eventually(lambda: serves(""), "the probes' question is not answered", 30)
        # What `kubectl logs` shows of it.
        told = "warning: the gateway listens on 0.0.0.0 without TLS: its token travels in plain text"
        eventually(lambda: told in (tmp_path / "gateway.log").read_text().splitlines(), "it is not warned", 30)
        eventually(lambda: "gateway-started: serving on" in (tmp_path / "gateway.log").read_text(), "no log", 30)
        eventually(
            lambda: "Ray runtime started" in (tmp_path / "worker.log").read_text(), "no node for the stages", 120
        )
        done = submit(f"http://{HEAD}:{dashboard}", environment(head), shlex.split(job["entrypoint"]))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "smollm at 127.0.0.1" in done.stdout
        assert "Paris" in done.stdout
        assert serves("smollm")
        eventually(lambda: "load-ready: " in (tmp_path / "gateway.log").read_text(), "the load isn't in the log", 30)
        parts = list((tmp_path / "cache" / "parts").glob("*.safetensors"))
        assert len(parts) == 2, "the stages' quantized parts lie in the volume"

        # The pod ends: the hook first, in the head's container, while the gateway's gets its SIGTERM.
        keeper.terminate()
        hook = head["lifecycle"]["preStop"]["exec"]["command"]
        left = subprocess.run(hook, env=environment(head), capture_output=True, text=True, timeout=120, check=False)
        assert left.returncode == 0, left.stderr
        assert keeper.wait(60) == 0, (tmp_path / "gateway.log").read_text()
        with pytest.raises(grpc.RpcError):
            serves("")
