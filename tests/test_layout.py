"""What a checkpoint becomes: names, shapes and bytes, predicted from headers and then measured."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardlift.cluster.checkpoint import Checkpoint, CheckpointRequest, read_checkpoint
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.layout import Layout, lay_out, resolve_dtype
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, PlannedModel, plan_model
from shardlift.proto.v1.errors import InvalidRequestError, ShardliftError, TensorMismatchError, UnsupportedModelError
from shardlift.worker.loader import LoadedStage, LoadProgress, load_stage
from shardlift.worker.quantization import describe_quantization
from shardlift.worker.records import DTYPES, TensorRecord
from shardlift.worker.residency import measure
from shardlift.worker.skeleton import (
    KeyMap,
    LazyTensor,
    build_skeleton,
    load_weights,
    loading_order,
    parse_config,
)
from shardlift.worker.stage import StepInput
from tests.support.checkpoints import FAMILIES, tiny

QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4+double": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
LAYERS = 3

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny checkpoints of three layers, each written once."""
    root, made = tmp_path_factory.mktemp("layout"), {}

    def get(family: str, **options: Any) -> Path:
        key = "-".join([family, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in made:
            made[key] = tiny(family, root / key, layers=LAYERS, dtype="bfloat16", **options)
        return made[key]

    return get


def planned(folder: Path, *, stages: int = LAYERS, **options: Any) -> PlannedModel:
    return plan_model(
        CheckpointRequest(path=str(folder)),
        None,
        ModelOptions(**{"quantize_experts": False, **options}),
        PlanOptions(num_stages=stages),
        parse_devices(f"{stages}x1TiB"),
    )


def loaded(plan: PlannedModel) -> list[LoadedStage]:
    return [load_stage(replace(spec, device="cpu"), None, LoadProgress()) for spec in plan.specs("m", "l", "secret")]


def bytes_of(model: torch.nn.Module) -> int:
    """Each storage once: parameters, buffers and what bitsandbytes keeps beside them. Not by `measure`."""
    storages = {}

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for name in ("quant_state", "state2", "absmax", "code", "offset", "CB", "SCB"):
            part = getattr(value, name, None) if not isinstance(value, torch.Tensor) or name in vars(value) else None
            if part is not None:
                add(part)

    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            add(tensor)
        if (state := getattr(module, "state", None)) is not None:
            add(state)
    return sum(storages.values())


# ---- predicted and measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_the_measured_ones(checkpoint_of: Checkpoints, family: str, quantization: str) -> None:
    plan = planned(checkpoint_of(family), quantization=QUANTIZATIONS[quantization])
    assert plan.plan.outline.quantization == quantization
    for stage, result in zip(plan.plan.stages, loaded(plan), strict=True):
        assert result.fetched_bytes == stage.fetch_bytes
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_checkpoint_is_fetched_once_and_a_tied_embedding_twice(
    checkpoint_of: Checkpoints, family: str, tied: bool
) -> None:
    folder = checkpoint_of(family, tied=tied)
    records = read_checkpoint(CheckpointRequest(path=str(folder)), None).records
    for stages in (1, 2, 3):
        total = planned(folder, stages=stages).plan.to_message().total_fetch_bytes
        embedding = next(
            record for key, record in records.items() if key.endswith(("embed_tokens.weight", "wte.weight"))
        )
        extra = embedding.size_bytes if tied and stages > 1 else 0
        assert total == sum(record.size_bytes for record in records.values()) + extra


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi", "phi3", "mixtral"])
@pytest.mark.parametrize("skip", [None, ["layers.1", "h.0", "mlp.up_proj"], ["lm_head", "q_proj", "fc1"]])
def test_what_stays_unquantized_is_as_in_one_process(
    checkpoint_of: Checkpoints, family: str, skip: list[str] | None
) -> None:
    """The default list included, which is decided on the whole model."""
    folder = checkpoint_of(family)
    tied = family in ("gemma3_text", "gpt2")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    if tied and skip and "lm_head" not in skip:
        # It is loaded there, and then fails at each pass.
        with pytest.raises(AssertionError), torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.long))
        with pytest.raises(InvalidRequestError, match="llm_int8_skip_modules has to name 'lm_head', too"):
            planned(folder, quantization=config.to_dict())
        return
    whole = {module.module: (module.dtype, module.size_bytes) for module in measure(model)}
    plan = planned(folder, quantization=config.to_dict())
    parts: dict[str, tuple[str, int]] = {}
    for stage, result in zip(plan.plan.stages, loaded(plan), strict=True):
        parts |= {module.module: (module.dtype, module.size_bytes) for module in result.modules}
        assert sum(module.size_bytes for module in result.modules) == stage.resident_bytes
    # Where the head is tied, the last stage has the embedding a second time, by the embedding's name.
    assert parts == whole


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "quantization"), [*((family, "none") for family in FAMILIES), ("gpt2", "nf4"), ("mixtral", "nf4")]
)
def test_loading_order_is_that_of_transformers(checkpoint_of: Checkpoints, family: str, quantization: str) -> None:
    """Fetched in any other order, tensors would pile up that nobody asks for yet."""
    folder = checkpoint_of(family)
    checkpoint = read_checkpoint(CheckpointRequest(path=str(folder)), None)
    skeleton = build_skeleton(
        parse_config(checkpoint.config), dtype=torch.bfloat16, quantization=QUANTIZATIONS[quantization]
    )
    weights = {key: value for file in checkpoint.versions for key, value in load_file(folder / file).items()}
    expected = loading_order(list(checkpoint.records)[::-1], KeyMap(skeleton))
    taken: list[str] = []

    def reader(key: str) -> Callable[[], torch.Tensor]:
        return lambda: taken.append(key) or weights[key]  # type: ignore[func-returns-value]

    tensors = {key: LazyTensor(record.dtype, record.shape, reader(key)) for key, record in checkpoint.records.items()}
    load_weights(skeleton, tensors, "cpu")
    assert taken == expected
    assert sorted(taken) == sorted(checkpoint.records)


