"""A second load of the same part: from the node's cache, equal to the bit, and only where everything is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.worker import loader
from shardlift.worker.loader import LoadedStage, LoadProgress, load_stage
from shardlift.worker.part_cache import PartCache, is_worth_keeping, key_of
from shardlift.worker.records import FileVersion
from shardlift.worker.spec import StageSpec
from shardlift.worker.stage import StepInput
from tests.support.checkpoints import FAMILIES, tiny
from tests.support.fingerprint import fingerprint

BNB = {"quant_method": "bitsandbytes"}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4+double": {**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**BNB, "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {**BNB, "load_in_8bit": True},
    "int8 in 16": {**BNB, "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}
NF4 = QUANTIZATIONS["nf4+double"]

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root, made = tmp_path_factory.mktemp("warm"), {}

    def get(family: str, **options: Any) -> Path:
        key = f"{family}-{options}"
        if key not in made:
            made[key] = tiny(family, root / str(len(made)), layers=3, **{"dtype": "bfloat16", **options})
        return made[key]

    return get


@pytest.fixture
def cache(tmp_path: Path) -> PartCache:
    return PartCache(tmp_path / "parts", 1 << 30)


def specs(folder: Path, quantization: dict[str, Any] | None, stages: int = 2) -> list[StageSpec]:
    plan = plan_model(
        CheckpointRequest(path=str(folder)),
        None,
        ModelOptions(quantization=quantization, quantize_experts=False),
        PlanOptions(num_stages=stages),
        parse_devices(f"{stages}x1TiB"),
    )
    return [replace(spec, device="cpu") for spec in plan.specs("m", "l", "secret")]


def load(spec: StageSpec, cache: PartCache | None) -> LoadedStage:
    """Loaded, and kept, as a worker does it."""
    loaded = load_stage(spec, None, LoadProgress(), cache)
    if loaded.keep is not None:
        loaded.keep()
    return loaded


def check_equal(warm: LoadedStage, cold: LoadedStage) -> None:
    assert fingerprint(warm.stage.model) == fingerprint(cold.stage.model)
    assert warm.modules == cold.modules
    ids = torch.arange(1, 9)[None]
    hidden = torch.randn(1, 8, warm.stage.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    step = StepInput(
        input=ids if warm.stage.cut.is_first else hidden.to(warm.stage.model.dtype),
        attention_mask=None,
        position_ids=torch.arange(8)[None],
        use_cache=False,
    )
    answers = [each.stage.forward(step, None) for each in (warm, cold)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3_text"])
def test_a_warm_load_is_the_cold_one_to_the_bit(
    checkpoint_of: Checkpoints, cache: PartCache, family: str, quantization: str
) -> None:
    for spec in specs(checkpoint_of(family), QUANTIZATIONS[quantization]):
        cold = load(spec, cache)
        assert (cold.fetched_bytes, cold.cached_bytes) == (spec.fetch_bytes, 0)
        warm = load(spec, cache)
        assert warm.fetched_bytes == 0
        assert warm.keep is None
        assert warm.link == "this node's cache"
        check_equal(warm, cold)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_from_the_cache(checkpoint_of: Checkpoints, cache: PartCache, family: str) -> None:
    skip = FAMILIES[family].unquantized
    quantization = NF4 | ({"llm_int8_skip_modules": ["lm_head", *skip]} if skip else {})
    for spec in specs(checkpoint_of(family), quantization, stages=1):
        cold = load(spec, cache)
        check_equal(load(spec, cache), cold)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_kept_once(checkpoint_of: Checkpoints, cache: PartCache, tied: bool) -> None:
    for spec in specs(checkpoint_of("llama", tied=tied), NF4):
        cold = load(spec, cache)
        check_equal(load(spec, cache), cold)


def test_a_float32_checkpoint_is_kept_as_it_is_resident(checkpoint_of: Checkpoints, cache: PartCache) -> None:
    [spec] = specs(checkpoint_of("llama", dtype="float32"), NF4, stages=1)
    spec = replace(spec, dtype="bfloat16")
    cold = load(spec, cache)
    warm = load(spec, cache)
    assert warm.cached_bytes < 0.6 * spec.fetch_bytes
    check_equal(warm, cold)


def test_a_part_that_is_not_quantized_is_not_kept(checkpoint_of: Checkpoints, cache: PartCache) -> None:
    """It would be the checkpoint's own bytes once more."""
    [spec] = specs(checkpoint_of("llama"), None, stages=1)
    assert load(spec, cache).keep is None
    assert cache.entries() == []


def test_a_part_that_decayed_is_fetched_again_and_replaced(checkpoint_of: Checkpoints, cache: PartCache) -> None:
    [spec] = specs(checkpoint_of("llama"), NF4, stages=1)
    cold = load(spec, cache)
    [path] = cache.folder.glob("*.safetensors")
    sound = path.read_bytes()
    decayed = bytearray(sound)
    decayed[len(decayed) // 2] ^= 1
    path.write_bytes(decayed)
    again = load(spec, cache)
    assert again.fetched_bytes == spec.fetch_bytes
    check_equal(again, cold)
    assert path.read_bytes() == sound


def test_a_part_of_other_names_is_fetched_again(checkpoint_of: Checkpoints, cache: PartCache) -> None:
    """Sound, but not what it says: a defect elsewhere, which must not become a wrong model."""
    one, other = specs(checkpoint_of("llama"), NF4, stages=2)
    load(one, cache)
    [path] = cache.folder.glob("*.safetensors")
    cold = load(other, None)
    key = key_of(other, "cpu", loader._versions())
    path.rename(path.with_stem(key))
    again = load(other, cache)
    assert again.fetched_bytes == other.fetch_bytes
    check_equal(again, cold)


def test_a_file_without_a_version_is_not_kept(checkpoint_of: Checkpoints) -> None:
    [spec] = specs(checkpoint_of("llama"), NF4, stages=1)
    assert is_worth_keeping(spec)
    file = next(iter(spec.versions))
    assert not is_worth_keeping(replace(spec, versions={**spec.versions, file: FileVersion(size_bytes=1, etag="")}))


CHANGES: dict[str, Callable[[StageSpec], StageSpec]] = {
    "commit": lambda spec: replace(spec, source=replace(spec.source, commit="1" * 40)),
    "place": lambda spec: replace(spec, source=replace(spec.source, location="/elsewhere")),
    "records": lambda spec: replace(spec, records=spec.records[1:]),
    "a range": lambda spec: replace(spec, records=(replace(spec.records[0], start=1), *spec.records[1:])),
    "file": lambda spec: replace(
        spec,
        versions={
            name: FileVersion(size_bytes=version.size_bytes, etag="other") for name, version in spec.versions.items()
        },
    ),
    "quantization": lambda spec: replace(spec, quantization=QUANTIZATIONS["nf4"]),
    "dtype": lambda spec: replace(spec, dtype="float16"),
    "config": lambda spec: replace(spec, config={**spec.config, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_makes_another_part_makes_another_key(checkpoint_of: Checkpoints, change: str) -> None:
    [spec] = specs(checkpoint_of("llama"), NF4, stages=1)
    versions = {"torch": "1"}
    key = key_of(spec, "cpu", versions)
    assert key_of(CHANGES[change](spec), "cpu", versions) != key
    assert key_of(spec, "cuda-9.0", versions) != key
    assert key_of(spec, "cpu", {"torch": "2"}) != key
    # What changes nothing about the bytes: another load of it, by another way.
    same = replace(spec, load_id="other", secret="s", model="n", connections=9, budget_bytes=1 << 20, trace=True)
    assert key_of(same, "cpu", versions) == key
