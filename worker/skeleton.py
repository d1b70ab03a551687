"""Models without weights, and weights into models: the one file that touches transformers' loading internals.

transformers is the definition of a model: its configs, modules, weight renamings and quantizers are used as they are.
Their order here is that of `PreTrainedModel.from_pretrained` (transformers 5.17 to 5.23); `tests/test_skeleton.py` is
the canary for versions after.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.monkey_patching import patch_output_recorders
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, get_hf_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.generic import ContextManagers
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.quantization_config import QuantizationMethod

from ..proto.v1.errors import (
    InvalidRequestError,
    ShardliftError,
    TensorMismatchError,
    UnsupportedModelError,
    one_line,
)
from .anatomy import TEXT_PARTS, Anatomy, Cut, Place, anatomy_of, place_of
from .code_spec import needs_code
from .experts import PROJECTIONS, Experts4bit, by_expert, is_separable
from .merge import MergedParameter, first_rows
from .remote_code import ModelCode
from .rounding import round_activations
from .serialized import check_statistics, restore
from .tensors import dtype_by_name, dtype_name
from .timeline import QUANTIZE, Timeline

# A field that transformers 5.17 doesn't have.
_MORE_INFO: dict[str, Any] = (
    {"skipped_pp_keys": set()} if "skipped_pp_keys" in LoadStateDictInfo.__annotations__ else {}
)


# Of a config's `layer_types`: those whose layers keep a state in place of keys and values, and those that keep neither.
_STATE_KINDS = ("conv", "linear_attention")
_KINDS_WITHOUT_KEYS = (*_STATE_KINDS, "mlp", "moe")

# How a mixture's experts are computed: in a config, as transformers takes it there, though it never writes it.
EXPERTS_IMPLEMENTATION = "experts_implementation"


# Parts of configs whose models take more than text; what `TEXT_PARTS` has is the text's config by then.
_MORE_THAN_TEXT = {"text_config", "vision_config", "audio_config"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """A parameter or buffer of the model as it will be resident.

    quantized: "4bit", "8bit" or "". checkpoint_shape: the shape that its tensor has in a file, which differs where
    transformers transposes (GPT-2's Conv1D). dtype: a torch dtype's name; that of the weight before it is quantized.
    """

    name: str
    shape: tuple[int, ...]
    checkpoint_shape: tuple[int, ...]
    dtype: str
    quantized: str


@dataclass
class Skeleton:
    """A whole `...ForCausalLM` on the meta device, its linear layers already those of the quantizer.

    separate: paths of modules that an `Experts4bit` will stand for once tensors are loaded. Their parameters already go
    by its names; its thousands of modules are not made to plan with.

    keeps_packing: whether the checkpoint's packed weights stay as they are, in the modules of transformers' quantizer
    for them; of bitsandbytes' own form `is_prequantized` tells.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    dtype: torch.dtype
    quantizer: Any
    weight_mapping: list[Any]
    separate: frozenset[str] = frozenset()
    keeps_packing: bool = False

    @property
    def base(self) -> nn.Module:
        return self.model.get_submodule(self.anatomy.base)

    @property
    def num_layers(self) -> int:
        return len(getattr(self.base, self.anatomy.layers))

    @property
    def tied_weights(self) -> dict[str, str]:
        """Name of each tied parameter -> name of the one that it shares."""
        return dict(self.model.all_tied_weights_keys)

    @property
    def is_prequantized(self) -> bool:
        """Whether bitsandbytes has quantized the checkpoint itself."""
        return self.quantizer is not None and bool(self.quantizer.pre_quantized) and not self.keeps_packing

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The quantization that the model has, whoever asked for it: its config as JSON."""
        return None if self.quantizer is None else dict(self.quantizer.quantization_config.to_dict())

    def parameters(self) -> Iterator[ParameterInfo]:
        """Every parameter and buffer, tied ones once."""
        plan = self.model._get_dtype_plan(self.dtype)
        tied = self.tied_weights
        separate_kind = "8bit" if self.separate and self.quantizer.quantization_config.load_in_8bit else "4bit"
        for name, parameter in self.model.named_parameters():
            if name in tied:
                continue
            if self.is_separate(name):
                for each, each_shape in by_expert(name, tuple(parameter.shape)):
                    is_skipped = not should_convert_module(
                        each.removesuffix(".weight"), self.quantizer.modules_to_not_convert
                    )
                    yield ParameterInfo(
                        name=each,
                        shape=each_shape,
                        checkpoint_shape=each_shape,
                        dtype=dtype_name(_kept_dtype(each, plan, parameter.dtype)),
                        quantized="" if is_skipped else separate_kind,
                    )
                continue
            module = self.model.get_submodule(name.rpartition(".")[0])
            quantized = _quantized(module) if name.endswith(".weight") else ""
            shape = tuple(parameter.shape)
            # As soon as bitsandbytes' module stands for it, whatever that keeps the weight in.
            transposed = name.endswith(".weight") and issubclass(getattr(module, "source_cls", object), Conv1D)
            yield ParameterInfo(
                name=name,
                shape=shape,
                checkpoint_shape=shape[::-1] if transposed else shape,
                dtype=dtype_name(_kept_dtype(name, plan, parameter.dtype)),
                quantized=quantized,
            )
        for name, buffer in self.model.named_buffers():
            yield ParameterInfo(
                name=name,
                shape=tuple(buffer.shape),
                checkpoint_shape=tuple(buffer.shape),
                # One that the file holds (a router's bias) follows the plan, too.
                dtype=dtype_name(_kept_dtype(name, plan, buffer.dtype)),
                quantized="",
            )

    def is_linear(self, name: str) -> bool:
        """Whether `name` is the weight of a linear layer: what a quantizer replaces. A router often is none."""
        path, _, parameter = name.rpartition(".")
        return parameter == "weight" and isinstance(self.model.get_submodule(path), (nn.Linear, Conv1D))

    def is_separate(self, name: str) -> bool:
        """Whether `name` is one of a parameter of all experts that are going to be separated."""
        return name.rpartition(".")[0] in self.separate

    def tensor_names(self) -> set[str]:
        """Every parameter and persistent buffer, tied ones too."""
        return self._by_expert(self.model.state_dict())

    def parameter_names(self) -> set[str]:
        return self._by_expert(dict(self.model.named_parameters()))

    def _by_expert(self, tensors: Mapping[str, torch.Tensor]) -> set[str]:
        names = {name for name in tensors if not self.is_separate(name)}
        for name in tensors.keys() - names:
            names.update(each for each, _ in by_expert(name, tuple(tensors[name].shape)))
        return names

    def module_names(self) -> list[str]:
        """The modules that a device map names: the base model's children, each layer, and the head."""
        anatomy = self.anatomy
        names = []
        for name, _ in self.base.named_children():
            if name == anatomy.layers:
                names += [f"{anatomy.base}.{name}.{index}" for index in range(self.num_layers)]
            else:
                names.append(f"{anatomy.base}.{name}")
        return [*names, anatomy.head]

    def kv_elements_per_token(self) -> list[int]:
        """Elements of keys and values that each layer keeps for one token of one row."""
        config = self.model.config.get_text_config(decoder=True)
        if latent := getattr(config, "kv_lora_rank", None):
            # Multi-head latent attention keeps one compressed vector, and the rotary part of the keys.
            elements = latent + config.qk_rope_head_dim
        else:
            if getattr(config, "new_decoder_architecture", False):
                heads = config.num_attention_heads  # Falcon repeats keys and values before it keeps them
            elif getattr(config, "multi_query", False):
                heads = 1
            else:
                heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            elements = 2 * heads * head_dim
        return [0 if kind in _KINDS_WITHOUT_KEYS else elements for kind in self._layer_kinds()]

    def state_bytes_per_row(self) -> list[int]:
        """Bytes that each layer keeps for one row however long it is: what a linear layer has in place of keys.

        The last inputs of its convolution, and where it is recurrent a matrix for each head: in float32, or for MiniMax
        in the model's dtype.
        """
        config = self.model.config.get_text_config(decoder=True)
        recurrent = 0
        if heads := getattr(config, "linear_num_value_heads", None):
            recurrent = heads * config.linear_key_head_dim * config.linear_value_head_dim
        elif heads := getattr(config, "mamba_n_heads", None):
            recurrent = heads * config.mamba_d_head * config.mamba_d_state
        elif heads := getattr(config, "mamba_num_heads", None):
            recurrent = heads * config.mamba_head_dim * config.ssm_state_size
        item_bytes = 4
        if config.model_type == "minimax":
            recurrent, item_bytes = config.num_attention_heads * config.head_dim**2, self.dtype.itemsize
        states = []
        for layer, kind in zip(getattr(self.base, self.anatomy.layers), self._layer_kinds(), strict=True):
            inputs = sum(
                module.out_channels * module.kernel_size[0]
                for module in layer.modules()
                if isinstance(module, nn.Conv1d)
            )
            size = inputs * self.dtype.itemsize + item_bytes * recurrent
            states.append(size if kind in _STATE_KINDS else 0)
        return states

    def _layer_kinds(self) -> list[str]:
        """transformers' words for them; "" for each where the config has none."""
        kinds = getattr(self.model.config.get_text_config(decoder=True), "layer_types", None)
        return list(kinds or [""] * self.num_layers)

    @property
    def head_is_tied(self) -> bool:
        embedding = f"{self.anatomy.base}.{self.anatomy.embedding}."
        return any(source.startswith(embedding) for source in self.tied_weights.values())


def parse_config(config: Mapping[str, Any], code: ModelCode | None = None) -> PreTrainedConfig:
    """A `config.json` as transformers' config object; of a model with images, its text's, as AutoModelForCausalLM does.

    code: the checkpoint's own, where it may run. Raises UnsupportedModelError, InvalidRequestError.
    """
    parsed = whole_config(config, code)
    part = TEXT_PARTS.get(str(config.get("model_type"))) if code is None else None
    if part is None:
        return parsed
    text = parsed.get_text_config()
    # As AutoModelForCausalLM does.
    if (quantization := getattr(parsed, "quantization_config", None)) is not None:
        text.quantization_config = _skipping_as_text(quantization, part.prefixes)
    return text


def whole_config(config: Mapping[str, Any], code: ModelCode | None = None) -> PreTrainedConfig:
    """As `parse_config`, but of a model with images all of it."""
    model_type = config.get("model_type")
    config_class = None if code is None else code.config_class
    if config_class is None and (not isinstance(model_type, str) or model_type not in CONFIG_MAPPING):
        if needs_code(config):
            raise UnsupportedModelError(
                f"model type {model_type!r} is defined by the checkpoint's own code: pass trust_remote_code=True, to a "
                "gateway whose operator allows it (shardlift up --allow-remote-code)"
            )
        architectures = config.get("architectures")
        raise UnsupportedModelError(
            f"config.json names model type {model_type!r} (architectures {architectures}), which the installed "
            "transformers doesn't know: is it a transformers checkpoint, or does it need a newer release?"
        )
    try:
        # A file has infinity as an object of its own, which transformers resolves as it reads one.
        values = PreTrainedConfig._decode_special_floats(dict(config))
        parsed: PreTrainedConfig = (config_class or CONFIG_MAPPING[model_type]).from_dict(values)
        if EXPERTS_IMPLEMENTATION in values:
            # Again, now that the configs of its parts are there.
            parsed._experts_implementation = values[EXPERTS_IMPLEMENTATION]
        return parsed
    except Exception as error:
        raise InvalidRequestError(f"config.json is not a valid {model_type} config: {one_line(error)}") from error


def _skipping_as_text(quantization: Any, prefixes: Mapping[str, str]) -> Any:
    """`quantization` with the modules that it skips named as they are in the text alone."""
    if not isinstance(quantization, Mapping):
        return quantization
    renamed = dict(quantization)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        modules = quantization.get(field)
        if isinstance(modules, list):
            for pattern, prefix in prefixes.items():
                modules = [re.sub(pattern, prefix, module) for module in modules]
            renamed[field] = modules
    return renamed


def causal_class(config: PreTrainedConfig, code: ModelCode | None = None) -> type[PreTrainedModel]:
    """What `AutoModelForCausalLM` makes of `config`. Raises UnsupportedModelError."""
    if code is not None:
        if not (isinstance(code.model_class, type) and issubclass(code.model_class, PreTrainedModel)):
            raise UnsupportedModelError(f"{code.model_class!r} of the checkpoint's code is no PreTrainedModel")
        return code.model_class
    if _MORE_THAN_TEXT & set(config.sub_configs):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} takes more than text, and its text can't be loaded alone yet; "
            f"of these it can: {', '.join(sorted(TEXT_PARTS))}"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"transformers has no causal language model for model type {config.model_type!r}")
    found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found


