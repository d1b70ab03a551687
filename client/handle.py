"""The handle for a resident model: what a local transformers model is to the code that uses it, as far as it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidRequestError
from . import asking, forward, saving
from .adapters import DEFAULT_NAME, Adapters, load_request, names_of
from .described import DescribedModel
from .forward import RemoteCache
from .gateway import Gateway
from .generation import Generation
from .saving import SaveProgress
from .values import Adapter, ModelInfo, StageResidency

if TYPE_CHECKING:
    import torch
    from huggingface_hub import CommitInfo
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from .session import RemoteSession

# Until every stage has fetched its part of an adapter.
ADAPTER_TIMEOUT_S = 3600.0
# Until every stage has let go of its memory.
UNLOAD_TIMEOUT_S = 300.0


class RemoteModel(DescribedModel):
    """A model that is resident in a cluster, used as if it were local. Inputs and outputs live on the CPU.

    Pickles to its name and address, with the generation config where that was changed; the token is read again from
    the environment where it is unpickled. A copy uses the same connection.
    """

    _can_ask = True

    def __init__(self, gateway: Gateway, name: str, info: ModelInfo | None = None) -> None:
        super().__init__(name, info)
        self._gateway = gateway

    def __reduce__(self) -> tuple[Callable[[Gateway, str], RemoteModel], tuple[Gateway, str], dict[str, Any]]:
        return type(self), (self._gateway, self.name), self._changes()

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
        return self.info() if info is None or self._lacks(measured=measured) else info

    def residency(self) -> list[StageResidency]:
        """What each stage holds, as measured: module → dtype, bytes, device."""
        return list(self.info().residency)

    def unload(self) -> None:
        """Takes the model out of the cluster. Every handle for it is then useless."""
        request = registry_pb2.UnloadModelRequest(name=self.name)
        self._gateway.ask("UnloadModel", request, timeout_s=UNLOAD_TIMEOUT_S)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        shared: bool | None = None,
        dequantize_experts: bool = True,
        on_progress: Callable[[SaveProgress], None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the model as transformers does: a folder that `from_pretrained`, transformers' too, loads again.

        What is quantized is saved so, in bitsandbytes' serialized form. Each stage writes files of its own, at once
        with the others: the workers do where they all see `save_directory` as this process does, which is found out;
        else the bytes are streamed here. `shared` demands one or the other. The tokenizer's files come along, unless
        the folder has any.

        Experts that were quantized one by one (`quantize_experts=True`) get their 16 bits back, for transformers has no
        4-bit experts; `dequantize_experts=False` keeps their 4 bits, for shardlift alone. `on_progress` is told of each
        step. `push_to_hub=True` commits the files to the repository `repo_id`, by default of the folder's name;
        `kwargs` are then those of `push_to_hub`.

        Raises SaveError where the folder can't take it, and then leaves nothing behind.
        """
        saving.save_pretrained(
            self,
            self._gateway,
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            push_to_hub=push_to_hub,
            max_shard_size=max_shard_size,
            variant=variant,
            token=token,
            shared=shared,
            dequantize_experts=dequantize_experts,
            on_progress=on_progress,
            **kwargs,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo:
        """Saves the model to a repository of the Hub, which is made where there is none, by way of a temporary folder
        here. `kwargs` are those of `save_pretrained`.

        `token` is huggingface_hub's, by default that of this environment; it goes to the Hub alone.
        """
        return saving.push_to_hub(
            self,
            self._gateway,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            **kwargs,
        )

    def eval(self) -> RemoteModel:
        """Itself: a resident model is always in evaluation mode."""
        return self

    # Its adapters

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str = "",
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Attaches an adapter ("org/name", a folder or a URL) to the resident model, by the name "default" if none is
        given, and has this handle use it. For others it is there to be chosen.

        It is on every stage then, or, where one failed, on none. Raises InvalidRequestError where the name is taken or
        the adapter doesn't go with the model, UnsupportedModelError for a kind that stages can't have, OutOfMemoryError
        where it has no room.
        """
        request = load_request(
            self.name,
            peft_model_id,
            adapter_name,
            self.address,
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            adapter_kwargs=adapter_kwargs,
            others=kwargs,
        )
        answer = self._gateway.ask("LoadAdapter", request, timeout_s=ADAPTER_TIMEOUT_S)
        self._took(ModelInfo.from_proto(answer.model), loaded=adapter_name or DEFAULT_NAME)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters off the resident model, for everybody. Raises ModelBusyError while one is in use."""
        for name in names_of(adapter_names):
            request = registry_pb2.DeleteAdapterRequest(model=self.name, name=name)
            answer = self._gateway.ask("DeleteAdapter", request, timeout_s=ADAPTER_TIMEOUT_S)
            self._took(ModelInfo.from_proto(answer.model), deleted=name)

    def adapters(self) -> list[Adapter]:
        """The adapters that are attached to the model now."""
        return list(self.info().adapters)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        known = [adapter.name for adapter in self.adapters()]
        if unknown := [name for name in names_of(adapter_name) if name not in known]:
            raise InvalidRequestError(
                f"model {self.name} has no adapter {unknown[0]!r}; loaded: {', '.join(known) or 'none'}"
            )
        super().set_adapter(adapter_name)

    set_adapter.__doc__ = DescribedModel.set_adapter.__doc__

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
        timeout_s: float | None = None,
        adapter: Adapters = ...,
        **kwargs: Any,
    ) -> torch.LongTensor | GenerateOutput:
        """As transformers' `generate`: ids [batch, length] → ids [batch × num_return_sequences, length + new], on CPU.

        Takes tensors, arrays or lists, and as `kwargs` whatever transformers' takes. The workers run greedy search and
        sampling by themselves. They draw from torch's global generator, whose state goes there and back: after
        `torch.manual_seed` the tokens are those of a local model, and so are those of the next call. (Where the last
        stage is on a GPU: as docs/serving.md says.) `seed` stands for torch.manual_seed, for this call alone. With
        return_dict_in_generate that gives a GenerateDecoderOnlyOutput
        with sequences, scores and logits (float32 [batch, vocabulary] per step).

        What they can't, transformers' own loop runs here, a remote pass per step: beam search, assistants and prompt
        lookup, logits processors and stopping criteria of yours, guidance, `past_key_values` of an earlier pass. It
        draws from torch's global generator, as it does for a local model; `seed` sets that for this call alone.

        `adapter` names the adapters to compute with, in place of the handle's own choice: one, several, or None for the
        base alone. What isn't done in `timeout_s` seconds ends with DeadlineExceededError, and is given up there.

        Raises InvalidRequestError for what can't be sent, such as tensors as values of a GenerationConfig.
        """
        local, others = asking.split(kwargs)
        if self._is_stepwise(generation_config, local, others):
            from .stepwise import generate_stepwise

            return generate_stepwise(
                self,
                self._gateway,
                self._ids(inputs, input_ids, generation_config, others),
                generation_config,
                {**others, **local},
                attention_mask=attention_mask,
                streamer=streamer,
                seed=seed,
                timeout_s=timeout_s,
                adapters=self._choice(adapter),
            )
        wanted = self._wanted(
            self._ids(inputs, input_ids, generation_config, others),
            generation_config,
            others,
            attention_mask=attention_mask,
            seed=seed,
            adapters=self._choice(adapter),
        )
        from .collected import Collected

        collected = Collected(wanted, streamer)
        try:
            with Generation(self._gateway, wanted.request, draws=wanted.draws, timeout_s=timeout_s) as running:
                running.start()
                collected.start(running.batch)
                for step in running:
                    collected.add(step)
        finally:
            collected.end()
        return collected.result

    def stream(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        attention_mask: Any = None,
        seed: int | None = None,
        timeout_s: float | None = None,
        adapter: Adapters = ...,
        **kwargs: Any,
    ) -> Generation:
        """A running generation, to iterate over: each step has `token_ids`, one per row, and `text` for text.

        Takes ids as `generate` does, or a `prompt`, or `messages` ({"role", "content"}), which the gateway tokenizes
        with the checkpoint's own tokenizer and chat template. Needs no torch. What the workers can't run by themselves
        needs `generate`. `timeout_s` counts from here to the last step.
        """
        asked, draws = self._streamed(
            inputs, generation_config, kwargs, prompt, messages, attention_mask, seed, self._choice(adapter)
        )
        return Generation(self._gateway, asked, draws=draws, timeout_s=timeout_s)

    def stream_text(self, text: str | Sequence[Mapping[str, str]], **kwargs: Any) -> Iterator[str]:
        """The answer to a prompt, or to messages ({"role", "content"}), piece by piece as it comes."""
        source: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"messages": text}
        with self.stream(**source, **kwargs) as running:
            for step in running:
                if step.text:
                    yield step.text

    def session(
        self,
        *,
        idle_timeout_s: float | None = None,
        adapter: Adapters = ...,
        reserve_tokens: int | None = None,
    ) -> RemoteSession:
        """A conversation that keeps its keys and values on the workers from turn to turn.

        It ends when it is closed, or nothing has come for `idle_timeout_s` seconds; by default as the model was loaded.
        It keeps the adapters that it begins with: those of `adapter`, or else what the handle has chosen by now.
        With `reserve_tokens`, its first turn is given room for so many tokens of all its rows, or refused: until it has
        come to more, nobody can take that from it.
        """
        from .session import RemoteSession

        return RemoteSession(
            self,
            self._gateway,
            idle_timeout_s=idle_timeout_s,
            adapters=self._choice(adapter),
            reserve_tokens=reserve_tokens,
        )

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: RemoteCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        adapter: Adapters = ...,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass: ids [batch, length] → logits [batch, length, vocabulary], in the model's dtype, on CPU.

        With `use_cache=True` the result has a RemoteCache in `past_key_values`. Give it to the next pass, with the new
        ids alone and an attention mask [batch, past + length] over both, and close it when done. Without, nothing stays
        on the workers. `logits_to_keep` keeps the last so many positions; 0 keeps all. With `labels` [batch, length]
        the result has the `loss`, as transformers computes it here from the logits; it has no gradients.
        """
        if past_key_values is not None and not isinstance(past_key_values, RemoteCache):
            raise InvalidRequestError(
                f"past_key_values is a {type(past_key_values).__name__}: only the RemoteCache of an earlier pass can be"
            )
        # A cache that is given grows, as transformers' do, whether or not it is returned.
        cached = bool(use_cache) or past_key_values is not None
        asked = forward.request(
            self.name,
            input_ids,
            attention_mask,
            position_ids,
            logits_to_keep=logits_to_keep,
            use_cache=cached,
            others=kwargs,
            adapters=self._choice(adapter),
        )
        if not cached:
            return forward.output(forward.once(self._gateway, asked), None, return_dict, labels)
        cache = RemoteCache(self._gateway, self.name) if past_key_values is None else past_key_values
        assembly = cache.step(asked)
        return forward.output(assembly, cache if use_cache is not False else None, return_dict, labels)

    __call__ = forward
