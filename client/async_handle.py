"""The handle for a resident model, for asyncio: what `RemoteModel` is to code that blocks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidRequestError
from . import asking, forward, saving
from .adapters import DEFAULT_NAME, Adapters, load_request, names_of
from .async_forward import AsyncRemoteCache, once
from .async_gateway import AsyncGateway
from .async_generation import AsyncGeneration
from .described import DescribedModel
from .handle import ADAPTER_TIMEOUT_S, UNLOAD_TIMEOUT_S
from .values import Adapter, ModelInfo, StageResidency

if TYPE_CHECKING:
    import torch
    from huggingface_hub import CommitInfo
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from .async_session import AsyncRemoteSession


class AsyncRemoteModel(DescribedModel):
    """A model that is resident in a cluster. As RemoteModel, with coroutines for what asks the gateway.

    What does not change while a model is resident is known without asking; `await info()` brings it up to date.
    """

    def __init__(self, gateway: AsyncGateway, name: str, info: ModelInfo | None = None) -> None:
        super().__init__(name, info)
        self._gateway = gateway

    def __reduce__(
        self,
    ) -> tuple[Callable[[AsyncGateway, str], AsyncRemoteModel], tuple[AsyncGateway, str], dict[str, Any]]:
        return type(self), (self._gateway, self.name), self._changes()

    @property
    def address(self) -> str:
        """The gateway's "host:port"."""
        return self._gateway.address

    async def info(self) -> ModelInfo:
        """What the registry knows of the model now. Raises ModelNotFoundError once it is unloaded."""
        answer = await self._gateway.ask("GetModel", registry_pb2.GetModelRequest(name=self.name))
        self._cached_info = ModelInfo.from_proto(answer.model)
        return self._cached_info

    def _known(self, *, measured: bool = False) -> ModelInfo:
        info = self._cached_info
        if info is None or self._lacks(measured=measured):
            raise InvalidRequestError(f"too little is known of {self.name!r} yet: `await model.info()` first")
        return info

    async def _learn(self) -> None:
        if self._lacks(measured=False):
            await self.info()

    async def residency(self) -> list[StageResidency]:
        """What each stage holds, as measured: module → dtype, bytes, device."""
        return list((await self.info()).residency)

    async def unload(self) -> None:
        """Takes the model out of the cluster. Every handle for it is then useless."""
        request = registry_pb2.UnloadModelRequest(name=self.name)
        await self._gateway.ask("UnloadModel", request, timeout_s=UNLOAD_TIMEOUT_S)

    async def save_pretrained(self, save_directory: str | os.PathLike[str], **arguments: Any) -> None:
        """As `RemoteModel.save_pretrained`, from a thread. Cancelling the task ends the save, and leaves nothing."""
        await self._save(saving.save_pretrained, save_directory, arguments)

    async def push_to_hub(self, repo_id: str, **arguments: Any) -> CommitInfo:
        """As `RemoteModel.push_to_hub`, from a thread. What is on its way to the Hub already gets there."""
        return await self._save(saving.push_to_hub, repo_id, arguments)

    async def _save(self, function: Callable[..., Any], where: Any, arguments: Mapping[str, Any]) -> Any:
        await self._learn()
        stop = saving.Stop()
        gateway = self._gateway.blocking
        running = asyncio.ensure_future(asyncio.to_thread(function, self, gateway, where, stop=stop, **arguments))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.stop()
            await asyncio.wait([running])
            running.exception()  # seen
            raise

    def eval(self) -> AsyncRemoteModel:
        """Itself: a resident model is always in evaluation mode."""
        return self

    # Its adapters

    async def load_adapter(
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
        answer = await self._gateway.ask("LoadAdapter", request, timeout_s=ADAPTER_TIMEOUT_S)
        self._took(ModelInfo.from_proto(answer.model), loaded=adapter_name or DEFAULT_NAME)

    async def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters off the resident model, for everybody. Raises ModelBusyError while one is in use."""
        for name in names_of(adapter_names):
            request = registry_pb2.DeleteAdapterRequest(model=self.name, name=name)
            answer = await self._gateway.ask("DeleteAdapter", request, timeout_s=ADAPTER_TIMEOUT_S)
            self._took(ModelInfo.from_proto(answer.model), deleted=name)

    async def adapters(self) -> list[Adapter]:
        """The adapters that are attached to the model now."""
        return list((await self.info()).adapters)

    # Running it

    async def generate(
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
        """As `RemoteModel.generate`. Cancelling the task ends the generation.

        What the workers don't run by themselves is driven from a thread.
        """
        await self._learn()
        local, others = asking.split(kwargs)
        ids = self._ids(inputs, input_ids, generation_config, others)
        if self._is_stepwise(generation_config, local, others):
            from .stepwise import Stop, generate_stepwise

            stop = Stop()
            try:
                return await asyncio.to_thread(
                    generate_stepwise,
                    self,
                    self._gateway.blocking,
                    ids,
                    generation_config,
                    {**others, **local},
                    attention_mask=attention_mask,
                    streamer=streamer,
                    seed=seed,
                    timeout_s=timeout_s,
                    stop=stop,
                    adapters=self._choice(adapter),
                )
            except asyncio.CancelledError:
                stop.stop()
                raise
        wanted = self._wanted(
            ids,
            generation_config,
            others,
            attention_mask=attention_mask,
            seed=seed,
            adapters=self._choice(adapter),
        )
        from .collected import Collected

        collected = Collected(wanted, streamer)
        try:
            async with AsyncGeneration(
                self._gateway, wanted.request, draws=wanted.draws, timeout_s=timeout_s
            ) as running:
                await running.start()
                collected.start(running.batch)
                async for step in running:
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
    ) -> AsyncGeneration:
        """A generation, to iterate over with `async for`: as `RemoteModel.stream`."""
        asked, draws = self._streamed(
            inputs, generation_config, kwargs, prompt, messages, attention_mask, seed, self._choice(adapter)
        )
        return AsyncGeneration(self._gateway, asked, draws=draws, timeout_s=timeout_s)

    async def stream_text(self, text: str | Sequence[Mapping[str, str]], **kwargs: Any) -> AsyncIterator[str]:
        """The answer to a prompt, or to messages ({"role", "content"}), piece by piece as it comes."""
        source: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"messages": text}
        async with self.stream(**source, **kwargs) as running:
            async for step in running:
                if step.text:
                    yield step.text

    def session(
        self, *, idle_timeout_s: float | None = None, adapter: Adapters = ..., reserve_tokens: int | None = None
    ) -> AsyncRemoteSession:
        """A conversation that keeps its keys and values on the workers from turn to turn: as `RemoteModel.session`, for
        `async with`."""
        from .async_session import AsyncRemoteSession

        return AsyncRemoteSession(
            self,
            self._gateway,
            idle_timeout_s=idle_timeout_s,
            adapters=self._choice(adapter),
            reserve_tokens=reserve_tokens,
        )

    async def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: AsyncRemoteCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        adapter: Adapters = ...,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass, as `RemoteModel.forward`: ids [batch, length] → logits [batch, length, vocabulary]."""
        if past_key_values is not None and not isinstance(past_key_values, AsyncRemoteCache):
            raise InvalidRequestError(
                f"past_key_values is a {type(past_key_values).__name__}: only the AsyncRemoteCache of an earlier pass "
                "can be"
            )
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
            return forward.output(await once(self._gateway, asked), None, return_dict, labels)
        cache = AsyncRemoteCache(self._gateway, self.name) if past_key_values is None else past_key_values
        assembly = await cache.step(asked)
        return forward.output(assembly, cache if use_cache is not False else None, return_dict, labels)

    __call__ = forward
