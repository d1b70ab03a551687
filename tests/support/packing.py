"""Checkpoints with packed weights, as others' tools write them, by the published layouts: in numpy, value by value.

None of it is shared with what unpacks them. Each packer gives the tensors that a file holds for a weight, and the
weight that those mean, computed from the integers before they were packed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# (name of the weight, [outputs, inputs]) -> (suffix -> tensor, what they mean in float64 [outputs, inputs])
Packer = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], np.ndarray]]


def rewrite(folder: Path, out: Path, packer: Packer, config: Mapping[str, Any], *, only: str = ".layers.") -> Path:
    """The checkpoint in `folder` with its layers' matrices packed, in `out`; and beside it, in `out`/plain, the
    checkpoint that it means. `packer` gives names in place of "<module>.weight", beginning with a dot."""
    plain = out / "plain"
    plain.mkdir(parents=True)
    packed_tensors, plain_tensors = {}, {}
    for name, tensor in _tensors(folder).items():
        is_matrix = name.endswith(".weight") and tensor.ndim == 2 and only in name and ".gate.weight" not in name
        if not is_matrix:
            packed_tensors[name] = plain_tensors[name] = tensor
            continue
        parts, meant = packer(name, tensor)
        stem = name.removesuffix(".weight")
        packed_tensors |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
        plain_tensors[name] = torch.from_numpy(meant).float()  # which holds them all
    save_file(packed_tensors, out / "model.safetensors", {"format": "pt"})
    save_file(plain_tensors, plain / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        shutil.copy(folder / file, plain / file)
        shutil.copy(folder / file, out / file)
    said = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(said | {"quantization_config": dict(config)}))
    return out


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers [n, columns] as streams of bits down each column, lowest first: int32 [n * bits / 32, …]."""
    rows, columns = values.shape
    stream = ((values[:, None, :] >> np.arange(bits)[None, :, None]) & 1).reshape(rows * bits // 32, 32, columns)
    words = (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return words.astype(np.uint32).view(np.int32)


def gptq(bits: int = 4, group: int = 32, *, order: bool = False, sym: bool = False, v2: bool = False) -> Packer:
    """`order`: act-order, inputs assigned to groups in a permutation. `sym`: one zero point in the middle for all."""

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        random = _random(name)
        outputs, inputs = weight.shape
        size = inputs if group < 0 else group
        groups = -(-inputs // size)
        g_idx = np.arange(inputs) // size
        if order:
            g_idx = random.permutation(g_idx)
        values = random.integers(0, 1 << bits, (inputs, outputs))
        zeros = random.integers(1, 1 << bits, (groups, outputs))
        if sym:
            zeros[:] = 1 << (bits - 1)
        scales = (random.random((groups, outputs)) * 0.1 / (1 << bits) + 1e-3).astype(np.float16)
        meant = (values - zeros[g_idx]).astype(np.float64) * scales.astype(np.float64)[g_idx]
        stored = zeros if v2 else zeros - 1
        return {
            ".qweight": torch.from_numpy(pack_bits(values, bits)),
            ".qzeros": torch.from_numpy(np.ascontiguousarray(pack_bits(stored.T, bits).T)),
            ".scales": torch.from_numpy(scales),
            ".g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }, np.ascontiguousarray(meant.T)

    return pack


def gptq_config(bits: int = 4, group: int = 32, *, order: bool = False, sym: bool = False, v2: bool = False) -> dict:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": order,
        "sym": sym,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def awq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    random = _random(name)
    outputs, inputs = weight.shape
    groups = inputs // 32
    values = random.integers(0, 16, (inputs, outputs))
    zeros = random.integers(0, 16, (groups, outputs))
    scales = (random.random((groups, outputs)) * 0.01 + 1e-3).astype(np.float16)
    group = np.arange(inputs) // 32
    meant = (values - zeros[group]).astype(np.float64) * scales.astype(np.float64)[group]

    def words(integers: np.ndarray) -> torch.Tensor:
        packed = np.zeros((len(integers), integers.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, column] |= integers[:, column * 8 + which].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(packed.view(np.int32))

    parts = {".qweight": words(values), ".qzeros": words(zeros), ".scales": torch.from_numpy(scales)}
    return parts, np.ascontiguousarray(meant.T)


def fp8(block: tuple[int, int] = (32, 32)) -> Packer:
    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        random = _random(name)
        rows, columns = weight.shape
        high, wide = block
        scales = (random.random((-(-rows // high), -(-columns // wide))) * 1e-3 + 1e-4).astype(np.float32)
        quantized = (weight.float() / weight.abs().max() * 200).to(torch.float8_e4m3fn)
        values = quantized.float().numpy()
        # One scale for each value, by hand.
        spread = np.empty((rows, columns), np.float32)
        for row in range(rows):
            for column in range(0, columns, wide):
                spread[row, column : column + wide] = scales[row // high, column // wide]
        meant = (values * spread).astype(np.float64)  # in float32, as published
        return {".weight": quantized, ".weight_scale_inv": torch.from_numpy(scales)}, meant

    return pack


def fp8_config(block: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic", "fmt": "e4m3"}


COMPRESSED_WEIGHTS: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "float-quantized": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    "int-quantized": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
}


def compressed_config(form: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": COMPRESSED_WEIGHTS[form]}},
        "ignore": ["lm_head"],
    }


def compressed(form: str) -> Packer:
    """As the package compresses it; what that means, it says itself."""

    def pack(name: str, weight: torch.Tensor) -> Any:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        arguments = COMPRESSED_WEIGHTS[form]
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        rows, columns = weight.shape
        groups = columns // arguments.get("group_size", columns)
        most = {4: 7.0, 8: 127.0}[arguments["num_bits"]] if arguments["type"] == "int" else 448.0
        scale = (weight.float().reshape(rows, groups, -1).abs().amax(-1) / most).to(weight.dtype)
        compressor = BaseCompressor.get_value_from_registry(form)
        parts = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        meant = compressor.decompress(dict(parts), scheme)["weight"].to(weight.dtype)
        return {f".{role}": part for role, part in parts.items()}, meant.double().numpy()

    return pack