def build_skeleton(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
    device: str = "cpu",
    attn_implementation: str | None = None,
    quantize_experts: bool = False,
    anatomy: Anatomy | None = None,
    code: ModelCode | None = None,
    keep_packing: bool = False,
    rounding: Mapping[str, Any] | None = None,
) -> Skeleton:
    """The whole model on the meta device, quantizable modules replaced. `config` is not kept.

    Which modules stay unquantized is decided here, on the whole model: decided on a slice it would change.
    `quantization`: what to do on the way in; None for a checkpoint that bitsandbytes has quantized, whose `config` says
    so. `quantize_experts`: to 4 bits those too that transformers merges into parameters of three dimensions; or, of a
    checkpoint that bitsandbytes has quantized, its experts lie there one by one. `anatomy`: of a family that isn't
    listed. `code`: the checkpoint's own. `keep_packing`: as for `Skeleton`; `config` says how weights are packed.
    `rounding`: compressed-tensors' config, by which activations are rounded though weights come unpacked. Raises
    UnsupportedModelError and InvalidRequestError.
    """
    experts_implementation = getattr(config, "_experts_implementation", None)
    config = type(config).from_dict(config.to_dict())
    # Which a config's dict never has.
    config._experts_implementation = experts_implementation
    anatomy = anatomy or anatomy_of(config.model_type)
    model_class = causal_class(config, code)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    try:
        device_map = {"": device}
        if keep_packing:
            quantizer = _own_quantizer(config)
        else:
            quantizer, config, device_map = get_hf_quantizer(
                config, _quantization_config(quantization), device_map, True, {}
            )
        if quantizer is not None:
            dtype = quantizer.update_dtype(dtype)
        config.dtype = dtype
        with ContextManagers(model_class.get_init_context(dtype, quantizer is not None, False, False)):
            model = model_class(config)
            patch_output_recorders(model)
            if quantizer is not None:
                quantizer.preprocess_model(
                    model=model, dtype=dtype, device_map=device_map, checkpoint_files=None, use_kernels=False
                )
            if rounding is not None:
                round_activations(model, rounding)
    except ShardliftError:
        raise
    except Exception as error:
        # What the user's values make transformers raise is of any kind: a KeyError for an unknown activation.
        text = f"{type(error).__name__}: {one_line(error)}" if isinstance(error, LookupError) else one_line(error)
        raise InvalidRequestError(f"the model can't be built as asked: {text}") from error
    skeleton = Skeleton(
        model=model,
        anatomy=anatomy,
        dtype=dtype,
        quantizer=quantizer,
        weight_mapping=[
            *_prefix_renamings(config.model_type),
            *get_model_conversion_mapping(model, None, quantizer),
        ],
        keeps_packing=keep_packing,
    )
    if quantize_experts:
        _separate_experts(skeleton)
        if skeleton.separate and experts_implementation not in (None, "eager"):
            raise InvalidRequestError(
                f"experts_implementation={experts_implementation!r} is not for experts in 4 bits, which are computed "
                "one by one: leave it out, or pass quantize_experts=False (--no-quantize-experts)"
            )
    _check_anatomy(skeleton)
    _check_tied(skeleton)
    return skeleton


