"""The handle for a resident model: what a local transformers model is to the code that uses it, as far as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..proto.v1 import inference_pb2, registry_pb2
from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import Assembly
from . import forward, generation, tensors
from .forward import RemoteCache
from .gateway import Gateway
from .generation import Generation
from .values import ModelInfo, Plan, StageResidency

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast

# Until every stage has let go of its memory.
_UNLOAD_TIMEOUT_S = 300.0

# What forward takes in transformers and the gateway does not: any value but these is refused.
_NOT_FORWARDED = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states", "cache_position")


class RemoteModel:
    """A model that is resident in a cluster, used as if it were local. Inputs and outputs live on the CPU.

    Pickles to its name and address alone; the token is read again from the environment where it is unpickled.
    """

    def __init__(self, gateway: Gateway, name: str, info: ModelInfo | None = None) -> None:
        self.name = name
        self._gateway = gateway
        self._cached_info = info
        self._config: PreTrainedConfig | None = None
        self._generation_config: GenerationConfig | None = None

    def __reduce__(self) -> tuple[Callable[[Gateway, str], RemoteModel], tuple[Gateway, str]]:
        return type(self), (self._gateway, self.name)

    def __repr__(self) -> str:
        info = self._cached_info
        if info is None:
            return f"RemoteModel({self.name!r} at {self.address})"
        stages = len(info.plan.stages)
        return (
            f"RemoteModel({self.name!r} at {self.address}: {info.plan.model}, {info.plan.quantization}, "
            f"{stages} stage{'' if stages == 1 else 's'}, {info.state})"
        )

    # What it is and where

    @property
    def address(self) -> str:
        """The gateway's "host:port"."""
        return self._gateway.address

    def info(self) -> ModelInfo:
        """What the registry knows of the model now. Raises ModelNotFoundError once it is unloaded."""
        answer = self._gateway.ask("GetModel", registry_pb2.GetModelRequest(name=self.name))
        self._cached_info = ModelInfo.from_proto(answer.model)
        return self._cached_info

    def _known(self, *, measured: bool = False) -> ModelInfo:
        """`info`, as it was when last asked: what does not change while a model is resident."""
        info = self._cached_info
        if info is None or not info.plan.stages or not info.config_json or (measured and not info.residency):
            return self.info()
        return info

    @property
    def plan(self) -> Plan:
        """The plan that the model was loaded by."""
        return self._known().plan

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config, as transformers' class for it."""
        if self._config is None:
            from transformers import CONFIG_MAPPING, PreTrainedConfig

            values = json.loads(self._known().config_json or "{}", object_hook=_special_float)
            kind = values.get("model_type", "")
            config_class = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401 - its get() imports all
            self._config = config_class.from_dict(values)
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
        return {module: stage.place for stage in self.plan.stages for module in stage.modules}

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes that all stages hold, as measured. Buffers always count."""
        return sum(stage.measured_bytes for stage in self._known(measured=True).residency)

    def residency(self) -> list[StageResidency]:
        """What each stage holds, as measured: module → dtype, bytes, device."""
        return list(self.info().residency)

    def unload(self) -> None:
        """Takes the model out of the cluster. Every handle for it is then useless."""
        request = registry_pb2.UnloadModelRequest(name=self.name)
        self._gateway.ask("UnloadModel", request, timeout_s=_UNLOAD_TIMEOUT_S)

    # As transformers' models have them

    def eval(self) -> RemoteModel:
        """Itself: a resident model is always in evaluation mode."""
        return self

    def can_generate(self) -> bool:
        return True

    # Running it

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | GenerateDecoderOnlyOutput:
        """As transformers' `generate`: ids [batch, length] → ids [batch × num_return_sequences, length + new], on CPU.

        Takes tensors, arrays or lists, and as `kwargs` any field of GenerationConfig. With return_dict_in_generate it
        returns a GenerateDecoderOnlyOutput with sequences, scores and logits (float32 [batch, vocabulary] per step).
        Sampling is seeded by `seed`; without it by a number drawn from torch's global generator, so that
        `torch.manual_seed` makes it repeatable.

        Raises InvalidRequestError for what can't be sent: logits processors, stopping criteria, tensors as arguments.
        """
        import torch

        chosen = self._fields(generation_config, kwargs)
        _check_names(chosen)
        as_dict = bool(self._pop(chosen, "return_dict_in_generate"))
        with_logits = bool(self._pop(chosen, "output_logits")) and as_dict
        with_scores = bool(self._pop(chosen, "output_scores")) and as_dict
        for name in ("output_attentions", "output_hidden_states"):
            if chosen.pop(name, None):
                raise InvalidRequestError(f"{name} is not available: it stays on the workers")
        ids = self._ids(inputs, input_ids)
        asked = generation.request(
            self.name,
            input_ids=ids,
            attention_mask=attention_mask,
            generation=chosen,
            seed=self._seed(seed, chosen),
            output_logits=with_logits,
            output_scores=with_scores,
        )
        prompt = tensors.ids_to_torch(ids)
        steps: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        try:
            with Generation(self._gateway, asked) as running:
                running.start()
                # num_return_sequences repeats each row, as transformers does.
                prompt = prompt.repeat_interleave(max(1, running.batch // max(1, len(prompt))), dim=0)
                if streamer is not None:
                    streamer.put(prompt)
                for step in running:
                    tokens = torch.tensor(step.token_ids, dtype=torch.long)
                    steps.append(tokens)
                    if step.logits is not None:
                        logits.append(tensors.to_torch(step.logits))
                    if step.scores is not None:
                        scores.append(tensors.to_torch(step.scores))
                    if streamer is not None:
                        streamer.put(tokens)
        finally:
            if streamer is not None:
                streamer.end()  # also on failure: whoever reads from it must not wait for ever
        sequences = torch.cat([prompt, torch.stack(steps, dim=1)], dim=1) if steps else prompt
        if not as_dict:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(scores) if with_scores else None,
            logits=tuple(logits) if with_logits else None,
        )

    def stream(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        attention_mask: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Generation:
        """A running generation, to iterate over: each step has `token_ids`, one per row, and `text` for text.

        Takes ids as `generate` does, or a `prompt`, or `messages` ({"role", "content"}), which the gateway tokenizes
        with the checkpoint's own tokenizer and chat template. Needs no torch.
        """
        return Generation(
            self._gateway,
            generation.request(
                self.name,
                input_ids=None if inputs is None else tensors.integers(inputs, "input_ids"),
                prompt=prompt,
                messages=messages,
                attention_mask=attention_mask,
                generation=self._fields(generation_config, kwargs),
                seed=seed,
            ),
        )

    def stream_text(self, text: str | Sequence[Mapping[str, str]], **kwargs: Any) -> Iterator[str]:
        """The answer to a prompt, or to messages ({"role", "content"}), piece by piece as it comes."""
        source: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"messages": text}
        with self.stream(**source, **kwargs) as running:
            for step in running:
                if step.text:
                    yield step.text

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: RemoteCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass: ids [batch, length] → logits [batch, length, vocabulary], in the model's dtype, on CPU.

        With `use_cache=True` the result has a RemoteCache in `past_key_values`. Give it to the next pass, with the new
        ids alone and an attention mask [batch, past + length] over both, and close it when done. Without, nothing stays
        on the workers. `logits_to_keep` keeps the last so many positions; 0 keeps all.
        """
        for name, value in kwargs.items():
            if name in _NOT_FORWARDED:
                if value is not None and value is not False:
                    raise InvalidRequestError(f"{name} is not available on a remote model")
            elif name != "token_type_ids":
                raise InvalidRequestError(f"{name} is no argument of a remote model's forward")
        if past_key_values is not None and not isinstance(past_key_values, RemoteCache):
            raise InvalidRequestError(
                f"past_key_values is a {type(past_key_values).__name__}: only the RemoteCache of an earlier pass can be"
            )
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise InvalidRequestError(f"logits_to_keep is {logits_to_keep!r}: a number of positions is needed")
        if input_ids is None:
            raise InvalidRequestError("input_ids is needed")
        # A cache that is given grows, as transformers' do, whether or not it is returned.
        cached = bool(use_cache) or past_key_values is not None
        asked = inference_pb2.ForwardRequest(
            model=self.name,
            input_ids=tensors.integers(input_ids, "input_ids"),
            attention_mask=None if attention_mask is None else tensors.mask(attention_mask, "attention_mask"),
            position_ids=None if position_ids is None else tensors.integers(position_ids, "position_ids"),
            logits_to_keep=logits_to_keep,
            use_cache=cached,
        )
        tensors.check_request_size(asked.input_ids, asked.attention_mask, asked.position_ids)
        cache: RemoteCache | None = None
        assembly: Assembly
        if cached:
            cache = past_key_values or RemoteCache(self._gateway)
            assembly = cache.step(asked)
        else:
            assembly = forward.once(self._gateway, asked)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        output = CausalLMOutputWithPast(
            logits=tensors.to_torch(assembly), past_key_values=cache if use_cache is not False else None
        )
        return output.to_tuple() if return_dict is False else output

    __call__ = forward

    # Inside

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
        return {**generation.fields(None, changed), **generation.fields(config, arguments)}

    def _pop(self, chosen: dict[str, Any], name: str) -> Any:
        """The value of `name`, from `chosen` or else from the model's own generation config."""
        if chosen.get(name) is None:
            chosen.pop(name, None)
            return json.loads(self._known().generation_config_json or "{}").get(name)
        return chosen.pop(name)

    def _seed(self, seed: int | None, chosen: Mapping[str, Any]) -> int | None:
        if seed is not None:
            return seed
        if not self._pop(dict(chosen), "do_sample"):
            return None
        import torch

        return int(torch.randint(0, 2**63 - 1, ()).item())

    def _ids(self, inputs: Any, input_ids: Any) -> Tensor:
        if inputs is not None and input_ids is not None:
            raise InvalidRequestError("inputs and input_ids are the same thing: pass one of them")
        given = inputs if inputs is not None else input_ids
        if given is None:
            start = self.generation_config.bos_token_id
            if start is None:
                raise InvalidRequestError("input_ids is needed: the model has no bos_token_id to start from")
            given = [[start]]
        return tensors.integers(given, "input_ids")


def _check_names(chosen: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig

    known = GenerationConfig()
    if unused := sorted(name for name, value in chosen.items() if value is not None and not hasattr(known, name)):
        raise InvalidRequestError(f"generate has no arguments {', '.join(unused)}: is that a typo?")


def _special_float(value: dict[str, Any]) -> Any:
    """transformers writes infinity into a config as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value
