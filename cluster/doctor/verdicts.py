"""What is to be thought of what probes saw. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ...worker.byte_sizes import format_size
from .finding import Finding
from .seen import Disk, Gpu, Hub, Kernels, Port

# Less than this and a load stops in the middle of writing, or is noticeably short of it.
_LEAST_CACHE_BYTES = 256 << 20
_LITTLE_CACHE_BYTES = 10 << 30
# Ray's object store takes it from here; shardlift puts next to nothing there.
_LEAST_SHM_BYTES = 64 << 20
_SLOW_HUB_S = 5.0
_MOST_MATMUL_ERROR = 1e-2
# A context of CUDA, and what a driver keeps for itself.
_NO_STRANGER_BYTES = 1 << 30
_MOST_SKEW_S = 1.0
_LEAST_LINK_BYTES_PER_S = 50e6
# What comes out otherwise, or not at all, where two stages have different ones.
ALIKE = ("python", "shardlift", "torch", "transformers", "bitsandbytes", "ray", "grpcio", "protobuf", "safetensors")


def versions(found: Mapping[str, str], required: Sequence[str], python: str) -> list[Finding]:
    """Whether what is installed is what the package asks for. required: as in the package's metadata; empty where
    that isn't known. python: the range of Pythons."""
    findings = []
    if not required:
        findings.append(
            Finding(
                check="versions",
                verdict="warn",
                finding="shardlift runs without package metadata: what it needs can't be looked up",
                remedy="install it (`pip install .`, or its wheel) rather than putting its folder on the path",
            )
        )
    wrong, missing = [], []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = found.get(requirement.name, "")
        if not version:
            missing.append(requirement.name)
        elif not _is_in(version, requirement.specifier):
            wrong.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if python and not _is_in(found["python"], SpecifierSet(python)):
        wrong.append(f"Python {found['python']} (needs {python})")
    if missing:
        findings.append(
            Finding(
                check="versions",
                verdict="fail",
                finding=f"not installed: {', '.join(missing)}",
                remedy="install shardlift with what it needs: `pip install .`, or its wheel",
            )
        )
    if wrong:
        findings.append(
            Finding(
                check="versions",
                verdict="fail",
                finding=f"out of range: {', '.join(wrong)}",
                remedy="install versions inside it; constraints.txt names a set that is known to work",
            )
        )
    return findings or [
        Finding(
            check="versions",
            verdict="ok",
            finding=", ".join(f"{name} {found[name]}" for name in ALIKE if found.get(name)),
        )
    ]


