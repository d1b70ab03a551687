"""compressed-tensors checkpoints, where its package is installed: what transformers' quantizer makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.support import packing
from tests.support.checkpoints import tiny
from tests.support.quantization import nf4
from tests.test_layout import loaded, planned
from tests.test_packed import check_loaded, tensors_of

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


@pytest.mark.parametrize("form", packing.COMPRESSED_WEIGHTS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_it_is_unpacked_as_transformers_does(tmp_path: Path, family: str, form: str) -> None:
    plain = tiny(family, tmp_path / "plain", layers=2, dtype="bfloat16")
    folder = packing.rewrite(plain, tmp_path / "packed", packing.compressed(form), packing.compressed_config(form))
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