def _prefix_renamings(model_type: str) -> list[WeightRenaming]:
    """For the keys of a model with images that the text of `model_type` is part of: no text's own begin so."""
    return [
        WeightRenaming(pattern, prefix)
        for part in TEXT_PARTS.values()
        if part.model_type == model_type
        for pattern, prefix in part.prefixes.items()
    ]


def _own_quantizer(config: PreTrainedConfig) -> Any:
    """What transformers loads a packed checkpoint with, as where its packages and a device for it are.

    Whether they are is asked on each node before (`own_form.misfit`). Not here: a head without a GPU plans for workers
    that have one.
    """
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    config.quantization_config = quantizer.quantization_config
    if hasattr(quantizer.quantization_config, "use_optimized_inference"):
        # Its check of the environment would set it.
        quantizer.use_fp8_kernel = quantizer.quantization_config.use_optimized_inference
    return quantizer


def check_quantizer(config: PreTrainedConfig, device: str) -> str:
    """Why transformers' quantizer doesn't keep the weights of this packed checkpoint as they are, on `device` of this
    machine; "" where it does."""
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(config.quantization_config), pre_quantized=True)
        with quiet_transformers():
            quantizer.validate_environment(device_map={"": device}, weights_only=True)
            if quantizer.quantization_config.quant_method == QuantizationMethod.FP8:
                _try_fp8(quantizer.quantization_config, device)
    except Exception as error:
        return one_line(error)
    if getattr(quantizer.quantization_config, "dequantize", False):
        return f"transformers unpacks {quantizer.quantization_config.quant_method} on this device, too"
    if getattr(quantizer, "use_fp8_kernel", True) is False:
        return "transformers unpacks compressed-tensors at the first pass, unless FP8 kernels are asked for and there"
    return ""