def _is_in(version: str, allowed: SpecifierSet) -> bool:
    try:
        return allowed.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def skew(by_node: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether all nodes have the same versions. by_node: node → package → version."""
    differing = []
    for name in ALIKE:
        nodes: dict[str, list[str]] = {}
        for node, found in by_node.items():
            nodes.setdefault(found.get(name) or "none", []).append(node)
        if len(nodes) > 1:
            each = ", ".join(f"{version} on {' '.join(sorted(on))}" for version, on in sorted(nodes.items()))
            differing.append(f"{name}: {each}")
    if not differing:
        return Finding(check="version-skew", verdict="ok", finding=f"{len(by_node)} nodes have the same versions")
    return Finding(
        check="version-skew",
        verdict="fail",
        finding="; ".join(differing),
        remedy="give all nodes one image, or one runtime_env; stages of one model must compute alike",
    )


def cache(disk: Disk | None) -> Finding:
    """The folder of quantized parts; None where none is kept."""
    if disk is None:
        return Finding(check="cache", verdict="ok", finding="no quantized part is kept here (SHARDLIFT_CACHE=off)")
    if disk.problem:
        return Finding(
            check="cache",
            verdict="fail",
            finding=f"{disk.folder} can't be written: {disk.problem}",
            remedy="make room there or make it writable; or set SHARDLIFT_CACHE to another folder, or to off",
        )
    finding = f"{disk.folder} has {format_size(disk.free_bytes)} free of {format_size(disk.total_bytes)}"
    if disk.free_bytes < _LEAST_CACHE_BYTES:
        remedy = "make room: `shardlift cache clear`; or set SHARDLIFT_CACHE to a larger disk, or to off"
        return Finding(check="cache", verdict="fail", finding=finding, remedy=remedy)
    if disk.free_bytes < _LITTLE_CACHE_BYTES:
        remedy = "parts of a large model may find no room: make some, or set SHARDLIFT_CACHE to a larger disk"
        return Finding(check="cache", verdict="warn", finding=finding, remedy=remedy)
    return Finding(check="cache", verdict="ok", finding=finding)


def shared_memory(disk: Disk) -> Finding:
    """/dev/shm, where Ray keeps its object store."""
    if disk.problem or disk.free_bytes < _LEAST_SHM_BYTES:
        seen = disk.problem or f"{format_size(disk.free_bytes)} free of {format_size(disk.total_bytes)}"
        return Finding(
            check="shared-memory",
            verdict="fail",
            finding=f"{disk.folder}: {seen}",
            remedy=f"Ray's object store needs {format_size(_LEAST_SHM_BYTES)} there: docker run --shm-size=1g, or an "
            "emptyDir with medium: Memory",
        )
    return Finding(
        check="shared-memory", verdict="ok", finding=f"{disk.folder} has {format_size(disk.free_bytes)} free"
    )


def hub(seen: Hub) -> Finding:
    """Whether checkpoints can be had from the Hub here."""
    if seen.is_offline:
        return Finding(check="hub", verdict="ok", finding="HF_HUB_OFFLINE is set: nobody asks a Hub here")
    if seen.is_token_broken:
        return Finding(
            check="hub",
            verdict="fail",
            finding="the token that is set here has characters that a header can't carry",
            remedy="copy it anew from the Hub's settings page, and set HF_TOKEN to it; or unset it for public models",
        )
    through = f" through {', '.join(seen.proxies)}" if seen.proxies else ""
    where = f"{seen.endpoint}{through}"
    if not seen.status:
        return Finding(
            check="hub",
            verdict="fail",
            finding=f"nobody answers at {where}: {seen.problem}",
            remedy="look at HF_ENDPOINT, the proxy variables, DNS and firewalls; or, where checkpoints come from "
            "elsewhere, set HF_HUB_OFFLINE=1",
        )
    if seen.status in (401, 403) and seen.has_token:
        return Finding(
            check="hub",
            verdict="fail",
            finding=f"{where} refuses the token that is set here (HTTP {seen.status})",
            remedy="make a new one on the Hub's settings page, and set HF_TOKEN to it; or unset it for public models",
        )
    if seen.status >= 500 or seen.status in (407, 429):
        return Finding(
            check="hub",
            verdict="warn",
            finding=f"{where} answers with HTTP {seen.status}",
            remedy="wait, for loads retry what may pass; HTTP 407 is the proxy's, and wants its user and password",
        )
    if seen.seconds > _SLOW_HUB_S:
        return Finding(
            check="hub",
            verdict="warn",
            finding=f"{where} took {seen.seconds:.1f} s to answer",
            remedy="look at DNS and the proxy; set HF_ENDPOINT to a mirror that is near",
        )
    token = "takes the token" if seen.has_token else "answers; no token is set, which gated models need"
    return Finding(check="hub", verdict="ok", finding=f"{where} {token}")


def port(seen: Port) -> Finding:
    """Whether a port that somebody will want is there to be had."""
    name = f"port-{seen.number}"
    if seen.state == "free":
        return Finding(check=name, verdict="ok", finding=f"free for {seen.what}")
    if seen.state == "ours":
        return Finding(check=name, verdict="ok", finding=f"{seen.what} has it")
    return Finding(
        check=name,
        verdict="warn",
        finding=f"another program has the port that {seen.what} takes by default",
        remedy="end that program, or choose another: `shardlift up --port`, SHARDLIFT_PORT, `ray start --port`",
    )


def kernels(seen: Kernels, driver: str = "", gpus: int = 0) -> list[Finding]:
    """Whether bitsandbytes quantizes and computes here as it must. driver, gpus: as the GPU driver tells of them."""
    if seen.problem:
        return [
            Finding(
                check="kernels",
                verdict="fail",
                finding=f"torch and bitsandbytes could not be tried: {seen.problem}",
                remedy="install them anew for this machine; `python -m bitsandbytes` says what it is missing",
            )
        ]
    findings = []
    if gpus and not seen.torch_gpus:
        built = f"torch is built for CUDA {seen.cuda}" if seen.cuda else "this torch is built without CUDA"
        findings.append(
            Finding(
                check="cuda",
                verdict="fail",
                finding=f"the driver {driver} has {gpus} GPUs, and torch can use none: {built}",
                remedy="renew the driver to one that knows that CUDA, or install torch for one that the driver knows"
                if seen.cuda
                else "install a torch with CUDA",
            )
        )
    for kernel in seen.devices:
        if kernel.problem:
            findings.append(
                Finding(
                    check="kernels",
                    verdict="fail",
                    finding=f"4 bits on {kernel.device} ({seen.library}): {kernel.problem}",
                    remedy="install a bitsandbytes whose libraries fit torch's CUDA and this driver: "
                    "`python -m bitsandbytes` says which it looks for",
                )
            )
        elif kernel.wrong or not kernel.matmul_error <= _MOST_MATMUL_ERROR:
            findings.append(
                Finding(
                    check="kernels",
                    verdict="fail",
                    finding=f"4 bits on {kernel.device} come out wrong: {kernel.wrong} of {kernel.values} values, and "
                    f"a product off by {kernel.matmul_error:.2g}",
                    remedy="take this device out of use (`shardlift drain`): a GPU that computes wrongly is broken, or "
                    "bitsandbytes doesn't know it; renew bitsandbytes and the driver",
                )
            )
        else:
            findings.append(
                Finding(
                    check="kernels",
                    verdict="ok",
                    finding=f"4 bits on {kernel.device} come out as they must ({seen.library})",
                )
            )
    return findings


def gpu_counts(by_ray: int, by_driver: int, by_torch: int) -> Finding:
    """Whether Ray, the driver and torch see the same GPUs."""
    if by_ray == by_driver == by_torch:
        return Finding(check="gpus", verdict="ok", finding=f"Ray, the driver and torch see {by_ray} GPUs")
    finding = f"Ray counts {by_ray} GPUs, the driver {by_driver}, torch {by_torch}"
    if by_ray and not by_driver:
        return Finding(
            check="gpus",
            verdict="warn",
            finding=f"{finding}: those that are made up are slots for CPU workers",
            remedy="if GPUs were meant, install the driver (nvidia-smi must answer in the container); if not, start "
            "Ray without --num-gpus",
        )
    return Finding(
        check="gpus",
        verdict="fail" if by_ray > by_driver else "warn",
        finding=finding,
        remedy="start Ray with the GPUs that there are: --num-gpus, CUDA_VISIBLE_DEVICES, the pod's nvidia.com/gpu",
    )


def strangers(gpus: Sequence[Gpu]) -> list[Finding]:
    """GPUs on which somebody else holds memory."""
    found = []
    for gpu in gpus:
        strange = gpu.used_bytes - gpu.expected_bytes
        if strange > _NO_STRANGER_BYTES:
            found.append(
                Finding(
                    check="gpu-memory",
                    verdict="warn",
                    finding=f"{format_size(strange)} of cuda:{gpu.index} ({gpu.name}, "
                    f"{format_size(gpu.total_bytes)}) are held by what is no model here",
                    remedy="see who it is with nvidia-smi; a worker that was not ended, or another job: plans count "
                    "only on what is free",
                )
            )
    return found


def clock(skew_s: float, uncertainty_s: float) -> Finding:
    """A node's clock beside that of whoever asks."""
    if abs(skew_s) - uncertainty_s <= _MOST_SKEW_S:
        return Finding(check="clock", verdict="ok", finding=f"within {abs(skew_s) + uncertainty_s:.3f} s")
    return Finding(
        check="clock",
        verdict="warn",
        finding=f"{abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}",
        remedy="have NTP set it: signed URLs of stores expire by it, and logs of several nodes can't be laid side by "
        "side",
    )


def link(source: str, target: str, bytes_per_s: float, round_trip_s: float, problem: str) -> Finding:
    """The way for activations from one node to another, over gRPC on a port such as stages take."""
    name, node = "link", source
    if problem:
        return Finding(
            check=name,
            verdict="fail",
            finding=f"{target} can't be reached: {problem}",
            remedy="open all ports between the nodes (stages listen on free ones, 32768 to 60999 on Linux), and let "
            "each be reached at the address that Ray has for it",
            node=node,
        )
    finding = f"{bytes_per_s / 1e6:,.0f} MB/s to {target}, {1e3 * round_trip_s:.1f} ms there and back"
    if bytes_per_s < _LEAST_LINK_BYTES_PER_S:
        return Finding(
            check=name,
            verdict="warn",
            finding=finding,
            remedy="prompts will wait for it: put stages on nodes with a faster link, or look for an MTU or proxy in "
            "the way",
            node=node,
        )
    return Finding(check=name, verdict="ok", finding=finding, node=node)


def silent(node: str, what: str, timeout_s: float) -> Finding:
    """A node that doesn't answer."""
    return Finding(
        check="node",
        verdict="fail",
        finding=f"{what} within {timeout_s:g} s",
        remedy="look into Ray's logs and the load there (`ray status`, `ray logs`); end the node if it stays so: its "
        "stages go elsewhere",
        node=node,
    )
