"""Checkpoints that are quantized already, the whole way through Ray: `from_pretrained` as its users call it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import shardlift
from shardlift.client.handle import RemoteModel
from tests.support import checkpoints, packing
from tests.support.cluster import RunningCluster
from tests.support.quantization import nf4

IDS = torch.arange(5, 17)[None]


def check_bytes(model: RemoteModel) -> None:
    for stage, residency in zip(model.plan.stages, model.residency(), strict=True):
        assert residency.measured_bytes == stage.resident_bytes


def test_a_checkpoint_of_bitsandbytes_wins_over_the_caller(cluster: RunningCluster, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", dtype="bfloat16")
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "nf4")
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        remote = shardlift.AutoModelForCausalLM.from_pretrained(
            tmp_path / "nf4",
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            name="prequantized",
            num_stages=2,
            address=cluster.gateway,
        )
    try:
        assert remote.plan.quantization == "nf4+double"
        assert remote.config.quantization_config.bnb_4bit_quant_type == "nf4"
        local = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
        with torch.inference_mode():
            assert torch.equal(remote(IDS).logits, local(IDS).logits)
        check_bytes(remote)
    finally:
        remote.unload()
    cluster.assert_nothing_left()


def test_gptq_quantized_anew(cluster: RunningCluster, tmp_path: Path) -> None:
    plain = checkpoints.tiny("mixtral", tmp_path / "plain", dtype="bfloat16", layers=2)
    folder = packing.rewrite(plain, tmp_path / "gptq", packing.gptq(order=True), packing.gptq_config(order=True))
    local = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=nf4(), dtype=torch.bfloat16)
    remote = shardlift.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=nf4(),
        requantize=True,
        quantize_experts=False,
        name="requantized",
        num_stages=2,
        address=cluster.gateway,
    )
    try:
        assert remote.plan.quantization == "nf4+double"
        assert remote.config.quantization_config.load_in_4bit, "what it has now, not what the checkpoint had"
        with torch.inference_mode():
            assert torch.equal(remote(IDS).logits, local(IDS).logits)
        check_bytes(remote)
    finally:
        remote.unload()
    with pytest.raises(shardlift.ShardliftError, match=r"requantize=True \(--requantize\)"):
        shardlift.AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), address=cluster.gateway)
    cluster.assert_nothing_left()


@pytest.mark.filterwarnings("ignore")  # of optimum's and gptqmodel's there are many
def test_gptq_that_stays_packed(cluster: RunningCluster, tmp_path: Path) -> None:
    """Each node is asked whether transformers' quantizer is fit there."""
    pytest.importorskip("gptqmodel")
    plain = checkpoints.tiny("llama", tmp_path / "plain", dtype="bfloat16")
    folder = packing.rewrite(plain, tmp_path / "gptq", packing.gptq(order=True), packing.gptq_config(order=True))
    local = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match="quantized with gptq: its weights stay so"):
        remote = shardlift.AutoModelForCausalLM.from_pretrained(
            folder, name="packed", num_stages=2, address=cluster.gateway
        )
    try:
        assert remote.plan.quantization == "gptq"
        with torch.inference_mode():
            assert torch.equal(remote(IDS).logits, local(IDS).logits)
        with pytest.raises(shardlift.ShardliftError, match="dequantize=True"):
            remote.save_pretrained(tmp_path / "out")
        with pytest.raises(shardlift.ShardliftError, match="adapters can't be put on those"):
            remote.load_adapter(str(tmp_path / "adapter"))
    finally:
        remote.unload()
    with pytest.warns(UserWarning, match="its weights are unpacked"):
        remote = shardlift.AutoModelForCausalLM.from_pretrained(
            folder, dequantize=True, name="unpacked", num_stages=2, address=cluster.gateway
        )
    try:
        assert remote.plan.quantization == "none"
        check_bytes(remote)
    finally:
        remote.unload()
    cluster.assert_nothing_left()