def _try_fp8(config: Any, device: str) -> None:
    """Multiplies with one small weight: transformers fetches FP8 kernels from the Hub at the first pass, when it is too
    late to unpack. Raises what they raise."""
    if getattr(config, "dequantize", False):
        return
    from transformers.integrations.finegrained_fp8 import fp8_linear

    block = list(config.weight_block_size or (128, 128))
    weight = torch.zeros(block, device=device).to(torch.float8_e4m3fn)
    hidden = torch.ones(1, block[1], dtype=torch.bfloat16, device=device)
    if torch.any(fp8_linear(hidden, weight, torch.ones(1, 1, device=device), block)):
        raise RuntimeError("transformers' FP8 kernel computes nonsense on this device")


def _quantization_config(quantization: Mapping[str, Any] | None) -> Any:
    if not quantization:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    # from_dict would drop unknown fields in silence; a mistyped flag must not do nothing.
    config = AutoQuantizationConfig.from_dict(dict(quantization))
    unknown = sorted(set(quantization) - set(config.to_dict()) - {"load_in_4bit", "load_in_8bit", "_load_in_4bit"})
    if unknown:
        raise InvalidRequestError(f"quantization config has unknown fields: {', '.join(unknown)}")
    kind = getattr(config, "bnb_4bit_quant_type", "nf4")
    if kind not in ("fp4", "nf4"):
        # bitsandbytes would notice at the first weight.
        raise InvalidRequestError(f"bnb_4bit_quant_type {kind!r} is neither 'nf4' nor 'fp4'")
    return config


def _check_anatomy(skeleton: Skeleton) -> None:
    """Every parameter must have a known owner: one that no stage, or each stage, would hold is a wrong anatomy."""
    for name, _ in skeleton.model.named_parameters():
        if place_of(name, skeleton.anatomy).part == "shared":
            raise UnsupportedModelError(
                f"parameter {name} of this {skeleton.model.config.model_type} model has no known stage: "
                "its config takes a path that has not been shown to come out right"
            )


def _check_tied(skeleton: Skeleton) -> None:
    """A tied head shares the embedding's weight, which isn't quantized: bitsandbytes' module for it fails at each pass,
    in transformers, too."""
    for name in skeleton.tied_weights:
        path = name.rpartition(".")[0]
        if isinstance(skeleton.model.get_submodule(path), (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            message = (
                f"llm_int8_skip_modules has to name {path!r}, too: it is tied to the embedding, and can't be quantized"
            )
            if skeleton.is_prequantized:
                raise UnsupportedModelError(f"in the quantization_config of the checkpoint, {message}")
            raise InvalidRequestError(f"{message}; a list of modules replaces the default one, which has it")


class KeyMap:
    """From a checkpoint's key to the parameter that it ends up in, as transformers' loader goes about it."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._prefix = skeleton.model.base_model_prefix
        self._renamings = [entry for entry in skeleton.weight_mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in skeleton.weight_mapping if isinstance(entry, WeightConverter)]
        # As in the loader, where it is a dict of tensors of which it asks whether they are None.
        self._meta = dict.fromkeys(skeleton.tensor_names(), True)
        self._known: dict[str, tuple[str, str | None]] = {}
        self._merging = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
            if _merges(converter)
        }
        self._deserializing = {
            pattern
            for converter in self._converters
            if any(getattr(operation, "hf_quantizer", None) is not None for operation in converter.operations)
            for pattern in converter.source_patterns
        }

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The parameter's name; and where the tensor is converted (merged, split, transposed) on the way there, the
        pattern that it goes by."""
        known = self._known.get(key)
        if known is not None:  # transformers tries every pattern on each key
            return known
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._meta)
        if renamed not in self._meta and key in self._meta:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self._meta)
        self._known[key] = renamed, pattern
        return renamed, pattern

    def __contains__(self, name: str) -> bool:
        return name in self._meta

    def keeps_shape(self, pattern: str | None) -> bool:
        """Whether what goes by `pattern` comes to its parameter in the shape that it has in the file; what bitsandbytes
        has quantized aside."""
        return pattern is None or pattern in self._deserializing

    def merges(self, pattern: str | None) -> bool:
        """Whether tensors that go by `pattern` are copied into a parameter of many, and not kept."""
        return pattern in self._merging

    def sources(self, pattern: str | None) -> list[str]:
        """All patterns that the parameter is merged of for which `pattern` is one, in their order; else none."""
        return list(self._merging[pattern].source_patterns) if pattern in self._merging else []


