"""Experts that transformers merges: to the bit as it merges them, with one expert's bytes at a time in place of all."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shardlift.cluster.checkpoint import CheckpointRequest, read_checkpoint
from shardlift.cluster.planning import TransferOptions
from shardlift.proto.v1.errors import TensorMismatchError
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.merge import MergedParameter, first_rows
from shardlift.worker.skeleton import LazyTensor, build_skeleton, load_weights, parse_config
from tests.support.checkpoints import tiny
from tests.test_layout import planned

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 3
FAMILIES = ("mixtral", "qwen3_moe")
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


# ---- equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "wanted"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_hold_what_transformers_merges(tmp_path: Path, family: str, saved: Any, wanted: str) -> None:
    """Each with some of the layers, through a budget that holds less than one layer's experts."""
    folder = tiny(family, tmp_path, layers=LAYERS, dtype=saved, hidden_size=256, intermediate_size=512)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, wanted)).state_dict()
    found: dict[str, torch.Tensor] = {}
    for spec in planned(folder, stages=2, dtype=wanted).specs("m", "l", "s", TransferOptions(budget_bytes=1 << 18)):
        model = load_stage(replace(spec, device="cpu"), None, LoadProgress()).stage.model
        found |= model.state_dict()
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                assert parameter.is_contiguous()
                assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_they_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Not of their names: 10 comes after 9."""
    folder = tiny("qwen3_moe", tmp_path, layers=1, dtype="bfloat16", num_experts=12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    [spec] = planned(folder, stages=1, quantization=NF4).specs("m", "l", "s")
    ours = load_stage(replace(spec, device="cpu"), None, LoadProgress()).stage.model
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))


# ---- one at a time ---------------------------------------------------------------------------------------------------


class Reads:
    """Tensors as they are read, and the bytes of those of experts that still live."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.live_bytes = self.most_bytes = 0

    def lazy(self, key: str) -> LazyTensor:
        def read() -> torch.Tensor:
            tensor = self._tensors[key].clone()
            if ".experts." in key:
                self._count(tensor.nbytes)
                weakref.finalize(tensor.untyped_storage(), self._count, -tensor.nbytes)
            return tensor

        return LazyTensor("BF16", tuple(self._tensors[key].shape), read)

    def _count(self, size_bytes: int) -> None:
        self.live_bytes += size_bytes
        self.most_bytes = max(self.most_bytes, self.live_bytes)


def read_whole(folder: Path, *, without: str = "", **options: Any) -> tuple[Reads, Any]:
    checkpoint = read_checkpoint(CheckpointRequest(path=str(folder)), None)
    tensors = {key: value for file in checkpoint.versions for key, value in load_file(folder / file).items()}
    reads = Reads(tensors)
    skeleton = build_skeleton(parse_config(checkpoint.config), dtype=torch.bfloat16, **options)
    lazy = {key: reads.lazy(key) for key in tensors if not without or without not in key}
    return reads, lambda: load_weights(skeleton, lazy, "cpu")


@pytest.mark.parametrize(
    "options",
    [{}, {"quantization": NF4}, {"quantization": NF4, "quantize_experts": True}],
    ids=["16", "nf4", "experts"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_tensor_of_an_expert_lives_at_a_time(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = tiny(family, tmp_path, layers=2, dtype="bfloat16")
    reads, load = read_whole(folder, **options)
    load()
    largest = {"mixtral": (128, 64), "qwen3_moe": (64, 64)}[family]
    assert reads.most_bytes == torch.Size(largest).numel() * 2
    assert not reads.live_bytes


def test_what_is_not_whole_is_left_to_transformers_errors(tmp_path: Path) -> None:
    folder = tiny("mixtral", tmp_path, layers=2, dtype="bfloat16")
    _, load = read_whole(folder, without="layers.1.block_sparse_moe.experts.2.w3")
    with pytest.raises(TensorMismatchError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load()


PEAK = """
import sys
from dataclasses import replace
from pathlib import Path
from shardlift.cluster.planning import TransferOptions
from shardlift.worker.loader import LoadProgress, load_stage
from tests.support.checkpoints import tiny
from tests.test_layout import planned

def spec(name, **config):
    folder = tiny("mixtral", Path(sys.argv[1], name), layers=1, dtype="bfloat16", max_shard_size="1GB", **config)
    plan = planned(folder, stages=1)
    [spec] = plan.specs("m", "l", "s", TransferOptions(budget_bytes=1 << 20))
    return replace(spec, device="cpu"), plan.plan.stages[0].resident_bytes

def memory(field):
    [line] = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) << 10

load_stage(spec("small")[0], None, LoadProgress())  # whatever is made once
large, resident_bytes = spec("large", hidden_size=1024, intermediate_size=2048, num_local_experts=8)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now
loaded = load_stage(large, None, LoadProgress())
print(resident_bytes, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_hardly_more_than_what_becomes_resident(tmp_path: Path) -> None:
    """100 MB of experts in one layer, through a budget of 1 MiB. Merged by transformers, they took as much again."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resident_bytes, peak_bytes = map(int, done.stdout.split())
    assert resident_bytes > 100e6
    assert peak_bytes < 1.3 * resident_bytes


# ---- the arithmetic --------------------------------------------------------------------------------------------------


@given(
    experts=st.integers(1, 4),
    heights=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    rest=st.lists(st.integers(1, 3), max_size=2),
)
def test_filling_is_stacking_and_joining(experts: int, heights: list[int], rest: list[int]) -> None:
    sources = [[torch.randn(height, *rest) for _ in range(experts)] for height in heights]
    expected = torch.cat([torch.stack(tensors) for tensors in sources], dim=1).to(torch.bfloat16)
    shape = tuple(expected.shape)
    rows = first_rows(shape, [[tuple(tensor.shape) for tensor in tensors] for tensors in sources])
    assert rows is not None
    merged = MergedParameter(shape, torch.bfloat16, "cpu", experts * len(sources))
    for row, tensors in zip(rows, sources, strict=True):
        for expert, tensor in enumerate(tensors):
            merged.put(expert, row, tensor)
    assert torch.equal(merged.take(), expected)


@pytest.mark.parametrize(
    ("shape", "stacks"),
    [
        ((2, 4, 3), [[(2, 3)] * 2]),  # too few rows
        ((2, 4, 3), [[(2, 3)] * 2, [(3, 3)] * 2]),  # too many
        ((2, 4, 3), [[(4, 3)]]),  # too few tensors
        ((2, 4, 3), [[(4, 3)] * 3]),  # too many
        ((2, 4, 3), [[(2, 3)] * 2, []]),  # none of a source
        ((2, 4, 3), [[(4, 3), (3, 4)]]),  # not alike
        ((2, 4, 3), [[(4, 2)] * 2]),  # too narrow
        ((2, 4, 3), [[(4,)] * 2]),  # flat
        ((2, 4, 3), [[()] * 2]),
        ((2,), [[()] * 2]),  # nothing to lay side by side
    ],
)
def test_what_does_not_fill_a_parameter(shape: tuple[int, ...], stacks: list[list[tuple[int, ...]]]) -> None:
    assert first_rows(shape, stacks) is None
