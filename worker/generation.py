"""Autoregressive decoding on the last stage, with transformers' own preparation, processors and stopping rules.

transformers' `generate` does everything up to its loop: defaults, special tokens, positions, processors, criteria.
The loop itself is `GenerationMixin._sample`, turned inside out so that each forward pass may be awaited and each
request draws from a random generator of its own.

Shapes: B rows, T new tokens, L tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..proto.v1.errors import InvalidRequestError, one_line
from ..proto.v1.limits import MOST_COPIES
from .draws import Draws
from .stage import StepInput

# Fields of GenerationConfig that are floating point: a wire format that knows only doubles loses the difference, and
# transformers' processors check for it.
_FLOAT_FIELDS = frozenset(
    {
        "diversity_penalty",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "guidance_scale",
        "length_penalty",
        "min_p",
        "repetition_penalty",
        "temperature",
        "top_h",
        "top_p",
        "typical_p",
    }
)
# [[ids, bias], …] and [start, factor].
_PAIRED_FIELDS = frozenset({"sequence_bias", "exponential_decay_length_penalty"})
_DYNAMIC_CACHES = (None, "dynamic")


def normalize_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of a GenerationConfig with whole doubles made integers again, except where floats are meant."""

    def integral(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, list):
            return [integral(item) for item in value]
        return value

    def normalized(name: str, value: Any) -> Any:
        if name in _FLOAT_FIELDS:
            return _floating(value)
        value = integral(value)
        if name in _PAIRED_FIELDS and isinstance(value, list):
            # What goes with ids, or with a start, is a float in transformers.
            pairs = value if name == "sequence_bias" else [value]
            pairs = [[*each[:-1], _floating(each[-1])] if isinstance(each, list) and each else each for each in pairs]
            return pairs if name == "sequence_bias" else pairs[0]
        return value

    return {name: normalized(name, value) for name, value in fields.items()}