def unmatched_keys(skeleton: Skeleton, matched: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Parameters and kept buffers that no tensor is for, and `unexpected` tensors less those that may be ignored.

    transformers knows which tensors an old checkpoint may have too many, and which buffers it may lack. A parameter
    may never be missing: it would be left random.
    """
    missing = skeleton.tensor_names() - matched - set(skeleton.tied_weights)
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        **_MORE_INFO,
    )
    skeleton.model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys | (missing & skeleton.parameter_names()), info.unexpected_keys


def _quantized(module: nn.Module) -> str:
    if isinstance(module, bnb.nn.Linear4bit):
        return "4bit"
    # has_fp16_weights keeps the weight as it is, and quantizes at each forward.
    return "8bit" if isinstance(module, bnb.nn.Linear8bitLt) and not module.state.has_fp16_weights else ""


def _kept_dtype(name: str, plan: Mapping[str, torch.dtype], otherwise: torch.dtype) -> torch.dtype:
    return next((dtype for pattern, dtype in plan.items() if _matches(pattern, name)), otherwise)


def _matches(pattern: str, name: str) -> bool:
    """Whether a dtype plan's pattern names this parameter, as transformers' glob does: by whole dotted parts."""
    return re.search(rf"(^|\.){re.escape(pattern).replace(chr(92) + '*', '[^.]*')}(\.|$)", name) is not None


def loading_order(keys: list[str], key_map: KeyMap) -> list[str]:
    """`keys` in the order in which `load_weights` takes them: target by target, and of a merged one pattern by pattern,
    each where its first key stands."""
    return [key for patterns in _by_target(keys, key_map).values() for group in patterns.values() for key in group]


def _by_target(keys: Iterable[str], key_map: KeyMap) -> dict[str, dict[str | None, list[str]]]:
    """Target -> pattern -> keys, each in transformers' order."""
    targets: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = key_map(key)
        targets.setdefault(target, {}).setdefault(pattern, []).append(key)
    return targets


class _PassThrough(nn.Module):
    """Stands for a module of another stage: gives back its first argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class _PassThroughLayer(_PassThrough):
    """The same for a layer that gives its output as the first entry of a tuple."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(*args, **kwargs),)


class _Zero(nn.Module):
    """Stands for an embedding that the first stage has already added."""

    def forward(self, *args: Any, **kwargs: Any) -> float:
        return _ZeroOnAnyDevice()


class _ZeroOnAnyDevice(float):
    """0.0 that, like the tensor it stands for, can be asked to move; `x + 0.0` is x to the bit."""

    def to(self, *args: Any, **kwargs: Any) -> _ZeroOnAnyDevice:
        return self


def cut_skeleton(skeleton: Skeleton, cut: Cut) -> None:
    """Takes everything that other stages own out of `skeleton`, in place.

    The layer list keeps its length: indices stay true for layer types, caches and checkpoint names.
    """
    anatomy, model, base = skeleton.anatomy, skeleton.model, skeleton.base
    tied = skeleton.head_is_tied

    def absent(place: Place) -> bool:
        return not place.held_by(cut, tied=tied)

    layers = getattr(base, anatomy.layers)
    for index in range(len(layers)):
        if absent(Place(part="layer", layer=index)):
            whole, layers[index] = layers[index], _PassThroughLayer() if anatomy.layers_give_tuples else _PassThrough()
            for name in anatomy.asked_of_layers:
                setattr(layers[index], name, getattr(whole, name))
    if absent(Place(part="embedding")):
        setattr(base, anatomy.embedding, _PassThrough())
    if absent(Place(part="before")):
        for name in anatomy.before:
            setattr(base, name, _Zero() if name in anatomy.additive else _PassThrough())
    if absent(Place(part="after")):
        for name in anatomy.after:
            setattr(base, name, _PassThrough())
        setattr(model, anatomy.head, _PassThrough())
        # transformers ties what this names; only the last stage has the head.
        model.all_tied_weights_keys = {}
    if not cut.is_first:
        for name, value in anatomy.neutral.items():
            assert hasattr(base, name), name
            setattr(base, name, value)
    skeleton.separate = frozenset(path for path, _ in model.named_modules() if path in skeleton.separate)


class LazyTensor:
    """What transformers' loader takes for a tensor of a file: it asks for the bytes when it converts them."""

    def __init__(self, dtype_tag: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> None:
        self._dtype_tag = dtype_tag
        self._shape = shape
        self._read = read

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype_tag

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._read()
        return tensor if index is Ellipsis else tensor[index]


def load_weights(
    skeleton: Skeleton, tensors: Mapping[str, LazyTensor], device: str, timeline: Timeline | None = None
) -> PreTrainedModel:
    """Converts, quantizes and places `tensors` (by checkpoint key) into the cut skeleton, and gives the ready model.

    Raises TensorMismatchError, which names tensors, unless every parameter got exactly its own: nothing is ever left
    randomly initialised.
    """
    _make_separate_experts(skeleton)
    model, quantizer = skeleton.model, skeleton.quantizer
    tensors, weight_mapping = _streamed(skeleton, tensors, device)
    load_config = _load_config(skeleton, device, weight_mapping)
    # Without quantization, transformers would take all tensors at once, by threads, in another order: what was fetched
    # would pile up before it is converted.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    if quantizer is not None and timeline is not None:
        operation = quantizer.get_quantize_ops
        quantizer.get_quantize_ops = lambda: _Timed(operation(), timeline)
    with quiet_transformers():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), load_config)
        # A failed conversion is reported at the end by transformers; what it couldn't convert counts as missing.
        _check_loading_info(skeleton, info)
    for name, module in model.named_modules():
        # The loader doesn't compare a quantized weight's shape.
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            state = getattr(module.weight, "quant_state", None)
            found = tuple(module.weight.shape if state is None else state.shape)
            if found != (module.out_features, module.in_features):
                raise TensorMismatchError(
                    f"tensor for {name}.weight has shape {list(found)}, the model needs "
                    f"{[module.out_features, module.in_features]}"
                )
            if skeleton.is_prequantized:
                check_statistics(name, module)
    return _finish(skeleton, load_config, info)


