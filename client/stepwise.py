"""transformers' own `generate`, run here, with a remote pass in the place of the model's forward.

For what the workers don't run by themselves: beam search, assistants, processors and criteria of the user's. The model
that transformers gets to see is of the family's own class, so that its preparation of inputs is the family's, and has
no weights; its cache is a RemoteCache, which the loop crops and reorders as it would a local one.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InvalidRequestError, ShardliftError
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import Assembly
from . import asking, forward, tensors
from .deadline import Deadline
from .described import DescribedModel
from .forward import RemoteCache
from .gateway import Gateway

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

_DYNAMIC_CACHES = (None, "dynamic")


class Stop:
    """Lets another thread end a generation: whatever pass it is in fails, and no other begins."""

    def __init__(self) -> None:
        self.deadline: Deadline | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._caches: weakref.WeakSet[RemoteCache] = weakref.WeakSet()

    def watch(self, opened: RemoteCache) -> None:
        with self._lock:
            self._caches.add(opened)
            if self._stopped:
                opened.close()

    def check(self) -> None:
        if self._stopped:
            raise InvalidRequestError("this generation was cancelled")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for opened in list(self._caches):
                opened.close()


def generate_stepwise(
    model: DescribedModel,
    gateway: Gateway,
    ids: Tensor,
    generation_config: Any,
    arguments: Mapping[str, Any],
    *,
    attention_mask: Any,
    streamer: BaseStreamer | None,
    seed: int | None,
    timeout_s: float | None = None,
    stop: Stop | None = None,
    adapters: inference_pb2.AdapterChoice | None = None,
) -> Any:
    """What transformers' `generate` returns for these arguments, and raises.

    `seed` stands for torch.manual_seed before a local `generate`, and leaves the global generator as it was. Raises
    DeadlineExceededError where it isn't done in `timeout_s`.
    """
    stop = stop or Stop()
    deadline = stop.deadline = Deadline(timeout_s, model.name)
    asking.check_usable(arguments)
    # Tokenizers give these, and the model has no use for them.
    arguments = {name: value for name, value in arguments.items() if name != "token_type_ids"}
    if isinstance(generation_config, Mapping):
        generation_config = GenerationConfig(**generation_config)
    mask = None if attention_mask is None else tensors.mask(attention_mask, "attention_mask")
    if mask is not None:
        arguments["attention_mask"] = tensors.ids_to_torch(mask).long()
    assistant = arguments.get("assistant_model")
    with contextlib.ExitStack() as closing:
        if isinstance(assistant, DescribedModel):
            remote = getattr(assistant, "_gateway", None)
            if not isinstance(remote, Gateway):
                raise InvalidRequestError("a remote assistant_model has to be a handle of the blocking client")
            own = assistant._choice(...)
            arguments["assistant_model"] = closing.enter_context(_opened(assistant, remote, stop, own))
        local = closing.enter_context(_opened(model, gateway, stop, adapters))
        if deadline.left_s is not None:
            closing.enter_context(_in_time(stop, deadline.left_s))
        if seed is not None:
            closing.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed % (1 << 64))
        try:
            # By this name, under which a repository's own loop (`custom_generate`) expects them.
            result = local.generate(
                None, generation_config, input_ids=tensors.ids_to_torch(ids), streamer=streamer, **arguments
            )
        except BaseException as error:
            if streamer is not None:
                streamer.end()  # whoever reads from it must not wait for ever
            if deadline.passed and isinstance(error, ShardliftError):
                raise deadline.error(error) from None
            raise
        local.keep(getattr(result, "past_key_values", None))
        return result


class _Stepwise:
    """What replaces a family's own forward and weights. A base beside the family's class."""

    def __init__(
        self, model: DescribedModel, gateway: Gateway, stop: Stop, adapters: inference_pb2.AdapterChoice | None
    ) -> None:
        # Not the family's own: that would build its layers, and look for the kernels of its attention.
        torch.nn.Module.__init__(self)  # type: ignore[arg-type]
        # Not annotated in the class: transformers would read that as the family's own.
        self.config = model.config
        self.generation_config = copy.deepcopy(model.generation_config)
        self._remote_name = model.name
        self._remote_dtype = model.dtype
        self._gateway = gateway
        self._stop = stop
        self._remote_adapters = adapters
        self._opened: list[RemoteCache] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self._remote_dtype

    def open_cache(self) -> RemoteCache:
        opened = RemoteCache(self._gateway, self._remote_name)
        self._opened.append(opened)
        self._stop.watch(opened)
        return opened

    def keep(self, returned: Any) -> None:
        """Leaves `returned` open: it is the caller's now."""
        self._opened = [opened for opened in self._opened if opened is not returned]

    def close(self) -> None:
        for opened in self._opened:
            opened.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' own, by when it is known how long the sequences may get: room for them is asked for at once."""
        past = model_kwargs.get("past_key_values")
        if isinstance(past, RemoteCache):
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            past.reserve(batch_size * copies * int(generation_config.max_length))
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, mode, batch_size, *args, **kwargs
        )

    def _once(self, asked: inference_pb2.ForwardRequest) -> Assembly:
        return forward.once(self._gateway, asked, self._stop.deadline)

    def generate(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own, with a remote cache in the place of the one that it would make."""
        past = kwargs.get("past_key_values")
        if past is not None and not isinstance(past, RemoteCache):
            raise InvalidRequestError(
                f"past_key_values is a {type(past).__name__}: only the RemoteCache of an earlier pass can be"
            )
        asked = kwargs.get("cache_implementation", getattr(generation_config, "cache_implementation", None))
        if asked not in _DYNAMIC_CACHES:
            raise InvalidRequestError(
                f"cache_implementation={asked!r} is not available: the workers keep dynamic caches"
            )
        # The model's own default may name a cache for one process.
        kwargs.pop("cache_implementation", None)
        self.generation_config.cache_implementation = None
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.cache_implementation = None
        use_cache = kwargs.get("use_cache", getattr(generation_config, "use_cache", None))
        if use_cache is None:
            use_cache = self.generation_config.use_cache
        if use_cache is not False and past is None:
            kwargs["past_key_values"] = self.open_cache()
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        self._stop.check()
        # Loops hand them on to the model, whose own forward would take no notice.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        cached = bool(use_cache) or past_key_values is not None
        asked = forward.request(
            self._remote_name,
            input_ids,
            attention_mask,
            position_ids,
            logits_to_keep=int(logits_to_keep or 0),
            use_cache=cached,
            others=kwargs,
            adapters=self._remote_adapters,
        )
        if not cached:
            return CausalLMOutputWithPast(logits=tensors.to_torch(self._once(asked)))
        opened = self.open_cache() if past_key_values is None else past_key_values
        return CausalLMOutputWithPast(logits=tensors.to_torch(opened.step(asked)), past_key_values=opened)


@contextlib.contextmanager
def _in_time(stop: Stop, seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, stop.stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _opened(
    model: DescribedModel, gateway: Gateway, stop: Stop, adapters: inference_pb2.AdapterChoice | None
) -> Iterator[Any]:
    config: Any = model.config
    local = _class_for(config.__class__)(model, gateway, stop, adapters)
    try:
        yield local
    finally:
        local.close()


@cache
def _class_for(config_class: Any) -> Any:
    """The family's class for `config_class`, weightless; where transformers knows none, its base."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        bases: tuple[type, ...] = (_Stepwise, family)
        name = family.__name__
    else:
        bases, name = (_Stepwise, GenerationMixin, PreTrainedModel), "PreTrainedModel"
    return type(name, bases, {"__module__": __name__})
