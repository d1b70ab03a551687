"""The canary for transformers' loading internals, and what a checkpoint that isn't right makes of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel, cache_utils, conversion_mapping, core_model_loading, modeling_utils
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils.loading_report import LoadStateDictInfo

from shardlift.cluster.checkpoint import CheckpointRequest, read_checkpoint
from shardlift.proto.v1.errors import (
    LoadCancelledError,
    ShardliftError,
    SourceError,
    TensorMismatchError,
    UnsupportedModelError,
)
from shardlift.worker import anatomy, kv
from shardlift.worker.anatomy import Anatomy, Cut, place_of
from shardlift.worker.kv import StageCache
from shardlift.worker.skeleton import (
    LazyTensor,
    Skeleton,
    build_skeleton,
    cut_skeleton,
    load_weights,
    parse_config,
)
from tests.support.checkpoints import FAMILIES, tiny

LAYERS = 3
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
QUANTIZATIONS = pytest.mark.parametrize("quantization", [None, NF4, INT8], ids=["none", "nf4", "int8"])
UP = "model.layers.1.mlp.up_proj.weight"


# ---- transformers' side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (core_model_loading.convert_and_load_state_dict_in_model, ["model", "state_dict", "load_config"]),
        (
            core_model_loading.rename_source_key,
            ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"],
        ),
        (conversion_mapping.get_model_conversion_mapping, ["model", "key_mapping", "hf_quantizer"]),
        (get_hf_quantizer, ["config", "quantization_config", "device_map", "weights_only", "user_agent"]),
        (PreTrainedModel._get_dtype_plan, ["self", "dtype"]),
        (transformers.PreTrainedConfig._decode_special_floats, ["obj"]),
        (PreTrainedModel._finalize_model_loading, ["model", "load_config", "loading_info"]),
        (PreTrainedModel._adjust_missing_and_unexpected_keys, ["self", "loading_info"]),
        (transformers.GenerationMixin._update_model_kwargs_for_generation, ["self", "outputs", "model_kwargs"]),
    ],
)
def test_what_is_called_takes_what_it_is_given(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_init_context_takes_what_it_is_given() -> None:
    parameters = list(inspect.signature(PreTrainedModel.get_init_context).parameters)
    assert parameters == ["dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels"]


def test_values_have_the_fields_that_are_read() -> None:
    assert {"device_map", "dtype", "dtype_plan", "hf_quantizer", "weight_mapping"} <= {
        field.name for field in dataclasses.fields(modeling_utils.LoadStateDictConfig)
    }
    assert {"missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors", "error_msgs"} <= set(
        LoadStateDictInfo.__annotations__
    )


def test_the_switch_that_makes_loading_sequential() -> None:
    source = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert 'is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD")' in source


def test_caches_have_the_layers_that_are_replaced() -> None:
    assert issubclass(cache_utils.DynamicSlidingWindowLayer, cache_utils.DynamicLayer)
    for name in ("get_seq_length", "get_mask_sizes", "update", "lazy_initialization"):
        assert hasattr(cache_utils.DynamicLayer, name)
    assert "cumulative_length" in inspect.getsource(cache_utils.DynamicSlidingWindowLayer)


# ---- loading by hand -------------------------------------------------------------------------------------------------


class Weights:
    """A checkpoint in memory, to be tampered with."""

    def __init__(self, folder: Path) -> None:
        checkpoint = read_checkpoint(CheckpointRequest(path=str(folder)), None)
        self.config = checkpoint.config
        self.dtypes = {key: record.dtype for key, record in checkpoint.records.items()}
        self.tensors = {key: value for file in checkpoint.versions for key, value in load_file(folder / file).items()}

    def skeleton(self, quantization: Mapping[str, Any] | None = None) -> Skeleton:
        return build_skeleton(parse_config(self.config), dtype=torch.bfloat16, quantization=quantization)

    def load(
        self,
        skeleton: Skeleton,
        changes: Mapping[str, torch.Tensor | Exception | None],
        *,
        cut: Cut | None = None,
    ) -> PreTrainedModel:
        """Loads with some tensors replaced, unreadable, or (None) absent."""
        tensors: dict[str, torch.Tensor | Exception] = dict(self.tensors)
        for key, change in changes.items():
            if change is None:
                del tensors[key]
            else:
                tensors[key] = change
        if cut is not None:
            cut_skeleton(skeleton, cut)
            tensors = {
                key: value
                for key, value in tensors.items()
                if place_of(key, skeleton.anatomy).held_by(cut, tied=skeleton.head_is_tied)
            }
        return load_weights(skeleton, {key: self._lazy(key, value) for key, value in tensors.items()}, "cpu")

    def _lazy(self, key: str, value: torch.Tensor | Exception) -> LazyTensor:
        def read() -> torch.Tensor:
            if isinstance(value, Exception):
                raise value
            return value.clone()

        shape = self.tensors.get(key, torch.empty(0)).shape if isinstance(value, Exception) else value.shape
        return LazyTensor(self.dtypes.get(key, "BF16"), tuple(shape), read)


Get = Callable[[str], Weights]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Get:
    root, made = tmp_path_factory.mktemp("skeleton"), {}

    def get(family: str) -> Weights:
        if family not in made:
            made[family] = Weights(tiny(family, root / family, layers=LAYERS, dtype="bfloat16"))
        return made[family]

    return get


def refusal(load: Callable[[], object], kind: type[ShardliftError] = TensorMismatchError) -> str:
    with pytest.raises(ShardliftError) as caught:
        load()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text
    assert len(text) < 800
    return text


@QUANTIZATIONS
def test_a_tensor_that_never_arrives(weights: Get, quantization: Mapping[str, Any] | None) -> None:
    llama = weights("llama")
    assert f"no tensor for {UP}" in refusal(lambda: llama.load(llama.skeleton(quantization), {UP: None}))
    changes = dict.fromkeys([UP, "model.norm.weight", "lm_head.weight"], None)
    text = refusal(lambda: llama.load(llama.skeleton(quantization), changes))
    assert "no tensor for lm_head.weight (and 2 more)" in text


@QUANTIZATIONS
def test_a_tensor_that_never_arrives_on_its_stage(weights: Get, quantization: Mapping[str, Any] | None) -> None:
    """Those of other stages aren't missed."""
    llama, cut = weights("llama"), Cut(first=1, end=2, num_layers=LAYERS)
    llama.load(llama.skeleton(quantization), {}, cut=cut)
    assert UP in refusal(lambda: llama.load(llama.skeleton(quantization), {UP: None}, cut=cut))


