"""`python -m shardlift.cluster.doctor.kernels`: does 4-bit quantization work on this machine's devices?

In a process of its own: what is loaded here, and whatever goes wrong in it, ends with it. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_ROWS, _COLUMNS, _BLOCK = 32, 128, 64
# The sixteen values of NF4, from the paper on QLoRA (Dettmers et al. 2023, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def expected(values: list[float]) -> list[float]:
    """`values` after a round trip through NF4, block by block: each is the nearest of sixteen, times the largest."""
    out: list[float] = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        largest = max(abs(value) for value in block)
        out += [largest * min(_NF4, key=lambda code, value=value: abs(code - value / largest)) for value in block]  # type: ignore[misc]
    return out


def _values() -> list[float]:
    """Some that lie well between two of the sixteen: rounding has no say in which one is nearest."""
    values = []
    for index in range(_ROWS * _COLUMNS):
        # 7 is coprime to 16: every value comes, in no simple order.
        code = _NF4[(7 * index + index // 16) % 16]
        values.append((1.0 if index % _BLOCK == 0 else code * 0.999) * (1 + index // _COLUMNS))
    return values


def _try(device: str) -> dict[str, Any]:
    import bitsandbytes.functional as bnb_functional
    import torch
    from bitsandbytes import matmul_4bit

    values = _values()
    matrix = torch.tensor(values, dtype=torch.float32, device=device).reshape(_ROWS, _COLUMNS)
    packed, state = bnb_functional.quantize_4bit(matrix, blocksize=_BLOCK, quant_type="nf4")
    back = bnb_functional.dequantize_4bit(packed, state)
    wanted = torch.tensor(expected(values), dtype=torch.float32).reshape(_ROWS, _COLUMNS)
    wrong = int(((back.cpu() - wanted).abs() > 1e-5 * wanted.abs()).sum())
    given = torch.linspace(-1, 1, 4 * _COLUMNS, dtype=torch.float32, device=device).reshape(4, _COLUMNS)
    product = matmul_4bit(given, packed.t(), quant_state=state).cpu().double()
    right = given.cpu().double() @ wanted.double().t()
    error = float((product - right).norm() / right.norm())
    return {"device": device, "values": len(values), "wrong": wrong, "matmul_error": error}


def main() -> int:
    import bitsandbytes
    import torch
    from bitsandbytes import cextension

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for device in ["cpu", *(f"cuda:{index}" for index in range(gpus))]:
        try:
            devices.append(_try(device))
        except Exception as error:
            devices.append({"device": device, "problem": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    library = getattr(cextension.lib, "_lib", None)
    print(
        json.dumps(
            {
                "library": f"bitsandbytes {bitsandbytes.__version__}, "
                + (str(getattr(library, "_name", "")).rpartition("/")[2] or "no native library"),
                "cuda": torch.version.cuda or "",
                "torch_gpus": gpus,
                "devices": devices,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