def restore_weights(
    skeleton: Skeleton, names: Collection[str], take: Callable[[str], torch.Tensor], device: str
) -> PreTrainedModel:
    """As `load_weights`, from tensors that `serialized.serialize` named: `take` gives each, on `device`.

    Raises CorruptCheckpointError for a tensor missing or too many.
    """
    _make_separate_experts(skeleton)
    model = skeleton.model
    restore(model, names, take, device, skip=skeleton.tied_weights)
    info = LoadStateDictInfo(
        missing_keys=set(skeleton.tied_weights),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        **_MORE_INFO,
    )
    return _finish(skeleton, _load_config(skeleton, device, skeleton.weight_mapping), info)


def _load_config(skeleton: Skeleton, device: str, weight_mapping: list[Any]) -> LoadStateDictConfig:
    return LoadStateDictConfig(
        device_map={"": device},
        dtype=skeleton.dtype,
        dtype_plan=skeleton.model._get_dtype_plan(skeleton.dtype),
        hf_quantizer=skeleton.quantizer,
        weight_mapping=weight_mapping,
    )


def _finish(skeleton: Skeleton, load_config: LoadStateDictConfig, info: LoadStateDictInfo) -> PreTrainedModel:
    """What `from_pretrained` does once tensors are in place: computed buffers, tied weights, evaluation mode."""
    model, quantizer = skeleton.model, skeleton.quantizer
    with quiet_transformers():
        info = type(model)._finalize_model_loading(model, load_config, info)
        _check_loading_info(skeleton, info)
        model.eval()
        if quantizer is not None:
            model.hf_quantizer = quantizer
            quantizer.postprocess_model(model)
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if tensor.is_meta:
            raise TensorMismatchError(f"{name} was left without data by the loader")
    return model


# ---- parameters that are merged of many tensors ----------------------------------------------------------------------


def _merges(converter: WeightConverter) -> bool:
    """Whether it stacks what it finds for "*", and at most joins the stacks of several sources, into one parameter."""
    form = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    several = len(converter.source_patterns) > 1
    return (
        form == ([(MergeModulelist, 0), (Concatenate, 1)] if several else [(MergeModulelist, 0)])
        and len(converter.target_patterns) == 1
        and all(pattern.count("*") == 1 for pattern in converter.source_patterns)
        and not getattr(converter, "force_cpu", False)
    )


def _streamed(
    skeleton: Skeleton, tensors: Mapping[str, LazyTensor], device: str
) -> tuple[dict[str, LazyTensor], list[Any]]:
    """`tensors` and the weight mapping, changed so that a merged parameter is filled while its tensors are read.

    transformers collects them, stacks them, and joins the stacks: up to three times the bytes of all of a layer's
    experts. Where tensors are too few or misshapen it is left to do so, and to say what is wrong.
    """
    key_map = KeyMap(skeleton)
    infos = {info.name: info for info in skeleton.parameters()}
    merged: dict[str, MergedParameter] = {}
    streamed = dict(tensors)
    for target, groups in _by_target(tensors, key_map).items():
        info, sources = infos.get(target), key_map.sources(next(iter(groups)))
        if info is None or info.quantized or not sources:
            continue
        stacks = [[tuple(tensors[key].get_shape()) for key in groups.get(source, [])] for source in sources]
        rows = first_rows(info.shape, stacks)
        if len(groups) != len(sources) or rows is None:
            continue
        merged[target] = MergedParameter(info.shape, dtype_by_name(info.dtype), device, sum(map(len, stacks)))
        for source, row in zip(sources, rows, strict=True):
            for expert, key in enumerate(groups[source]):
                streamed[key] = _placing(tensors[key], merged[target], expert, row)
    mapping = []
    for entry in skeleton.weight_mapping:
        mapping.append(copy.copy(entry))
        if isinstance(entry, WeightConverter) and _merges(entry):
            mapping[-1].operations = [_TakeMerged(entry.operations, merged)]
    return streamed, mapping