@QUANTIZATIONS
def test_a_tensor_too_many(weights: Get, quantization: Mapping[str, Any] | None) -> None:
    llama = weights("llama")
    for key in ("model.layers.1.mlp.up_proj.bias", "visual.weight", "model.layers.9.mlp.up_proj.weight"):
        text = refusal(lambda key=key: llama.load(llama.skeleton(quantization), {key: torch.ones(3)}))
        assert f"no place for tensor {key}" in text


@QUANTIZATIONS
@pytest.mark.parametrize("shape", [(64, 128), (128, 63), (64,), (8192,), (1, 128, 64)])
def test_a_misshapen_tensor(weights: Get, quantization: Mapping[str, Any] | None, shape: tuple[int, ...]) -> None:
    llama = weights("llama")
    changes = {UP: torch.ones(shape, dtype=torch.bfloat16)}
    text = refusal(lambda: llama.load(llama.skeleton(quantization), changes))
    assert UP in text


@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_misshapen_tensor_that_is_not_quantized(weights: Get, key: str) -> None:
    llama = weights("llama")
    text = refusal(lambda: llama.load(llama.skeleton(NF4), {key: torch.ones(7, dtype=torch.bfloat16)}))
    assert f"tensor for {key} has shape [7]" in text


def test_gpt2_is_transposed_before_it_is_compared(weights: Get) -> None:
    gpt2 = weights("gpt2")
    key = next(key for key in gpt2.tensors if key.endswith("h.1.mlp.c_fc.weight"))
    for quantization in (None, NF4):
        gpt2.load(gpt2.skeleton(quantization), {})
        turned = gpt2.tensors[key].T.contiguous()
        assert "h.1.mlp.c_fc.weight" in refusal(
            lambda turned=turned, chosen=quantization: gpt2.load(gpt2.skeleton(chosen), {key: turned})
        )


@pytest.mark.parametrize("quantization", [None, NF4], ids=["none", "nf4"])
def test_a_missing_or_misshapen_expert(weights: Get, quantization: Mapping[str, Any] | None) -> None:
    """Experts are merged: what one lacks must not become random weights for all."""
    mixtral = weights("mixtral")
    for part in ("w1", "w2"):
        key = next(key for key in mixtral.tensors if f"layers.1.block_sparse_moe.experts.3.{part}" in key)
        for change in (None, torch.ones(3, 5, dtype=torch.bfloat16)):
            text = refusal(lambda key=key, change=change: mixtral.load(mixtral.skeleton(quantization), {key: change}))
            assert "model.layers.1.mlp.experts" in text
        every = {key: None for key in mixtral.tensors if ".layers.1." in key and f".{part}." in key}
        assert "layers.1" in refusal(lambda every=every: mixtral.load(mixtral.skeleton(quantization), every))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("error", [SourceError("the disk is gone"), LoadCancelledError("unloaded")])
