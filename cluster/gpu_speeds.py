"""How fast GPUs read their memory, which is what bounds decoding. Pure.

Source: the vendors' data sheets. NVIDIA's driver tells neither bandwidth nor bus width.
"""

from __future__ import annotations

# Parts of the name that nvidia-smi gives, all of which must be in it -> GB/s. The first that matches counts.
_BANDWIDTHS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("B300",), 8000),
    (("B200",), 8000),
    (("GH200", "144"), 4900),
    (("GH200",), 4000),
    (("H200",), 4800),
    (("H100", "NVL"), 3938),
    (("H100", "PCIE"), 2039),
    (("H100",), 3350),
    (("H800",), 3350),
    (("H20",), 4000),
    (("A100", "PCIE", "40GB"), 1555),
    (("A100", "PCIE"), 1935),
    (("A100", "40GB"), 1555),
    (("A100",), 2039),
    (("A800",), 2039),
    (("L40S",), 864),
    (("L40",), 864),
    (("L4",), 300),
    (("A40",), 696),
    (("A30",), 933),
    (("A10G",), 600),
    (("A10",), 600),
    (("V100",), 900),
    (("T4",), 320),
    (("RTX 6000 ADA",), 960),
    (("RTX A6000",), 768),
    (("RTX 5090",), 1792),
    (("RTX 4090",), 1008),
    (("RTX 3090",), 936),
)


def bandwidth(name: str) -> int | None:
    """GB/s of the GPU that the driver calls `name`; None for one that isn't known."""
    upper = name.upper()
    words = set(upper.replace("-", " ").split())
    for parts, found in _BANDWIDTHS:
        if all((part in upper) if " " in part or part[0].isdigit() else part in words for part in parts):
            return found
    return None
