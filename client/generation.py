"""One running `Generate` call, and the request that starts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from ..proto.v1.wire import Assembly
from . import tensors
from .gateway import Gateway
from .jsonable import jsonable, to_struct

# Arguments of transformers' generate that hold code or tensors, which stay where they are.
_LOCAL_ONLY = frozenset(
    {
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "assistant_model",
        "assistant_tokenizer",
        "custom_generate",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        "past_key_values",
        "inputs_embeds",
        "encoder_outputs",
        "position_ids",
        "labels",
        "synced_gpus",
    }
)
# Accepted and not sent: tokenizers give the first, and the gateway has a tokenizer of its own.
_IGNORED = frozenset({"token_type_ids", "tokenizer"})
# Fields of a GenerationConfig that say where it came from, not what to do.
_BOOKKEEPING = frozenset({"_from_model_config", "_commit_hash", "_original_object_hash", "transformers_version"})


def fields(config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The generation fields that `config` (a GenerationConfig, a dict or None) and then `arguments` set, JSON-able.

    Raises InvalidRequestError for an argument that can't be sent.
    """
    chosen: dict[str, Any] = {}
    if config is not None:
        values = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(values, Mapping):
            raise InvalidRequestError(f"generation_config is a {type(config).__name__}, not a GenerationConfig")
        chosen.update((key, value) for key, value in values.items() if value is not None and key not in _BOOKKEEPING)
    for key, value in arguments.items():
        if key in _LOCAL_ONLY:
            if value is not None and value is not False and value != []:
                raise InvalidRequestError(
                    f"{key} can't be sent to the gateway: only fields of GenerationConfig can, as numbers and strings"
                )
        elif key not in _IGNORED:
            chosen[key] = value
    if isinstance(bias := chosen.get("sequence_bias"), Mapping):  # its keys are tuples; this is its form in JSON
        chosen["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
    return {key: jsonable(value, key) for key, value in chosen.items()}


def request(
    model: str,
    *,
    input_ids: Tensor | None = None,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    attention_mask: Any = None,
    generation: Mapping[str, Any],
    seed: int | None = None,
    output_logits: bool = False,
    output_scores: bool = False,
) -> inference_pb2.GenerateRequest:
    """The request for one of `input_ids` (int64 [batch, length]), `prompt` or `messages` ({"role", "content"})."""
    given = [
        name for name, value in (("ids", input_ids), ("prompt", prompt), ("messages", messages)) if value is not None
    ]
    if len(given) != 1:
        raise InvalidRequestError(f"one of ids, prompt or messages is needed, not {' and '.join(given) or 'none'}")
    if seed is not None and not 0 <= int(seed) < 1 << 64:
        raise InvalidRequestError(f"seed {seed} is not in 0 … 2**64 - 1")
    asked = inference_pb2.GenerateRequest(
        model=model,
        generation=to_struct(generation, "generation"),
        seed=None if seed is None else int(seed),
        output_logits=output_logits,
        output_scores=output_scores,
    )
    if input_ids is not None:
        sent_mask = None if attention_mask is None else tensors.mask(attention_mask, "attention_mask")
        if sent_mask is not None and sent_mask.shape != input_ids.shape:
            raise InvalidRequestError(
                f"attention_mask has shape {list(sent_mask.shape)} but input_ids {list(input_ids.shape)}"
            )
        tensors.check_request_size(input_ids, sent_mask)
        asked.input_ids.CopyFrom(input_ids)
        if sent_mask is not None:
            asked.attention_mask.CopyFrom(sent_mask)
    elif attention_mask is not None:
        raise InvalidRequestError("attention_mask belongs to ids: the gateway makes its own for text")
    elif prompt is not None:
        asked.prompt = prompt
    else:
        for message in messages or ():
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise InvalidRequestError("each message is a dict with role and content")
            asked.conversation.messages.add(role=message["role"], content=message["content"])
    return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: an id per row, its text where the request was text, its logits where they were asked for."""

    token_ids: list[int]
    text: str = ""
    logits: Assembly | None = None
    scores: Assembly | None = None


class Generation(Iterator[Step]):
    """A running `Generate` call: iterate over its steps.

    `batch`, `prompt_tokens` and `prompt_ids` are known after `start()` or the first step, `new_tokens` and
    `finish_reason` at the end. Leaving it early (`close`, the end of a `with` block, Ctrl-C) cancels the call.
    """

    def __init__(self, gateway: Gateway, asked: inference_pb2.GenerateRequest) -> None:
        self.batch = 0
        self.prompt_tokens = 0
        self.prompt_ids: list[int] = []
        self.new_tokens = 0
        self.finish_reason = ""
        self._started = False
        self._over = False
        self._gateway = gateway
        self._call = gateway.inference_stream("Generate", asked)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self.close()

    def close(self) -> None:
        """Cancels the call where it is still running."""
        self._over = True
        self._call.cancel()

    def start(self) -> None:
        """Returns once the gateway has accepted the prompt. Raises what it refused it with."""
        if self._started:
            return
        response = self._receive()
        if response is None or response.WhichOneof("event") != "accepted":
            raise InternalError("the gateway's answer did not start with the prompt's acceptance")
        self._started = True
        self.batch = response.accepted.batch
        self.prompt_tokens = response.accepted.prompt_tokens
        self.prompt_ids = list(response.accepted.prompt_ids)

    def __next__(self) -> Step:
        if self._over:
            raise StopIteration
        self.start()
        response = self._receive()
        while response is not None:
            match response.WhichOneof("event"):
                case "step":
                    return self._step(response.step)
                case "finished":
                    self.new_tokens = response.finished.new_tokens
                    self.finish_reason = response.finished.reason
                    if self._receive() is not None:
                        raise InternalError("the gateway went on after the end of its answer")
                    self._over = True
                    raise StopIteration
                case None:
                    response = self._receive()  # an event that this client is too old to know
                case other:
                    raise InternalError(f"the gateway sent {other!r} where a step was due")
        raise InternalError("the gateway's answer stopped before its end")

    def _step(self, step: inference_pb2.GeneratedStep) -> Step:
        logits = Assembly(step.logits) if step.HasField("logits") else None
        scores = Assembly(step.scores) if step.HasField("scores") else None
        # What one message could not hold follows: first the rest of the logits, then that of the scores.
        for assembly in (logits, scores):
            while assembly is not None and not assembly.complete:
                response = self._receive()
                if response is None or response.WhichOneof("event") != "more":
                    raise InternalError("the gateway broke off in the middle of a tensor")
                assembly.add(response.more)
        return Step(token_ids=list(step.token_ids), text=step.text, logits=logits, scores=scores)

    def _receive(self) -> inference_pb2.GenerateResponse | None:
        try:
            with self._gateway.errors():
                try:
                    return next(self._call)
                except StopIteration:
                    return None
                except grpc.RpcError:
                    if self._over:  # it was our own `close`
                        return None
                    raise
        except BaseException:
            self.close()
            raise