def test_what_reading_raises_is_what_the_load_raises(weights: Get, family: str, error: ShardliftError) -> None:
    """transformers collects errors of conversion; one of reading is none."""
    checkpoint = weights(family)
    keys = [UP] if family == "llama" else [key for key in checkpoint.tensors if ".experts." in key][:1]
    for quantization in (None, NF4):
        text = refusal(
            lambda chosen=quantization: checkpoint.load(checkpoint.skeleton(chosen), {keys[0]: error}), type(error)
        )
        assert text == str(error)


# ---- slices ----------------------------------------------------------------------------------------------------------


def cuts() -> Iterator[Cut]:
    for index in range(LAYERS):
        yield Cut(first=index, end=index + 1, num_layers=LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_slices_hold_every_parameter_once(weights: Get, family: str) -> None:
    checkpoint = weights(family)
    skeleton = checkpoint.skeleton()
    whole = set(skeleton.model.state_dict()) - set(skeleton.tied_weights)
    tied = {name for name in whole if name.startswith(f"{skeleton.anatomy.base}.{skeleton.anatomy.embedding}.")}
    found: list[str] = []
    for cut in cuts():
        part = checkpoint.skeleton()
        names = set(part.tied_weights)
        cut_skeleton(part, cut)
        found += set(part.model.state_dict()) - names
    twice = tied if skeleton.head_is_tied else set()
    assert sorted(found) == sorted([*whole, *twice])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_what_is_loaded_by_parts_is_what_transformers_loads(weights: Get, tmp_path: Path, family: str) -> None:
    folder = tiny(family, tmp_path, layers=LAYERS, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    checkpoint = Weights(folder)
    loaded: dict[str, torch.Tensor] = {}
    if family == "mixtral":
        loaded = checkpoint.load(checkpoint.skeleton(), {}).state_dict()
    else:
        for cut in cuts():
            skeleton = checkpoint.skeleton()
            prefix = f"{skeleton.anatomy.base}."
            checkpoint.tensors = {
                key if key.startswith((prefix, skeleton.anatomy.head)) else prefix + key: value
                for key, value in checkpoint.tensors.items()
            }
            loaded |= checkpoint.load(skeleton, {}, cut=cut).state_dict()
    assert set(loaded) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_parameter_of_no_known_stage_is_refused(weights: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(anatomy.FAMILIES, "llama", Anatomy(after=()))
    text = refusal(lambda: weights("llama").skeleton(), UnsupportedModelError)
    assert "parameter model.norm.weight of this llama model has no known stage" in text


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_holds_its_own_layers_alone_and_counts_them_all(weights: Get) -> None:
    config = weights("gemma3_text").skeleton().model.config
    cache = StageCache(config, Cut(first=1, end=2, num_layers=LAYERS))
    assert cache.size_bytes == 0
    for tokens in (5, 1, 1):
        keys = torch.ones(2, 2, tokens, 16)
        cache.cache.update(keys, keys, 1)
        cache.advance(tokens)
    assert cache.length == 7
    assert [layer.get_seq_length() for layer in cache.cache.layers] == [7] * LAYERS
    held = {
        layer.keys.untyped_storage().data_ptr(): layer.keys.untyped_storage().nbytes()
        for layer in cache.cache.layers[1:2]
    }
    assert cache.size_bytes == 2 * sum(held.values())


def test_masks_are_as_large_as_with_the_whole_cache(weights: Get) -> None:
    """transformers takes them from the first layer of a kind, wherever that is."""
    config = weights("gemma3_text").skeleton().model.config
    whole = StageCache(config, Cut(first=0, end=LAYERS, num_layers=LAYERS))
    parts = [StageCache(config, cut) for cut in cuts()]
    for tokens in (9, 4, 1, 1, 16, 3):
        for index in range(LAYERS):
            sizes = whole.cache.get_mask_sizes(tokens, index)
            assert [part.cache.get_mask_sizes(tokens, index) for part in parts] == [sizes] * LAYERS
        keys = torch.zeros(1, 2, tokens, 16)
        for index in range(LAYERS):
            whole.cache.update(keys, keys, index)
            parts[index].cache.update(keys, keys, index)
        for cache in (whole, *parts):
            cache.advance(tokens)


def test_an_unknown_kind_of_cache_layer_is_refused() -> None:
    class Recurrent:
        pass

    with pytest.raises(UnsupportedModelError, match="Recurrent"):
        kv._elsewhere(Recurrent())