# ---- what doesn't match ----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(checkpoint_of: Checkpoints) -> Checkpoint:
    return read_checkpoint(CheckpointRequest(path=str(checkpoint_of("llama"))), None)


def laid_out(
    config: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    *,
    quantization: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> Layout:
    return lay_out(
        config, records, dtype="bfloat16", quantization=quantization, attn_implementation=attn_implementation
    )


def refusal(kind: type[ShardliftError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ShardliftError) as caught:
        laid_out(*arguments, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text
    return text


def without(records: Mapping[str, TensorRecord], *keys: str) -> dict[str, TensorRecord]:
    return {key: record for key, record in records.items() if key not in keys}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_missing_tensors(llama: Checkpoint, quantization: str) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    chosen = QUANTIZATIONS[quantization]
    text = refusal(TensorMismatchError, llama.config, without(llama.records, key), quantization=chosen)
    assert f"no tensor for {key}" in text
    rest = without(llama.records, key, "lm_head.weight", "model.norm.weight")
    assert "lm_head.weight (and 2 more)" in refusal(TensorMismatchError, llama.config, rest, quantization=chosen)
    assert "no tensor for" in refusal(TensorMismatchError, llama.config, {})


EXTRA = ("model.layers.7.mlp.up_proj.weight", "visual.patch_embed.weight", "model.norm.bias")


def test_tensors_too_many_are_left_out_and_named(llama: Checkpoint) -> None:
    """As in transformers, which reports them."""
    extra = next(iter(llama.records.values()))
    whole = laid_out(llama.config, llama.records)
    assert not whole.outline.notes
    more = laid_out(llama.config, dict(llama.records) | dict.fromkeys(EXTRA, extra))
    assert more.targets == whole.targets
    assert more.outline.sizes == whole.outline.sizes
    [note] = more.outline.notes
    assert note.endswith("not fetched: model.layers.7.mlp.up_proj.weight, model.norm.bias, visual.patch_embed.weight")
    many = dict.fromkeys([f"extra.{index:02}" for index in range(12)], extra)
    [note] = laid_out(llama.config, dict(llama.records) | many).outline.notes
    assert note.endswith("not fetched: extra.00, extra.01, extra.02, extra.03, extra.04 and 7 more")


def test_tensors_that_old_checkpoints_have_too_many_are_not_mentioned(checkpoint_of: Checkpoints) -> None:
    """transformers knows of them."""
    checkpoint = read_checkpoint(CheckpointRequest(path=str(checkpoint_of("gpt2"))), None)
    extra = next(iter(checkpoint.records.values()))
    old = {f"transformer.h.{layer}.attn.bias": extra for layer in range(LAYERS)}
    assert not laid_out(checkpoint.config, dict(checkpoint.records) | old).outline.notes


def test_tensors_of_another_model_are_missing_ones(llama: Checkpoint, checkpoint_of: Checkpoints) -> None:
    other = read_checkpoint(CheckpointRequest(path=str(checkpoint_of("gpt2"))), None)
    assert "no tensor for lm_head.weight (and " in refusal(TensorMismatchError, llama.config, other.records)


@pytest.mark.parametrize("name", ["SCB", "weight_scale_inv", "weight.absmax", "scales"])
def test_a_weight_that_is_quantized_behind_the_configs_back(llama: Checkpoint, name: str) -> None:
    """It would be taken for what it isn't."""
    extra = next(iter(llama.records.values()))
    key = f"model.layers.1.mlp.up_proj.{name}"
    text = refusal(TensorMismatchError, llama.config, dict(llama.records) | {key: extra})
    assert f"tensor {key} belongs to a quantized weight" in text


async def test_gpt_j_as_published_computes_what_transformers_does(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    """With masks in its files, and fewer layers than it has."""
    folder = shutil.copytree(checkpoint_of("gptj"), tmp_path / "gptj")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(LAYERS)}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file(masks, folder / "masks.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(masks, "masks.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = AutoModelForCausalLM.from_pretrained(folder, n_layer=2)
    plan = planned(folder, stages=2, config_overrides={"n_layer": 2})
    assert plan.plan.to_message().total_fetch_bytes == sum(
        each.size_bytes for spec in plan.specs("m", "l", "s") for each in spec.records
    )
    assert not [record.key for spec in plan.specs("m", "l", "s") for record in spec.records if record.key in masks]
    assert "transformer.h.0.attn.bias, transformer.h.1.attn.bias" in plan.plan.to_message().notes[0]
    hidden = ids = torch.arange(5, 17)[None]
    for each in loaded(plan):
        step = StepInput(input=hidden, attention_mask=None, position_ids=torch.arange(12)[None], use_cache=False)
        hidden = each.stage.forward(step, None)
    with torch.inference_mode():
        assert torch.equal(hidden, whole(ids, use_cache=False).logits)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_misshapen_tensors(llama: Checkpoint, quantization: str) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    record = llama.records[key]
    records = dict(llama.records) | {key: replace(record, shape=record.shape[::-1])}
    text = refusal(TensorMismatchError, llama.config, records, quantization=QUANTIZATIONS[quantization])
    assert f"tensor {key} has shape [64, 128], the model needs [128, 64]" in text
    flat = dict(llama.records) | {key: replace(record, shape=(128 * 64,))}
    assert "has shape [8192]" in refusal(TensorMismatchError, llama.config, flat)


def test_gpt2_weights_lie_the_other_way_in_the_file(checkpoint_of: Checkpoints) -> None:
    checkpoint = read_checkpoint(CheckpointRequest(path=str(checkpoint_of("gpt2"))), None)
    for chosen in (None, QUANTIZATIONS["nf4"]):
        laid_out(checkpoint.config, checkpoint.records, quantization=chosen)
        key = next(key for key in checkpoint.records if key.endswith("h.0.mlp.c_fc.weight"))
        turned = replace(checkpoint.records[key], shape=checkpoint.records[key].shape[::-1])
        text = refusal(
            TensorMismatchError, checkpoint.config, dict(checkpoint.records) | {key: turned}, quantization=chosen
        )
        assert key in text


def test_a_missing_expert(checkpoint_of: Checkpoints) -> None:
    """Its target has other tensors, so only the count can tell; the loader must not fill it in."""
    folder = checkpoint_of("mixtral")
    checkpoint = read_checkpoint(CheckpointRequest(path=str(folder)), None)
    key = next(key for key in sorted(checkpoint.records) if ".experts.2." in key)
    plan = planned(folder)
    spec = next(spec for spec in plan.specs("m", "l", "s") if any(record.key == key for record in spec.records))
    spec = replace(spec, device="cpu", records=tuple(record for record in spec.records if record.key != key))
    with pytest.raises(TensorMismatchError, match="experts"):
        load_stage(spec, None, LoadProgress())


def test_old_rotary_frequencies_are_ignored(llama: Checkpoint) -> None:
    old = replace(next(iter(llama.records.values())), shape=(8,), dtype="F32", start=0, end=32)
    records = dict(llama.records) | {
        f"model.layers.{index}.self_attn.rotary_emb.inv_freq": old for index in range(LAYERS)
    }
    layout = laid_out(llama.config, records)
    assert layout.outline.sizes == laid_out(llama.config, llama.records).outline.sizes, "and not fetched"
    assert set(layout.targets) == set(llama.records)


@pytest.mark.parametrize("stages", [1, 3])
def test_a_tied_head_that_the_file_holds_too(checkpoint_of: Checkpoints, tmp_path: Path, stages: int) -> None:
    folder = checkpoint_of("llama", tied=True)
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    plan = planned(tmp_path, stages=stages)
    for stage, result, usual in zip(
        plan.plan.stages, loaded(plan), planned(folder, stages=stages).plan.stages, strict=True
    ):
        assert result.fetched_bytes == stage.fetch_bytes
        assert bytes_of(result.stage.model) == stage.resident_bytes == usual.resident_bytes
    head = result.stage.model.lm_head.weight
    assert torch.equal(head, tensors["model.embed_tokens.weight"])
    assert head is result.stage.model.model.embed_tokens.weight


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("quantum", ["'quantum'", "newer release"]),
        (None, ["None", "is it a transformers checkpoint"]),
        (7, ["7"]),
        ("", ["''"]),
        ("xglm", ["'xglm' has not been shown", "supported: apertus"]),
        ("bert", ["'bert' has not been shown"]),
    ],
)
def test_unknown_model_type(llama: Checkpoint, model_type: object, parts: list[str]) -> None:
    text = refusal(UnsupportedModelError, dict(llama.config) | {"model_type": model_type}, llama.records)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "large"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_act": "sinh"},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"num_hidden_layers": None},
        {"vocab_size": -1},
        {"num_key_value_heads": "two"},
    ],
)
def test_invalid_config_values(llama: Checkpoint, values: Mapping[str, Any]) -> None:
    text = refusal(InvalidRequestError, dict(llama.config) | values, llama.records)
    assert "config.json is not a valid llama config" in text or "can't be built as asked" in text


