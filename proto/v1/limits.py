"""How much a request may ask for, checked before anything is allocated for it. docs/security.md has the table.

Each `check_` raises InvalidRequestError with the value, the limit and the remedy. Pure: takes messages as they came.
"""

from __future__ import annotations

import math
from math import prod

from google.protobuf import struct_pb2

from . import generator_state, inference_pb2, registry_pb2, saving_pb2
from .errors import InvalidRequestError
from .tensor_pb2 import Tensor
from .wire import MAX_TENSOR_BYTES

# -- of inference ------------------------------------------------------------------------------------------------------

# Rows of one batch, before and after num_return_sequences or num_beams make copies of them.
MOST_ROWS = 4096
MOST_COPIES = 1024
# Rows x length, with the copies: what is held as ids, mask and positions before the model is asked whether it has room.
MOST_TOKENS = 1 << 22
MOST_PROMPT_CHARACTERS = 1 << 20
MOST_CHAT_MESSAGES = 4096
MOST_GENERATION_VALUES = 1 << 18
MOST_GENERATION_DEPTH = 8
MOST_STOP_STRINGS = 64
MOST_STOP_CHARACTERS = 1024
# That compute one request together.
MOST_ADAPTERS = 64
# Lists of tokens that a step looks at one by one: bad_words_ids, sequence_bias.
MOST_TOKEN_LISTS = 8192
_TOKEN_LISTS = ("bad_words_ids", "sequence_bias")
_COPIES = ("num_return_sequences", "num_beams")

# -- of loads ----------------------------------------------------------------------------------------------------------

MOST_NAME_CHARACTERS = 256
MOST_PATH_CHARACTERS = 4096
MOST_WORD_CHARACTERS = 1024
MOST_JSON_CHARACTERS = 1 << 20
MOST_MAP_ENTRIES = 1 << 16
MOST_STAGES = 4096
MOST_SESSIONS = 1 << 16
MOST_RESERVED_TOKENS = 1 << 40


# -- of looking at a cluster -------------------------------------------------------------------------------------------

# Of a request that waits: a day is as good as for ever, and what is no number would wait for nothing, or for ever.
MOST_SECONDS = 86_400.0


def check_model(name: str) -> None:
    _characters("the model's name", name, MOST_NAME_CHARACTERS)


def check_node(name: str) -> None:
    _characters("the node's name", name, MOST_NAME_CHARACTERS)


def check_watch(request: registry_pb2.WatchClusterRequest) -> None:
    check_model(request.model)
    _seconds("interval_s", request.interval_s)


def check_diagnose(request: registry_pb2.DiagnoseClusterRequest) -> None:
    _seconds("timeout_s", request.timeout_s)


def check_generate(request: inference_pb2.GenerateRequest) -> None:
    check_model(request.model)
    rows, length = 1, 1
    kind = request.WhichOneof("input")
    if kind == "input_ids":
        rows, length = _ids(request.input_ids)
    elif kind == "prompt":
        _characters("the prompt", request.prompt, MOST_PROMPT_CHARACTERS)
    elif kind == "conversation":
        messages = request.conversation.messages
        _at_most("messages in the conversation", len(messages), MOST_CHAT_MESSAGES, "leave early ones out")
        for message in messages:
            _characters("a message's role", message.role, MOST_NAME_CHARACTERS)
        total = sum(len(message.content) for message in messages)
        _at_most("characters in the conversation", total, MOST_PROMPT_CHARACTERS, "shorten it")
    _check_generation(request.generation, rows, length)
    _check_adapters(request.adapters)
    if request.generator_state:
        if request.HasField("seed"):
            raise InvalidRequestError("seed and generator_state say the same thing: send one of them")
        generator_state.check(request.generator_state)


def _check_adapters(choice: inference_pb2.AdapterChoice) -> None:
    _at_most("adapters", len(choice.names), MOST_ADAPTERS, "name fewer")


def _check_generation(generation: struct_pb2.Struct, rows: int, length: int) -> None:
    fields = generation.fields
    if not fields:
        return
    count = _count_values(generation, MOST_GENERATION_DEPTH)
    _at_most("values in the generation's fields", count, MOST_GENERATION_VALUES, "leave some out")
    copies = 1
    for name in _COPIES:
        if name in fields and fields[name].WhichOneof("kind") == "number_value":
            value = fields[name].number_value
            if not value <= MOST_COPIES:
                raise InvalidRequestError(f"{name}={value:g}: at most {MOST_COPIES} copies of each row are made")
            copies = max(copies, int(value))
    tokens = rows * length * copies
    _at_most("tokens in all rows and their copies", tokens, MOST_TOKENS, "send fewer rows, or ask for fewer copies")
    stops = fields["stop_strings"] if "stop_strings" in fields else struct_pb2.Value()
    strings = [value.string_value for value in stops.list_value.values] or [stops.string_value]
    _at_most("stop_strings", len(strings), MOST_STOP_STRINGS, "leave some out")
    for text in strings:
        _characters("a stop string", text, MOST_STOP_CHARACTERS)
    for name in _TOKEN_LISTS:
        if name in fields:
            given = fields[name]
            lists = len(given.list_value.values) or len(given.struct_value.fields)
            _at_most(name, lists, MOST_TOKEN_LISTS, "leave some out")


