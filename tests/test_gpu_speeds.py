"""What drivers call GPUs, and how fast those read their memory."""

from __future__ import annotations

import pytest

from shardlift.cluster.devices import Device
from shardlift.cluster.gpu_speeds import bandwidth
from shardlift.cluster.topology import with_speeds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA H100 NVL", 3938),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA GH200 480GB", 4000),
        ("NVIDIA GH200 144G HBM3e", 4900),
        ("Tesla V100-SXM2-32GB", 900),
        ("Tesla T4", 320),
        ("NVIDIA L4", 300),
        ("NVIDIA L40S", 864),
        ("NVIDIA A10G", 600),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA RTX A6000", 768),
        ("NVIDIA T400", None),
        ("A Card Of Tomorrow", None),
        ("", None),
    ],
)
def test_a_gpus_name_tells_its_bandwidth(name: str, expected: int | None) -> None:
    assert bandwidth(name) == expected


def device(index: int, kind: str = "cuda") -> Device:
    return Device(node="n", name=f"{kind}:{index}", kind=kind, capacity_bytes=1)


def test_speeds_count_where_all_gpus_are_known() -> None:
    devices = [device(0), device(1), device(2, "cpu")]
    names = {"n/cuda:0": "NVIDIA H200", "n/cuda:1": "Tesla T4"}
    assert [each.speed for each in with_speeds(devices, names)] == [4800, 320, 1]
    assert [each.speed for each in with_speeds(devices, {**names, "n/cuda:1": "Other"})] == [1, 1, 1]
    assert with_speeds([], {}) == []
