"""Families that aren't listed: tried out on a small model of their own, and refused by name where slices differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardlift.cluster import selfcheck
from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, plan_model
from shardlift.cluster.shrink import shrink
from shardlift.proto.v1.errors import UnsupportedModelError
from shardlift.worker.anatomy import FAMILIES, Anatomy
from shardlift.worker.dissection import dissect, variants
from shardlift.worker.skeleton import causal_class, parse_config
from shardlift.worker.spec import StageSpec
from tests.support import checkpoints, ring
from tests.support.quantization import nf4
from tests.test_families import CHUNKS, LENGTH, check_decoding, check_forward, check_generate, prompt

# What families have that no test of ours lists, each of another anatomy.
UNLISTED: dict[str, dict[str, Any]] = {
    "afmoe": {"moe_intermediate_size": 32, "num_experts": 32, "num_experts_per_tok": 2, "head_dim": 16},
    "biogpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": 8},
    "persimmon": {},
    "xglm": {"d_model": 64, "ffn_dim": 128, "attention_heads": 4, "num_layers": 4, "scale_embedding": True},
}
# What their slices can't do: named, with why.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({"is_decoder": True}, "away from its layers"),
    "ctrl": ({}, "without a cache: logits differ by up to"),
    "deepseek_v4": ({}, "RuntimeError"),
    "nanochat": ({}, "logits differ by up to"),
    "openai-gpt": ({}, "RuntimeError"),
}


def save(family: str, folder: Path, **values: Any) -> Path:
    """A tiny checkpoint of any family that transformers has."""
    config_class = CONFIG_MAPPING[family]
    common = dict(checkpoints._COMMON) | {"num_hidden_layers": 4} | values
    default = config_class()
    own = {name: value for name, value in common.items() if hasattr(default, name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_class(**own), dtype=torch.float32)
        checkpoints._perturb_vectors(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", UNLISTED)
async def test_a_family_that_passes_equals_one_process(family: str, tmp_path: Path) -> None:
    assert family not in FAMILIES
    folder = save(family, tmp_path, **UNLISTED[family])
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), dtype=torch.bfloat16)
    stages = ring.load(folder, (1, 3), quantization=nf4().to_dict(), dtype="bfloat16")
    async with ring.serve(stages) as pipeline:
        for padded in (False, True):
            ids, mask = prompt(padded=padded)
            await check_forward(pipeline, whole, ids, mask)
            await check_decoding(pipeline, whole, ids, mask, (LENGTH,), 4)
            await check_decoding(pipeline, whole, ids, mask, CHUNKS, 4)
            await check_generate(pipeline, whole, ids, mask)
        await pipeline.idle()


def test_the_plan_says_so_and_workers_are_told_the_anatomy(tmp_path: Path) -> None:
    folder = save("persimmon", tmp_path)
    request = CheckpointRequest(path=str(folder))
    planned = plan_model(request, None, ModelOptions(), PlanOptions(num_stages=2), parse_devices("2x1GiB"))
    (note,) = planned.plan.to_message().notes
    assert "'persimmon' isn't one of the families" in note
    for spec in planned.specs("model", "load", "secret"):
        assert spec.anatomy == planned.outlined.layout.anatomy
        assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_listed_family_is_neither_tried_nor_told(tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path)
    request = CheckpointRequest(path=str(folder))
    planned = plan_model(request, None, ModelOptions(), PlanOptions(), parse_devices("1x1GiB"))
    assert not planned.plan.to_message().notes
    assert [spec.anatomy for spec in planned.specs("model", "load", "secret")] == [None]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_fails_is_refused_by_name(family: str, tmp_path: Path) -> None:
    """With why; and before anything but headers is read: there are none here."""
    values, why = REFUSED[family]
    config = CONFIG_MAPPING[family](**values).to_dict()
    with pytest.raises(UnsupportedModelError) as raised:
        selfcheck.unlisted_anatomy(json.loads(json.dumps(config)), dtype="bfloat16", attn_implementation=None)
    text = str(raised.value)
    assert f"model type {family!r}" in text
    assert why in text
    assert "supported: apertus, " in text
    assert "\n" not in text


def test_a_wrong_anatomy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite multiplies what enters it: with a multiplier that shows, and nothing said of it, slices differ."""
    monkeypatch.delitem(FAMILIES, "granite")
    folder = checkpoints.tiny("granite", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    found = selfcheck.unlisted_anatomy(config, dtype="bfloat16", attn_implementation=None)
    assert found is not None
    assert found.neutral == {"embedding_multiplier": 1.0}
    monkeypatch.setattr(selfcheck, "variants", lambda whole, anatomy: [anatomy])
    monkeypatch.setattr(selfcheck, "_known", {})
    with pytest.raises(UnsupportedModelError, match="cut before layer 1, without a cache: logits differ by up to"):
        selfcheck.unlisted_anatomy(config, dtype="bfloat16", attn_implementation=None)


# Of these a forward pass doesn't show everything; what else there is makes no difference to the tiny model.
NOT_SEEN = {
    "gptj": {"positions"},
    "mpt": {"positions"},
    "starcoder2": {"neutral"},
    "nemotron_h": {"asked_of_layers"},
}
PARTS = ("before", "after")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_seen_of_a_listed_family_is_what_is_listed(family: str, tmp_path: Path) -> None:
    folder = checkpoints.tiny(family, tmp_path)
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    listed, seen = FAMILIES[family], list(variants(whole, dissect(whole)))

    def differing(one: Anatomy) -> set[str]:
        names = [name for name in Anatomy.__slots__ if getattr(one, name) != getattr(listed, name)]
        # A config may leave some out.
        return {name for name in names if name not in PARTS or not set(getattr(one, name)) < set(getattr(listed, name))}

    assert min((differing(one) for one in seen), key=len) <= NOT_SEEN.get(family, set())


@given(
    layers=st.integers(1, 100),
    kinds=st.lists(
        st.sampled_from(["full_attention", "sliding_attention", "linear_attention"]), min_size=1, max_size=6
    ),
    heads=st.sampled_from([1, 4, 32, 64, 96]),
    shared=st.sampled_from([1, 2, 8, 32, None]),
)
def test_a_small_config_keeps_what_decides(layers: int, kinds: list[str], heads: int, shared: int | None) -> None:
    pattern = (kinds * layers)[:layers]
    config = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "hidden_size": 8192,
        "vocab_size": 128_256,
        "layer_types": pattern,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "sliding_window": 4096,
    }
    small = shrink(config, {})
    assert 1 <= small["num_hidden_layers"] <= min(layers, 12)
    assert small["layer_types"] == pattern[: small["num_hidden_layers"]]
    if layers > 6:
        assert set(small["layer_types"]) == set(pattern)
    assert small["hidden_size"] % small["num_attention_heads"] == 0
    if shared is not None:
        assert small["num_attention_heads"] % small["num_key_value_heads"] == 0
        if shared < heads:
            assert small["num_key_value_heads"] < small["num_attention_heads"]
    assert {name: small[name] for name in ("embedding_multiplier", "hidden_act")} == {
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
    }
    assert small["vocab_size"] == 256


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt2", "qwen3_moe", "gemma3_text"])
def test_a_large_config_becomes_a_model_of_a_second(family: str) -> None:
    whole = CONFIG_MAPPING[family]()
    small = parse_config(shrink(json.loads(whole.to_json_string(use_diff=False)), dict(whole.attribute_map)))
    with torch.device("meta"):
        parameters = sum(each.numel() for each in causal_class(small)(small).parameters())
    assert parameters < 1_000_000
    assert type(small) is type(whole)