def test_another_size_than_the_files_is_named_by_a_tensor(llama: Checkpoint) -> None:
    text = refusal(TensorMismatchError, dict(llama.config) | {"intermediate_size": 96}, llama.records)
    assert "mlp" in text
    assert "the model needs [64, 96]" in text
    [note] = laid_out(dict(llama.config) | {"num_hidden_layers": 2}, llama.records).outline.notes
    assert "not fetched: model.layers.2." in note
    assert "no tensor for model.layers.3." in refusal(
        TensorMismatchError, dict(llama.config) | {"num_hidden_layers": 4}, llama.records
    )


@pytest.mark.parametrize(
    ("quantization", "part"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "unknown fields: bnb_4bit_quant_typ"),
        ({"load_in_4bit": True, "bnb_4bit_use_doublequant": True}, "unknown fields: bnb_4bit_use_doublequant"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": "yes"}, "load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "nf5"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float17"}, "float17"),
        ({"quant_method": "gptq", "bits": 4}, ""),
        ({"quant_method": "magic"}, "magic"),
        ({"bits": 4}, ""),
        ({"quant_method": "bitsandbytes"}, ""),
    ],
)
def test_quantization_that_cannot_be_meant(llama: Checkpoint, quantization: dict[str, Any], part: str) -> None:
    """A mistyped flag must not load something else in silence."""
    if "quant_method" not in quantization and "bits" not in quantization:
        quantization = {"quant_method": "bitsandbytes"} | quantization
    with pytest.raises((InvalidRequestError, UnsupportedModelError)) as refused:
        laid_out(llama.config, llama.records, quantization=quantization)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unknown_attention(llama: Checkpoint) -> None:
    assert "flash_attention_9" in refusal(
        InvalidRequestError, llama.config, llama.records, attn_implementation="flash_attention_9"
    )


