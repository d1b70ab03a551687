"""Single values of a config, put in the checkpoint's place as transformers' from_pretrained does."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..proto.v1.errors import InvalidRequestError, UnknownArgumentError, one_line
from ..worker.remote_code import ModelCode
from ..worker.skeleton import EXPERTS_IMPLEMENTATION, whole_config

# The names that `from_pretrained` itself has, for what a mistyped one was meant to be. tests/test_overrides.py has the
# client's signature beside it.
ARGUMENTS = (
    "pretrained_model_name_or_path",
    *("config", "quantization_config", "device_map", "max_memory", "num_stages", "dtype", "torch_dtype", "revision"),
    *("subfolder", "variant", "token", "cache_dir", "trust_remote_code", "attn_implementation", "adapter_kwargs"),
    *("name", "address", "quantize_experts", "requantize", "dequantize", "staging_budget", "connections", "part_cache"),
    *("reserve_tokens", "max_sessions", "max_waiting", "idle_timeout_s", "batching", "trace", "progress"),
    *("link_speed", "load_in_4bit", "load_in_8bit", "experts_implementation", "use_safetensors"),
    "local_files_only",
)


def override(config: Mapping[str, Any], overrides: Mapping[str, Any], code: ModelCode | None = None) -> dict[str, Any]:
    """`config`, a `config.json`, with single values changed: what transformers' config class makes of them, other names
    for the same (GPT-2's `n_layer`), and dicts for a part of a config (`text_config`), included.

    code: the checkpoint's own, where it may run. Raises UnknownArgumentError for a name that the config has not, and
    InvalidRequestError for a value that it can't have.
    """
    values = dict(overrides)
    experts = {name: values.pop(name) for name in (EXPERTS_IMPLEMENTATION,) if name in values}
    if not values:
        return {**config, **experts}
    plain = whole_config(config, code)
    # An attribute of a config is whatever its object has; but its methods are none, and what begins with _ isn't kept.
    unknown = [name for name in values if name.startswith("_") or callable(getattr(plain, name, None))]
    if not unknown:
        try:
            changed, unused = type(plain).from_dict(_decoded(plain, config), return_unused_kwargs=True, **values)
            unknown = list(unused)
        except Exception as error:
            raise InvalidRequestError(
                f"the config can't have {', '.join(sorted(values))} so: {one_line(error)}"
            ) from error
    if unknown:
        raise UnknownArgumentError(_say(unknown, type(plain).__name__, _fields(plain)))
    return {**json.loads(changed.to_json_string(use_diff=False)), **experts}


def _decoded(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = type(config)._decode_special_floats(dict(values))
    return result


def _fields(config: Any) -> list[str]:
    return [name for name in (*config.to_dict(), *config.attribute_map) if not name.startswith("_")]


def _say(unknown: Iterable[str], config_class: str, fields: Iterable[str]) -> str:
    known, said = [*dict.fromkeys((*ARGUMENTS, *fields))], []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        said.append(f"{name[:80]!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return (
        f"from_pretrained got an unexpected keyword argument {', '.join(said)}: neither it nor the model's "
        f"{config_class} has one of that name; correct it, or leave it out"
    )