def _placing(tensor: LazyTensor, merged: MergedParameter, expert: int, row: int) -> LazyTensor:
    """`tensor` as one that puts itself in its place when it is read, and then is empty."""

    def read() -> torch.Tensor:
        merged.put(expert, row, tensor[...])
        return torch.empty(0)

    return LazyTensor(tensor.get_dtype(), tuple(tensor.get_shape()), read)


class _TakeMerged(ConversionOps):
    """Hands over a merged parameter that reading has filled; does as `operations` do where it has not."""

    def __init__(self, operations: list[ConversionOps], merged: dict[str, MergedParameter]) -> None:
        self._operations, self._merged = operations, merged

    def __deepcopy__(self, memo: dict[int, Any]) -> _TakeMerged:
        return self  # the loader copies converters for each of their tensors

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        merged = self._merged.pop(kwargs["full_layer_name"], None)
        if merged is not None:
            return {kwargs["target_patterns"][0]: merged.take()}
        for operation in self._operations:
            input_dict = operation.convert(input_dict, **kwargs)
        return dict(input_dict)


# ---- experts in 4 bits -----------------------------------------------------------------------------------------------


def _separate_experts(skeleton: Skeleton) -> None:
    """Has experts that would be merged, and so not be quantized, go by names of their own.

    Raises InvalidRequestError unless the model is to be quantized to 4 bits, or is quantized already.
    """
    quantizer = skeleton.quantizer
    is_4bit = getattr(getattr(quantizer, "quantization_config", None), "load_in_4bit", False)
    if not is_4bit and not skeleton.is_prequantized:
        raise InvalidRequestError(
            "quantize_experts=True quantizes experts to 4 bits as the rest of the model: it needs load_in_4bit=True"
        )
    skeleton.separate = frozenset(
        path for path in separable_experts(skeleton) if should_convert_module(path, quantizer.modules_to_not_convert)
    )
    skeleton.weight_mapping = [
        _MergeOrSeparate(entry, skeleton.separate, skeleton.model.base_model_prefix)
        if any(_merges_experts(entry, f"{path}.{name}") for path in skeleton.separate for name in PROJECTIONS)
        else entry
        for entry in skeleton.weight_mapping
    ]


def separable_experts(skeleton: Skeleton) -> frozenset[str]:
    """Paths of the modules whose experts could be quantized one by one."""
    converters = [entry for entry in skeleton.weight_mapping if isinstance(entry, WeightConverter)]
    return frozenset(
        path
        for path, module in skeleton.model.named_modules()
        if is_separable(module)
        and all(any(_merges_experts(each, f"{path}.{name}") for each in converters) for name in PROJECTIONS)
    )


def _merges_experts(entry: Any, name: str) -> bool:
    """Whether it makes the parameter `name` of a separable module, of tensors that are each one expert's projection."""
    if not isinstance(entry, WeightConverter) or not _merges(entry):
        return False
    [target] = entry.target_patterns
    parameter = name.rpartition(".")[2]
    return (
        name.endswith(target)
        and target.endswith(f".{parameter}")
        and len(entry.source_patterns) == len(PROJECTIONS[parameter])
        and all(source.partition("*")[0] == target.removesuffix(parameter) for source in entry.source_patterns)
    )


class _MergeOrSeparate(WeightConverter):
    """A converter that merges experts; those of the modules `separate` it renames instead."""

    def __init__(self, converter: WeightConverter, separate: frozenset[str], base: str) -> None:
        super().__init__(
            list(converter._original_source_patterns),
            list(converter._original_target_patterns),
            operations=converter.operations,
        )
        self.scope_prefix, self.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        self.projections = PROJECTIONS[self.target_patterns[0].rpartition(".")[2]]
        # A checkpoint of the base model alone lacks its prefix, which the loader adds to what comes of this.
        self.separate = separate | {path.removeprefix(f"{base}.") for path in separate}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        # bitsandbytes' statistics go where their weight goes, under their own name.
        stem, name = _weight_and_statistic(source_key)
        merged, pattern = super().rename_source_key(f"{stem}.weight" if name else source_key)
        path = merged.rpartition(".")[0]
        if pattern is None or path not in self.separate:
            return super().rename_source_key(source_key) if name else (merged, pattern)
        before, _, after = pattern.partition("*")
        expert = re.search(rf"{re.escape(before)}(\d+){re.escape(after)}", source_key if not name else f"{stem}.weight")
        if expert is None:
            return source_key, None
        projection = self.projections[self.source_patterns.index(pattern)]
        return f"{path}.{expert[1]}.{projection}.{name or 'weight'}", None


def _weight_and_statistic(key: str) -> tuple[str, str]:
    """Of a statistic of a quantized weight, the weight's module and its own name there: "a.b", "weight.absmax" or
    "SCB"; of anything else `key` and ""."""
    found = re.fullmatch(
        r"(.+)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|weight_format)", key
    )
    return (found[1], found[2]) if found else (key, "")