# ---- dtype -----------------------------------------------------------------------------------------------------------


def record(key: str, dtype: str) -> TensorRecord:
    return TensorRecord(key=key, file="f", dtype=dtype, shape=(1,), start=0, end=DTYPES[dtype][1] // 8)


def records(**dtypes: str) -> dict[str, TensorRecord]:
    return {key: record(key, dtype) for key, dtype in dtypes.items()}


@pytest.mark.parametrize(
    ("dtype", "config", "tensors", "expected"),
    [
        ("auto", {"dtype": "float16"}, {"a": "F32"}, "float16"),
        ("", {"torch_dtype": "bfloat16"}, {"a": "F32"}, "bfloat16"),
        ("auto", {"torch_dtype": "torch.float16"}, {}, "float16"),
        ("auto", {"dtype": "float32", "torch_dtype": "float16"}, {}, "float32"),
        ("auto", {}, {"a": "I64", "b": "BF16", "c": "F32"}, "bfloat16"),
        ("auto", {"dtype": None}, {"b": "F16", "a": "F8_E4M3"}, "float16"),
        ("auto", {}, {"a": "I64"}, "float32"),
        ("auto", {}, {}, "float32"),
        ("float16", {"dtype": "float32"}, {"a": "F32"}, "float16"),
        ("torch.bfloat16", {}, {}, "bfloat16"),
        ("half", {}, {}, "float16"),
    ],
)
def test_dtype(dtype: str, config: dict[str, Any], tensors: dict[str, str], expected: str) -> None:
    assert resolve_dtype(dtype, config, records(**tensors)) == expected


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float17", {}),
        ("save", {}),
        ("auto", {"dtype": "quantized"}),
        ("int8", {}),
        ("bool", {}),
        ("float8_e4m3fn", {}),
        ("auto", {"torch_dtype": "int64"}),
    ],
)
def test_no_dtype_for_a_model(dtype: str, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"float16|floating"):
        resolve_dtype(dtype, config, {})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_explicit_dtype_is_what_becomes_resident(checkpoint_of: Checkpoints, dtype: str) -> None:
    plan = planned(checkpoint_of("llama"), stages=2, dtype=dtype)
    assert plan.plan.outline.dtype == dtype
    for stage, result in zip(plan.plan.stages, loaded(plan), strict=True):
        assert result.stage.model.dtype is getattr(torch, dtype)
        assert bytes_of(result.stage.model) == stage.resident_bytes
        assert stage.kv_bytes_per_token == stage.cut.end * 0 + sum(
            2 * 2 * 16 * getattr(torch, dtype).itemsize for _ in range(stage.cut.first, stage.cut.end)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_keys_and_values_are_what_a_stage_keeps(checkpoint_of: Checkpoints, family: str) -> None:
    plan = planned(checkpoint_of(family), stages=1)
    [stage], [result] = plan.plan.stages, loaded(plan)
    rows, length = 3, 8
    cache = result.stage.new_cache()
    ids = torch.arange(1, length + 1).expand(rows, -1)
    positions = torch.arange(length)[None]
    result.stage.forward(StepInput(input=ids, attention_mask=None, position_ids=positions), cache)
    config = read_checkpoint(CheckpointRequest(path=str(checkpoint_of(family))), None).config
    states = sum(build_skeleton(parse_config(config), dtype=torch.bfloat16).state_bytes_per_row())
    assert cache.size_bytes == stage.kv_bytes_per_token * rows * length + states * rows


def test_quantization_in_a_word() -> None:
    for name, quantization in QUANTIZATIONS.items():
        assert describe_quantization(quantization) == name
        if quantization:
            assert (
                describe_quantization(
                    transformers.BitsAndBytesConfig(
                        **{key: value for key, value in quantization.items() if key != "quant_method"}
                    ).to_dict()
                )
                == name
            )


def test_a_plan_is_the_same_twice(checkpoint_of: Checkpoints) -> None:
    folder = checkpoint_of("qwen3_moe")
    first, second = (planned(folder, quantization=QUANTIZATIONS["nf4"]) for _ in range(2))
    assert first.plan == second.plan
    specs = [json.dumps(spec.to_json()) for spec in first.specs("m", "l", "s")]
    assert specs == [json.dumps(spec.to_json()) for spec in second.specs("m", "l", "s")]


def test_a_large_model_is_planned_with_its_workspace(tmp_path: Path) -> None:
    """Of a 70B shape, from a config and made-up records."""
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    skeleton = build_skeleton(parse_config(config), dtype=torch.bfloat16)
    records = {
        info.name: TensorRecord(
            key=info.name, file="f", dtype="BF16", shape=info.shape, start=0, end=2 * math.prod(info.shape)
        )
        for info in skeleton.parameters()
        if "inv_freq" not in info.name
    }
    activations = 512 * (4 * 8192 + 2 * 4 * 8192) * 2
    plain = lay_out(config, records, dtype="bfloat16", quantization=None, attn_implementation=None).outline
    assert plain.sizes.workspace_bytes == activations
    nf4 = QUANTIZATIONS["nf4"]
    packed = lay_out(config, records, dtype="bfloat16", quantization=nf4, attn_implementation=None).outline
    # Unpacked to float32, which bitsandbytes computes in unless told otherwise.
    assert packed.sizes.workspace_bytes == activations + 8192 * 28672 * 4
    # What a refusal may offer, and what it weighs.
    assert [option for option, _ in plain.lighter] == [
        "load_in_4bit=True",
        "load_in_4bit=True, bnb_4bit_use_double_quant=True",
    ]
    assert plain.lighter[0][1].stage(0, 2) == packed.sizes.stage(0, 2)


def test_flash_attention_is_planned_anywhere_and_refused_where_it_is_missing(tmp_path: Path) -> None:
    """A head without a GPU plans for workers that have it."""
    folder = tiny("llama", tmp_path, layers=2)
    request = CheckpointRequest(path=str(folder))
    options = ModelOptions(dtype="bfloat16", attn_implementation="flash_attention_2")
    planned = plan_model(request, None, options, PlanOptions(num_stages=2), parse_devices("2x1GiB"))
    spec = planned.specs("model", "load", "secret")[0]
    assert spec.attn_implementation == "flash_attention_2"
    with pytest.raises(InvalidRequestError, match=r"the model can't be built as asked: .*[Ff]lash") as raised:
        load_stage(spec, None, LoadProgress())
    assert "\n" not in str(raised.value)