def _floating(value: Any) -> Any:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One pass through the whole pipeline that decoding asks for."""

    input: StepInput
    logits_to_keep: int
    reset_cache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedStep:
    """What one pass gave: a token per row [B], and the logits and scores [B, V] when asked for.

    chosen: how many of the tokens are not the padding of rows that had ended.
    """

    tokens: list[int]
    chosen: int
    finished: bool
    logits: torch.Tensor | None
    scores: torch.Tensor | None


class Decoding:
    """The state of one `generate` request between its forward passes. Synchronous; needs no lock of its own.

    Use: run each of `prefill()` and feed the last one's logits to `advance`; until that says finished, run
    `next_forward()` and feed its logits to `advance`. To go on where another one was interrupted, `accept` its tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        fields: Mapping[str, Any],
        *,
        draws: Callable[[torch.device], Draws],
        output_logits: bool = False,
        output_scores: bool = False,
        past: int = 0,
        stop: StoppingCriteria | None = None,
    ) -> None:
        """`input_ids` and `attention_mask`: int64 [rows, length]; `fields`: of GenerationConfig, as a user gives them.

        draws: makes what is drawn from, where something is. past: so many of the first positions are cached already.
        stop: what `stops` makes of the stop strings, which are looked at nowhere else.

        Raises InvalidRequestError for what transformers refuses, and for decoding methods other than greedy search
        and sampling.
        """
        device = model.device
        arguments = normalize_numbers(fields)
        _check_fields(arguments)
        if arguments.get("cache_implementation") not in _DYNAMIC_CACHES:
            raise InvalidRequestError(
                f"cache_implementation={arguments['cache_implementation']!r} is not available: "
                "the stages keep dynamic caches"
            )
        # The model's own default may name a cache for one process; the stages' caches give the same values.
        arguments["cache_implementation"] = None
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.to(device)
        # Nor the model's own, for which it would want a tokenizer.
        arguments["stop_strings"] = None
        if stop is not None:
            arguments["stopping_criteria"] = StoppingCriteriaList([stop])
        try:
            with torch.inference_mode():
                prepared = model.generate(input_ids.to(device), custom_generate=_Prepared, **arguments)
        except _USERS_FAULT as error:
            raise InvalidRequestError(f"generate can't do as asked: {one_line(error)}") from error
        assert isinstance(prepared, _Prepared)
        self._model = model
        self._input_ids = prepared.input_ids
        self._past = past
        self._processors = prepared.logits_processor
        self._criteria = prepared.stopping_criteria
        self._config = prepared.generation_config
        self._kwargs = prepared.model_kwargs
        # The stages keep their own caches; transformers' empty one goes.
        self._kwargs.pop("past_key_values", None)
        if self._kwargs.get("position_ids") is None:
            # A model with alibi takes none, but a pass has some.
            self._kwargs["position_ids"] = torch.arange(self._input_ids.shape[1], device=device)[None]
        self._use_cache = bool(self._kwargs["use_cache"])
        _check_mode(self._config)
        self._output_logits = output_logits
        self._output_scores = output_scores
        self._unfinished = torch.ones(self._input_ids.shape[0], dtype=torch.long, device=device)
        self._running = self._input_ids.shape[0]
        self._has_eos = any(hasattr(criterion, "eos_token_id") for criterion in self._criteria)
        self._draws = draws(device) if self._config.do_sample else None
        self._row_tokens = torch.zeros_like(self._unfinished)
        self.prompt_tokens = self._input_ids.shape[1]

    @property
    def rows(self) -> int:
        return self._input_ids.shape[0]

    @property
    def use_cache(self) -> bool:
        return self._use_cache

    @property
    def max_length(self) -> int:
        """The most tokens that a row can come to, the prompt's included."""
        return int(self._config.max_length)

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of the prompt that one pass takes; 0 for all."""
        return int(self._config.prefill_chunk_size or 0)

    @property
    def finished(self) -> bool:
        return not self._running

    @property
    def new_tokens(self) -> int:
        return self._input_ids.shape[1] - self.prompt_tokens

    @property
    def row_tokens(self) -> list[int]:
        """New tokens of each row, without the padding of rows that had ended."""
        counts: list[int] = self._row_tokens.tolist()
        return counts

    @property
    def generator_state(self) -> bytes:
        """The client's generator as it was left; nothing where it gave none, or nothing is drawn."""
        return b"" if self._draws is None else self._draws.state

    @property
    def stopped_early(self) -> bool:
        """Whether a stopping rule other than the length limit ended it."""
        return not bool(self._unfinished.any()) and self._input_ids.shape[1] < self._config.max_length

    def prefill(self) -> list[Forward]:
        """The prompt's passes: one, or several with `prefill_chunk_size`."""
        length = self._input_ids.shape[1]
        chunk = self._config.prefill_chunk_size or length
        if chunk < length - self._past and not self._use_cache:
            raise InvalidRequestError("prefill_chunk_size needs use_cache=True")
        forwards = []
        for start in range(self._past, length, chunk):
            end = min(start + chunk, length)
            kwargs = dict(self._kwargs)
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    whole = self._kwargs[name]
                    kwargs[name] = whole[:, :end] if name == "attention_mask" else whole[..., start:end]
            forwards.append(self._forward(self._input_ids[:, start:end], None, None, first=start == 0, kwargs=kwargs))
        return forwards

    def next_forward(self, cache: Any, tokens: int = 1) -> Forward:
        """The pass for the last `tokens` tokens that were chosen. `cache`: this stage's, which knows the past's
        length."""
        return self._forward(self._input_ids, tokens if self._use_cache else None, cache, first=False)

    def accept(self, tokens: torch.Tensor) -> None:
        """Takes the tokens [rows] of a step that was made before, as `advance` would have chosen them."""
        with torch.inference_mode():
            tokens = tokens.to(self._input_ids.device)
            if self._draws is not None:
                # As many numbers as the choice took.
                shape = (self._input_ids.shape[0], self._model.config.get_text_config(decoder=True).vocab_size)
                self._draws.draw(torch.ones(shape, dtype=torch.float32, device=tokens.device))
            outputs = CausalLMOutputWithPast(logits=None)
            self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)
            self._append(tokens)

    def _forward(
        self,
        input_ids: torch.Tensor,
        next_length: int | None,
        cache: Any,
        *,
        first: bool,
        kwargs: dict[str, Any] | None = None,
    ) -> Forward:
        with torch.inference_mode():
            inputs = self._model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_length,
                past_key_values=cache,
                is_first_iteration=first,
                **(self._kwargs if kwargs is None else kwargs),
            )
        unknown = set(inputs) - _KNOWN_INPUTS
        unsupported = sorted(name for name in unknown if inputs[name] is not None)
        if unsupported:
            raise InvalidRequestError(f"generate arguments {', '.join(unsupported)} can't travel through a pipeline")
        return Forward(
            input=StepInput(
                input=inputs["input_ids"],
                attention_mask=inputs.get("attention_mask"),
                position_ids=inputs["position_ids"],
                use_cache=self._use_cache,
            ),
            logits_to_keep=int(inputs.get("logits_to_keep") or 0),
            # A model may decide that its past is void, as Phi-3 does where long rotary factors begin.
            reset_cache=cache is not None and inputs.get("past_key_values") is None,
        )

    def advance(self, logits: torch.Tensor) -> DecodedStep:
        """Chooses the next token of each row from `logits` [B, kept, V] of the pass before."""
        with torch.inference_mode():
            outputs = CausalLMOutputWithPast(logits=logits)
            self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)
            raw = logits[:, -1].to(copy=True, dtype=torch.float32, device=self._input_ids.device)
            try:
                scores = self._processors(self._input_ids, raw)
            except _USERS_FAULT as error:
                raise InvalidRequestError(f"generate can't do as asked: {one_line(error)}") from error
            if self._draws is not None:
                probabilities = torch.nn.functional.softmax(scores, dim=-1)
                # On CUDA, drawing from these would be an assertion on the device, which ends every session on it.
                if not bool(torch.isfinite(probabilities).all()):
                    raise InvalidRequestError("the probabilities to draw from are not finite: raise the temperature")
                tokens = self._draws.draw(probabilities)
            else:
                tokens = torch.argmax(scores, dim=-1)
            if self._has_eos:
                tokens = tokens * self._unfinished + self._config._pad_token_tensor * (1 - self._unfinished)
            chosen = self._running
            self._append(tokens)
            return DecodedStep(
                tokens=tokens.tolist(),
                chosen=chosen,
                finished=self.finished,
                logits=raw if self._output_logits else None,
                scores=scores if self._output_scores else None,
            )

    def _append(self, tokens: torch.Tensor) -> None:
        self._input_ids = torch.cat([self._input_ids, tokens[:, None]], dim=-1)
        self._row_tokens += self._unfinished
        try:
            ended = self._criteria(self._input_ids, None)
        except _USERS_FAULT as error:
            raise InvalidRequestError(f"generate can't do as asked: {one_line(error)}") from error
        self._unfinished = self._unfinished & ~ended
        self._running = sum(self._unfinished.tolist())