def _make_separate_experts(skeleton: Skeleton) -> None:
    """Puts modules in place for what has gone by their names so far."""
    if not skeleton.separate:
        return
    model, quantizer = skeleton.model, skeleton.quantizer
    # Random values cost time on the meta device, too.
    with ContextManagers([*type(model).get_init_context(skeleton.dtype, True, False, False), no_init_weights()]):
        for path in skeleton.separate:
            model.set_submodule(path, Experts4bit(model.get_submodule(path)))
        # What it replaced when the skeleton was built it leaves alone.
        replace_with_bnb_linear(
            model,
            quantizer.modules_to_not_convert,
            quantizer.quantization_config,
            pre_quantized=skeleton.is_prequantized,
        )
    skeleton.separate = frozenset()


# ---- back to a checkpoint's names ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedGroup:
    """Tensors of a resident model that become tensors of a checkpoint together; most become one by themselves.

    saved: by the checkpoint's names, on the meta device. convert: the same with their data, given that of all `names`;
    shares their memory where it can. None where one tensor just has another name there.
    """

    names: tuple[str, ...]
    saved: dict[str, torch.Tensor]
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def saved_groups(
    model: PreTrainedModel, checkpoint_keys: Collection[str], resident: Mapping[str, torch.Tensor]
) -> list[SavedGroup]:
    """What `save_pretrained` would write of `resident` (tensors by name, on the meta device), in its order.

    As transformers does (`revert_weight_conversion`), the conversions that the checkpoint needed are undone, and no
    others; checkpoint_keys: those that the tensors came from. Here group by group, so that nothing piles up.
    """
    # The last one first: as they are undone.
    undone = [entry.reverse_transform() for entry in reversed(_used_conversions(model, checkpoint_keys, resident))]
    renamings = [entry for entry in undone if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in undone if isinstance(entry, WeightConverter)]

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    groups: list[SavedGroup] = []
    together: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    for name in sorted(resident, key=dot_natural_key):
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                together.setdefault(target, (converter, []))[1].append((name, pattern))
                break
        else:
            groups.append(SavedGroup(names=(name,), saved={rename(name): resident[name]}))
    for target, (converter, members) in together.items():
        convert = _undoing(model, target, converter, members)
        plain = convert({name: resident[name] for name, _ in members})
        renamed = {name: rename(name) for name in plain}
        groups.append(
            SavedGroup(
                names=tuple(name for name, _ in members),
                saved={renamed[name]: tensor for name, tensor in plain.items()},
                convert=_renamed_after(convert, renamed),
            )
        )
    return groups


def _used_conversions(
    model: PreTrainedModel, checkpoint_keys: Collection[str], resident: Mapping[str, torch.Tensor]
) -> list[Any]:
    """Of the model's conversions those that any of its tensors went through when it was loaded."""
    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = dict.fromkeys(resident, True)
    for key in sorted(checkpoint_keys, key=dot_natural_key):
        rename_source_key(key, renamings, converters, model.base_model_prefix, known)
    return [entry for entry in mapping if entry.was_used()]


def _undoing(
    model: PreTrainedModel, target: str, converter: WeightConverter, members: list[tuple[str, str]]
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fresh = copy.deepcopy(converter)
        for name, pattern in members:
            fresh.add_tensor(target, name, pattern, tensors[name])
        converted = fresh.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    return convert


def _renamed_after(
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]], renamed: Mapping[str, str]
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {renamed[name]: tensor for name, tensor in convert(tensors).items()}


class _Timed(ConversionOps):
    """A quantization, with its time taken down."""

    def __init__(self, operation: ConversionOps, timeline: Timeline) -> None:
        self._operation, self._timeline = operation, timeline

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        tensors = [value[0] if isinstance(value, list) else value for value in input_dict.values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with self._timeline.span(QUANTIZE, str(kwargs.get("full_layer_name", "")), size):
            result = self._operation.convert(input_dict, **kwargs)
            if self._timeline.keeps_spans and tensors and tensors[0].is_cuda:
                # A kernel's time is wanted, not its launch's.
                torch.cuda.synchronize(tensors[0].device)
            return dict(result)


def _check_loading_info(skeleton: Skeleton, info: Any) -> None:
    if info.conversion_errors:
        name, text = next(iter(sorted(info.conversion_errors.items())))
        if "OutOfMemoryError" in text:
            # The loader takes it for a defect of the tensor.
            raise MemoryError(text.strip().splitlines()[-1])
        # The text begins with a traceback; its last lines say what happened.
        raise TensorMismatchError(f"tensors for {name} can't be converted: {one_line(Exception(text[-400:]))}")
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys)[0]
        raise TensorMismatchError(
            f"tensor for {name} has shape {list(found)}, the model needs {list(expected)}{_more(info.mismatched_keys)}"
        )
    ignorable = set(skeleton.model.all_tied_weights_keys)
    missing = sorted(info.missing_keys - ignorable)
    if missing:
        raise TensorMismatchError(f"the checkpoint has no tensor for {missing[0]}{_more(missing)}")
    if info.unexpected_keys:
        unexpected = sorted(info.unexpected_keys)
        raise TensorMismatchError(f"the model has no place for tensor {unexpected[0]}{_more(unexpected)}")


def _more(names: Any) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report in a worker's log: what they would say is raised."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