def _count_values(struct: struct_pb2.Struct, depth: int) -> int:
    """Values in `struct`, of all levels. Raises InvalidRequestError where there are more than `depth`."""
    count = 0
    level: list[struct_pb2.Value] = list(struct.fields.values())
    while level:
        count += len(level)
        depth -= 1
        if depth < 0:
            raise InvalidRequestError(
                f"the generation's fields are nested over {MOST_GENERATION_DEPTH} deep: none of transformers' is"
            )
        below: list[struct_pb2.Value] = []
        for value in level:
            kind = value.WhichOneof("kind")
            if kind == "list_value":
                below += value.list_value.values
            elif kind == "struct_value":
                below += value.struct_value.fields.values()
        level = below
    return count


def check_forward(request: inference_pb2.ForwardRequest) -> None:
    check_model(request.model)
    _check_adapters(request.adapters)
    rows, length = _ids(request.input_ids)
    _at_most("tokens in all rows", rows * length, MOST_TOKENS, "send fewer rows, or shorter ones")


def check_session(request: inference_pb2.SessionRequest) -> None:
    check_model(request.model)
    if not 0 <= request.idle_timeout_s < math.inf:
        raise InvalidRequestError(
            f"idle_timeout_s={request.idle_timeout_s}: write a number of seconds of 0 or more, or leave it out"
        )
    _at_most("rows", len(request.rows), MOST_ROWS, "keep fewer")
    _at_most("reserve_tokens", request.reserve_tokens, MOST_RESERVED_TOKENS, "write a smaller number")
    _check_adapters(request.adapters)
    match request.WhichOneof("action"):
        case "forward":
            check_forward(request.forward)
        case "generate":
            check_generate(request.generate)


def check_logits(rows: int, length: int, vocabulary: int, item_bytes: int) -> None:
    """Before they are computed: logits over the limit of a tensor could not be sent."""
    size = rows * length * vocabulary * item_bytes
    if size > MAX_TENSOR_BYTES:
        raise InvalidRequestError(
            f"logits of {rows} rows, {length} positions and {vocabulary} tokens take {size:,} bytes, over the limit of "
            f"{MAX_TENSOR_BYTES:,}: ask for the last positions' alone (logits_to_keep), or send shorter pieces"
        )


def check_source(source: registry_pb2.ModelSource) -> None:
    _characters("the path", source.path, MOST_PATH_CHARACTERS)
    _characters("cache_dir", source.cache_dir, MOST_PATH_CHARACTERS)
    for field in ("revision", "subfolder", "variant", "token", "hub_endpoint"):
        _characters(field, getattr(source, field), MOST_WORD_CHARACTERS)
    if not (source.token.isascii() and source.token.isprintable()):
        # Whoever sends it to the Hub would be told so with the token beside it.
        raise InvalidRequestError("the Hub token has characters that a header can't carry: read it again")


def check_save(request: saving_pb2.SaveModelRequest) -> None:
    check_model(request.name)
    _characters("the folder", request.folder, MOST_PATH_CHARACTERS)
    for field in ("save_id", "max_shard_size", "variant"):
        _characters(field, getattr(request, field), MOST_WORD_CHARACTERS)


def check_load(source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions, name: str = "") -> None:
    check_model(name)
    check_source(source)
    check_source(options.adapter)
    for field in ("dtype", "attn_implementation", "device_map", "staging_budget", "link_speed"):
        _characters(field, getattr(options, field), MOST_WORD_CHARACTERS)
    for field in ("quantization_config_json", "config_json", "config_overrides_json"):
        _characters(field.removesuffix("_json"), getattr(options, field), MOST_JSON_CHARACTERS)
    for field in ("device_map_by_module", "max_memory"):
        entries = getattr(options, field)
        what = f"entries in {field.removesuffix('_by_module')}"
        _at_most(what, len(entries), MOST_MAP_ENTRIES, "name whole layers, not what is in them")
        for key, value in entries.items():
            _characters(f"a name in {field}", key, MOST_WORD_CHARACTERS)
            _characters(f"a value in {field}", value, MOST_WORD_CHARACTERS)
    for field, most in (
        ("num_stages", MOST_STAGES),
        ("max_sessions", MOST_SESSIONS),
        ("max_waiting", MOST_SESSIONS),
        ("reserve_tokens", MOST_RESERVED_TOKENS),
    ):
        _at_most(field, getattr(options, field), most, "write a smaller number")


def _ids(ids: Tensor) -> tuple[int, int]:
    """Rows and length of token ids, whose bytes are looked at later."""
    shape = list(ids.shape)
    if len(shape) != 2:
        raise InvalidRequestError(f"input_ids must be a non-empty integer tensor [batch, length], not {shape[:8]}")
    if min(shape) < 0 or prod(shape) > MOST_TOKENS:
        raise InvalidRequestError(f"input_ids of shape {shape}: at most {MOST_TOKENS:,} tokens are taken at once")
    rows, length = shape
    _at_most("rows in input_ids", rows, MOST_ROWS, "send fewer at once")
    return rows, length


def _seconds(what: str, seconds: float) -> None:
    if not 0 <= seconds <= MOST_SECONDS:
        raise InvalidRequestError(
            f"{what}={seconds:g}: write a number of seconds from 0 to {MOST_SECONDS:,.0f}, or leave it out"
        )


def _characters(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise InvalidRequestError(f"{what} has {len(text):,} characters, over the limit of {most:,}: shorten it")


def _at_most(what: str, count: int, most: int, remedy: str) -> None:
    if count > most:
        raise InvalidRequestError(f"{count:,} {what}, over the limit of {most:,}: {remedy}")
