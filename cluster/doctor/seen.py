"""What probes saw, as values for verdicts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A folder's disk. problem: why nothing can be written there; the sizes are then 0."""

    folder: str
    free_bytes: int = 0
    total_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """How the Hub answered. status: of HTTP; 0 where nobody did, for the `problem`. proxies: names of variables that
    are set. has_token: whether one was sent; it is told nowhere. is_token_broken: one that could not be sent."""

    endpoint: str
    status: int = 0
    seconds: float = 0.0
    problem: str = ""
    has_token: bool = False
    is_token_broken: bool = False
    is_offline: bool = False
    proxies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of this machine: free, or who has it as far as can be told."""

    number: int
    what: str
    state: Literal["free", "ours", "taken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A 4-bit round trip on one device. problem: what kept it from being tried. wrong: values that came out other than
    they must; matmul_error: relative, of a product with the quantized matrix."""

    device: str
    problem: str = ""
    values: int = 0
    wrong: int = 0
    matmul_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """bitsandbytes and torch as they work here. problem: what kept them from being tried at all. cuda: what torch was
    built for, "" for none; torch_gpus: those that torch can use."""

    problem: str = ""
    library: str = ""
    cuda: str = ""
    torch_gpus: int = 0
    devices: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as the driver tells of it. expected_bytes: what models in the registry have been given of it."""

    index: int
    name: str
    used_bytes: int
    total_bytes: int
    expected_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is compared between machines. versions: package → version; driver: NVIDIA's, "" without one."""

    versions: Mapping[str, str]
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    torch_gpus: int = 0
