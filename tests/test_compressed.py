"""compressed-tensors checkpoints, where its package is installed: what transformers' quantizer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.support import packing
from tests.support.checkpoints import tiny
from tests.support.quantization import nf4
from tests.test_layout import loaded, planned
from tests.test_packed import check_loaded, tensors_of

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

_WEIGHTS: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "float-quantized": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    "int-quantized": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
}


def config_of(form: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS[form]}},
        "ignore": ["lm_head"],
    }


def packer(form: str) -> packing.Packer:
    """As the package compresses it; what that means, it says itself."""

    def pack(name: str, weight: torch.Tensor) -> Any:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        arguments = _WEIGHTS[form]
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


@pytest.mark.parametrize("form", _WEIGHTS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_it_is_unpacked_as_transformers_does(tmp_path: Path, family: str, form: str) -> None:
    plain = tiny(family, tmp_path / "plain", layers=2, dtype="bfloat16")
    folder = packing.rewrite(plain, tmp_path / "packed", packer(form), config_of(form))
    asked = CompressedTensorsConfig(dequantize=True)
    check_loaded(folder, AutoModelForCausalLM.from_pretrained(folder / "plain"))
    if family == "llama":
        with pytest.warns(UserWarning, match="loading attributes"):
            theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.bfloat16)
        check_loaded(folder, theirs)
    anew, wanted = (
        loaded(planned(each, stages=1, quantization=nf4().to_dict(), requantize=True))[0].stage.model
        for each in (folder, folder / "plain")
    )
    found = tensors_of(wanted)
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors_of(anew).items())