# What transformers raises for arguments that make no sense, sometimes only where they are used.
_USERS_FAULT = (ValueError, TypeError, IndexError, AttributeError, KeyError)

_KNOWN_INPUTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
)


class _Prepared:
    """Takes the place of transformers' decoding loop, and keeps what the loop would have been called with."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> None:
        self.input_ids = input_ids
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Only fields of GenerationConfig may come over the wire: `generate` takes much else that means objects."""
    unknown = sorted(set(fields) - set(GenerationConfig().to_dict()) - {"attention_mask"})
    if unknown:
        raise InvalidRequestError(f"generation has no field {', '.join(unknown)}: see transformers' GenerationConfig")
    for name in ("do_sample", "use_cache"):
        if not isinstance(fields.get(name), (bool, type(None))):
            raise InvalidRequestError(f"{name}={fields[name]!r} is neither true nor false")
    if fields.get("guidance_scale") not in (None, 1.0):
        raise InvalidRequestError("guidance_scale is not available: it needs a second pass through the model")
    # transformers makes that many copies of the input before it asks what for.
    for name in ("num_return_sequences", "num_beams"):
        copies = fields.get(name)
        if copies is not None and not (isinstance(copies, int) and 0 < copies <= MOST_COPIES):
            raise InvalidRequestError(f"{name}={copies!r}: write 1 or more, and {MOST_COPIES} at most")
    chunk = fields.get("prefill_chunk_size")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InvalidRequestError(f"prefill_chunk_size={chunk!r} must be an integer of 1 or more")


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidRequestError(
            f"{mode.value.replace('_', ' ')} is not available: use num_beams=1 without an assistant (greedy or sampled)"
        )
