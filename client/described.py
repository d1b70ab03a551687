"""What a handle tells of its model, and the requests that follow from it, whoever carries them. No I/O of its own."""

from __future__ import annotations

import copy
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from . import asking, tensors
from .adapters import Adapters, choice, names_of, say
from .values import ModelInfo, Plan

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig
    from typing_extensions import Self

    from .collected import Wanted

# Generation modes that the workers run by themselves: every other is driven from here.
_IN_RING = ("greedy_search", "sample")


class DescribedModel:
    """A model as the registry describes it: the base of both handles."""

    _can_ask = False  # whether `_known` finds out what isn't known

    def __init__(self, name: str, info: ModelInfo | None = None) -> None:
        self.name = name
        self._cached_info = info
        self._config: PreTrainedConfig | None = None
        self._generation_config: GenerationConfig | None = None
        # Chosen by `set_adapter`; None for what the model was loaded with.
        self._adapters: tuple[str, ...] | None = None
        self._adapters_are_off = False

    @property
    def address(self) -> str:
        """The gateway's "host:port"."""
        raise NotImplementedError

    def _known(self, *, measured: bool = False) -> ModelInfo:
        """What does not change while a model is resident; `measured`: with what each stage holds."""
        raise NotImplementedError

    def _lacks(self, *, measured: bool) -> bool:
        """Whether what is known is too little for `_known`."""
        info = self._cached_info
        return info is None or not info.plan.stages or not info.config_json or (measured and not info.residency)

    def __repr__(self) -> str:
        info, kind = self._cached_info, type(self).__name__
        if info is None:
            return f"{kind}({self.name!r} at {self.address})"
        stages = len(info.plan.stages)
        return (
            f"{kind}({self.name!r} at {self.address}: {info.plan.model}, {info.plan.quantization}, "
            f"{stages} stage{'' if stages == 1 else 's'}, {info.state})"
        )

    # What it is and where

    @property
    def plan(self) -> Plan:
        """The plan that the model was loaded by."""
        return self._known().plan

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config, as transformers' class for it, with the quantization that was asked for and the dtype."""
        if self._config is None:
            from transformers import CONFIG_MAPPING, PreTrainedConfig

            info = self._known()
            values = json.loads(info.config_json or "{}", object_hook=_special_float)
            if info.plan.dtype:
                values.pop("torch_dtype", None)
                values["dtype"] = info.plan.dtype
            kind = values.get("model_type", "")
            config_class = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401 - its get() imports all
            config = config_class.from_dict(values)
            for part in config.sub_configs:
                if (of_part := getattr(config, part, None)) is not None:
                    of_part.dtype = config.dtype
            # What the checkpoint brings, or was asked for.
            quantization = json.loads(info.quantization_config_json or "null") or values.get("quantization_config")
            if isinstance(quantization, dict) and {"load_in_4bit", "load_in_8bit"} & quantization.keys():
                from transformers import BitsAndBytesConfig

                config.quantization_config = BitsAndBytesConfig.from_dict(quantization)
            self._config = config
        return self._config

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's defaults for `generate`. Changes to it, or another one in its place, count for this handle."""
        if self._generation_config is None:
            self._generation_config = self._own_generation_config()
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self._generation_config = config

    @property
    def changed_generation_config(self) -> GenerationConfig | None:
        """The generation config, where this handle's user has asked for it, and may have changed it."""
        return self._generation_config

    @property
    def info_path(self) -> str:
        """What the model was loaded from, as its user wrote it."""
        return self._known().path

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        import torch

        dtype: torch.dtype = getattr(torch, self._known().plan.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live: the CPU of the calling process."""
        import torch

        return torch.device("cpu")

    @property
    def hf_device_map(self) -> dict[str, str]:
        """From module name to "<node>/<device>"."""
        return {module: _Place(stage.place) for stage in self.plan.stages for module in stage.modules}

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters and buffers, adapters' too, counted as transformers does, on all stages together.

        What several hold, such as a tied embedding, counts for each. `residency()` has every byte, those of quantized
        weights' statistics too.
        """
        info = self._known(measured=True)
        if info.parameter_bytes is None:  # a gateway that doesn't tell
            return sum(stage.measured_bytes for stage in info.residency)
        adapters = sum(adapter.bytes for adapter in info.adapters)
        return info.parameter_bytes + adapters + (info.buffer_bytes if return_buffers else 0)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters the base has, before any quantization. None of a resident model is trainable through its
        handle, adapters' neither: `only_trainable` gives 0. What adapters hold is in `residency()`."""
        if only_trainable:
            return 0
        import torch
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters(exclude_embeddings=exclude_embeddings))

    def can_generate(self) -> bool:
        return True

    # What pipelines and evaluations of transformers' users ask a model for

    main_input_name = "input_ids"
    input_modalities = "text"
    output_modalities = ("text",)

    @property
    def name_or_path(self) -> str:
        """What the model was loaded from."""
        return self.info_path

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """transformers' own, of what `generate` gave with return_dict_in_generate and output_scores: the score of each
        new token [batch, new]."""
        from transformers import GenerationMixin

        own: Any = GenerationMixin.compute_transition_scores
        chosen: torch.Tensor = own(self, sequences, scores, beam_indices, normalize_logits)
        return chosen

    # What a local model can be turned into, and a resident one can't

    @property
    def training(self) -> bool:
        """Never: a resident model is always in evaluation mode."""
        return False

    @property
    def is_quantized(self) -> bool:
        return hasattr(self.config, "quantization_config")

    @property
    def is_loaded_in_4bit(self) -> bool:
        return bool(getattr(getattr(self.config, "quantization_config", None), "load_in_4bit", False))

    @property
    def is_loaded_in_8bit(self) -> bool:
        return bool(getattr(getattr(self.config, "quantization_config", None), "load_in_8bit", False))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself, for the CPU: there its inputs and outputs are. Raises InvalidRequestError, which is a ValueError, for
        another device or a dtype."""
        import torch

        for value in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(value, torch.dtype):
                self._cast(f"to({value})")
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool) and str(value) != "cpu":
                raise InvalidRequestError(
                    f"model {self.name} can't be moved to {value}: it stays on the devices that its plan chose, and "
                    "takes inputs from the CPU. Choose devices with device_map when you load it"
                )
        return self

    def cpu(self) -> Self:
        """Itself: its inputs and outputs are on the CPU."""
        return self

    def cuda(self, device: Any = None) -> Self:
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def half(self) -> Self:
        return self._cast("half()")

    def float(self) -> Self:
        return self._cast("float()")

    def bfloat16(self) -> Self:
        return self._cast("bfloat16()")

    def _cast(self, asked: str) -> Self:
        what = "a quantized model" if self.is_quantized else "a resident model"
        raise InvalidRequestError(
            f".{asked} is not supported: {what} keeps the dtype it was loaded with. Load it with the dtype= you want"
        )

    def dequantize(self, dtype: Any = None) -> Self:
        if not self.is_quantized:
            raise InvalidRequestError("You need to first quantize your model in order to dequantize it")
        raise InvalidRequestError(
            f"model {self.name} can't be dequantized where it is: load the checkpoint without a quantization_config"
        )

    # Its adapters: which of them compute is this handle's own choice

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Has this handle's requests computed with one adapter, or with several together.

        Others that use the model are not touched. A copy of the handle, and a pickle, take the choice along.
        """
        self._adapters = names_of(adapter_name)

    def disable_adapters(self) -> None:
        """Has this handle's requests computed by the base alone, until `enable_adapters`."""
        self._adapters_are_off = True

    def enable_adapters(self) -> None:
        """Ends what `disable_adapters` began."""
        self._adapters_are_off = False

    def active_adapters(self) -> list[str]:
        """The adapters that were chosen: by `set_adapter`, or else by the path that the model was loaded from."""
        return list(self._known().default_adapters if self._adapters is None else self._adapters)

    def adapters_used(self) -> list[str]:
        """The adapters that requests of this handle are computed with."""
        return [] if self._adapters_are_off else self.active_adapters()

    def adapter_paths(self) -> list[str]:
        """Where the model's adapters were loaded from."""
        return [adapter.path for adapter in self._known().adapters]

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' configs by their names, as peft's objects. Needs peft here."""
        try:
            from peft import PeftConfig
        except ImportError:
            raise InvalidRequestError("peft_config needs peft here: pip install 'shardlift[adapters]'") from None
        return {adapter.name: PeftConfig.from_peft_type(**adapter.config) for adapter in self._known().adapters}

    def _choice(self, adapter: Adapters) -> inference_pb2.AdapterChoice | None:
        """What a request is to say, whose caller passed `adapter`."""
        if not isinstance(adapter, EllipsisType):
            return choice(names_of(adapter))
        return choice(() if self._adapters_are_off else self._adapters)

    def _took(self, info: ModelInfo, *, loaded: str = "", deleted: str = "") -> None:
        """Notes what became of the model when an adapter was loaded or deleted."""
        self._cached_info = info
        if loaded:
            self._adapters = (loaded,)  # as transformers has it
        elif self._adapters is not None:
            self._adapters = tuple(name for name in self._adapters if name != deleted) or None

    # What to send

    def _wanted(
        self,
        ids: Tensor,
        generation_config: Any,
        arguments: Mapping[str, Any],
        *,
        attention_mask: Any,
        seed: int | None,
        past: int = 0,
        adapters: inference_pb2.AdapterChoice | None = None,
    ) -> Wanted:
        """The request for ids, with everything that `generate` takes and the workers run by themselves."""
        from .collected import Wanted

        chosen = self._fields(generation_config, arguments)
        asking.check_names(chosen)
        as_dict = bool(self._pop(chosen, "return_dict_in_generate"))
        with_logits = bool(self._pop(chosen, "output_logits")) and as_dict
        with_scores = bool(self._pop(chosen, "output_scores")) and as_dict
        for name in ("output_attentions", "output_hidden_states"):
            if chosen.pop(name, None) and as_dict:
                raise InvalidRequestError(f"{name} is not available: it stays on the workers")
        request = asking.request(
            self.name,
            input_ids=ids,
            attention_mask=attention_mask,
            past=past,
            generation=chosen,
            seed=seed,
            output_logits=with_logits,
            output_scores=with_scores,
        )
        say(request, adapters)
        draws = seed is None and bool(self._pop(dict(chosen), "do_sample"))
        return Wanted(request=request, as_dict=as_dict, draws=draws)

    def _streamed(
        self,
        inputs: Any,
        generation_config: Any,
        arguments: Mapping[str, Any],
        prompt: str | None,
        messages: Sequence[Mapping[str, str]] | None,
        attention_mask: Any,
        seed: int | None,
        adapters: inference_pb2.AdapterChoice | None,
    ) -> tuple[inference_pb2.GenerateRequest, bool]:
        """The request of a generation that is read step by step; whether it draws from torch's global generator."""
        chosen = self._fields(generation_config, arguments)
        draws = seed is None and self._is_drawn_here(chosen)
        if seed is None and not draws:
            seed = secrets.randbits(63)  # chosen here, it makes the request repeatable after a loss
        request = asking.request(
            self.name,
            input_ids=None if inputs is None else tensors.integers(inputs, "input_ids"),
            prompt=prompt,
            messages=messages,
            attention_mask=attention_mask,
            generation=chosen,
            seed=seed,
        )
        say(request, adapters)
        return request, draws

    def _is_drawn_here(self, chosen: Mapping[str, Any]) -> bool:
        """Whether `chosen` is sampled, by a process that has a generator of torch's."""
        if "torch" not in sys.modules:
            return False
        if chosen.get("do_sample") is None and self._lacks(measured=False) and not self._can_ask:
            return False  # nobody knows
        return bool(self._pop(dict(chosen), "do_sample"))

    def _is_stepwise(self, generation_config: Any, local: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
        """Whether a generation has to be driven from here, as transformers would decide on its mode."""
        if local:
            return True
        chosen = {**asking.config_values(generation_config), **arguments}
        if self._generation_config is not None:
            own = self._generation_config.to_dict()
        else:
            own = json.loads(self._known().generation_config_json or "{}")

        def of(name: str) -> Any:
            value = chosen.get(name)
            return own.get(name) if value is None else value

        # Without importing transformers for what most calls ask.
        if of("guidance_scale") not in (None, 1, 1.0) or of("watermarking_config") is not None:
            return True
        if of("token_healing") and chosen.get("tokenizer") is not None:
            return True
        from transformers import GenerationConfig

        config = GenerationConfig()
        for name in _MODE_FIELDS:
            if hasattr(config, name) and of(name) is not None:
                setattr(config, name, of(name))
        return config.get_generation_mode().value not in _IN_RING

    def _own_generation_config(self) -> GenerationConfig:
        from transformers import GenerationConfig

        return GenerationConfig.from_dict(json.loads(self._known().generation_config_json or "{}"))

    def _fields(self, config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What to send: what the user changed in `generation_config`, under `config`, under `arguments`."""
        changed: dict[str, Any] = {}
        if self._generation_config is not None:
            before = self._own_generation_config().to_dict()
            after = self._generation_config.to_dict()
            changed = {key: after.get(key) for key in before | after if before.get(key) != after.get(key)}
        return {**asking.fields(None, changed), **asking.fields(config, arguments)}

    def _pop(self, chosen: dict[str, Any], name: str) -> Any:
        """The value of `name`, from `chosen` or else from the model's own generation config."""
        if chosen.get(name) is None:
            chosen.pop(name, None)
            return json.loads(self._known().generation_config_json or "{}").get(name)
        return chosen.pop(name)

    def _ids(self, inputs: Any, input_ids: Any, config: Any, arguments: Mapping[str, Any]) -> Tensor:
        if inputs is not None and input_ids is not None:
            raise InvalidRequestError("inputs and input_ids are the same thing: pass one of them")
        given = inputs if inputs is not None else input_ids
        if given is None:
            start = {**asking.config_values(config), **arguments}.get("bos_token_id")
            start = self.generation_config.bos_token_id if start is None else start
            if start is None:
                raise InvalidRequestError("input_ids is needed: the model has no bos_token_id to start from")
            given = [[start]]
        return tensors.integers(given, "input_ids")

    # How it is copied and pickled: by its name, with what its user changed

    def _changes(self) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if self._generation_config is not None:
            changes["_generation_config"] = self._generation_config
        if self._adapters is not None:
            changes["_adapters"] = self._adapters
        if self._adapters_are_off:
            changes["_adapters_are_off"] = True
        return changes


# What `GenerationConfig.get_generation_mode` looks at.
_MODE_FIELDS = (
    *("constraints", "force_words_ids", "num_beams", "num_beam_groups", "do_sample", "top_k", "penalty_alpha"),
    *("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers"),
)


class _Place(str):
    """ "<node>/<device>". transformers' pipelines put their inputs on the first device of a map, by torch's names for
    them; it answers to -1 as well, which is their word for where the model itself says that inputs go."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other == -1 or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _special_float(value: dict[str, Any]) -> Any:
    """transformers writes infinity into a config as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value
