"""The request that starts a generation, made of what a user passes to `generate`. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InvalidRequestError
from ..proto.v1.tensor_pb2 import Tensor
from . import tensors
from .jsonable import jsonable, to_struct

# Arguments of transformers' generate that hold code or state of this process: a generation that has one is driven
# from here, step by step.
LOCAL = frozenset(
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
        "position_ids",
    }
)
# … and those that a remote model has no use for.
_NEVER = frozenset({"inputs_embeds", "encoder_outputs", "labels", "synced_gpus"})
# Accepted and not sent: tokenizers give the first, the gateway has a tokenizer of its own, and the last logits alone
# count, however many are kept.
_IGNORED = frozenset({"token_type_ids", "tokenizer", "logits_to_keep"})
# Fields of a GenerationConfig that say where it came from, not what to do.
_BOOKKEEPING = frozenset({"_from_model_config", "_commit_hash", "_original_object_hash", "transformers_version"})


def is_given(value: Any) -> bool:
    """Whether an argument asks for something."""
    return value is not None and value is not False and not (isinstance(value, (list, tuple)) and not value)


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`arguments` of `generate` as those that stay in this process, where they are given, and the others."""
    local = {key: value for key, value in arguments.items() if key in LOCAL and is_given(value)}
    return local, {key: value for key, value in arguments.items() if key not in LOCAL}


def config_values(config: Any) -> dict[str, Any]:
    """The fields that `config` (a GenerationConfig, a dict or None) sets. Raises InvalidRequestError."""
    if config is None:
        return {}
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise InvalidRequestError(f"generation_config is a {type(config).__name__}, not a GenerationConfig")
    return {key: value for key, value in values.items() if value is not None and key not in _BOOKKEEPING}


def check_usable(arguments: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for an argument that no remote model has a use for."""
    if unusable := sorted(name for name, value in arguments.items() if name in _NEVER and is_given(value)):
        raise InvalidRequestError(f"{', '.join(unusable)} can't be given to a remote model")


def fields(config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The generation fields that `config` (a GenerationConfig, a dict or None) and then `arguments` set, JSON-able.

    Raises InvalidRequestError for an argument that can't be sent.
    """
    chosen = config_values(config)
    for key, value in arguments.items():
        if key in LOCAL | _NEVER:
            if is_given(value):
                raise InvalidRequestError(
                    f"{key} can't be sent to the gateway: only fields of GenerationConfig can, as numbers and strings"
                )
        elif key not in _IGNORED:
            chosen[key] = value
    if isinstance(bias := chosen.get("sequence_bias"), Mapping):  # its keys are tuples; this is its form in JSON
        chosen["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
    return {key: jsonable(value, key) for key, value in chosen.items()}


def check_names(chosen: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for what is no field of a GenerationConfig."""
    from transformers import GenerationConfig

    known = GenerationConfig()
    if unused := sorted(name for name, value in chosen.items() if value is not None and not hasattr(known, name)):
        raise InvalidRequestError(f"generate has no arguments {', '.join(unused)}: is that a typo?")


def request(
    model: str,
    *,
    input_ids: Tensor | None = None,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    attention_mask: Any = None,
    past: int = 0,
    generation: Mapping[str, Any],
    seed: int | None = None,
    output_logits: bool = False,
    output_scores: bool = False,
) -> inference_pb2.GenerateRequest:
    """The request for one of `input_ids` (int64 [batch, length]), `prompt` or `messages` ({"role", "content"}).

    `past`: positions that the mask covers before those of the ids.
    """
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
        needed = [input_ids.shape[0], past + input_ids.shape[1]]
        if sent_mask is not None and list(sent_mask.shape) != needed:
            ids = f"input_ids {list(input_ids.shape)}" + (f" after {past} positions" if past else "")
            raise InvalidRequestError(f"attention_mask has shape {list(sent_mask.shape)} but {ids}")
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
