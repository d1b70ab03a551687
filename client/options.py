"""The arguments of `from_pretrained` as the messages that carry them.

Nothing is looked up here but a config that is given by its path: what a path, a device or a quantization means, the
gateway says.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidDeviceMapError, InvalidRequestError
from .arguments import without_others
from .config_files import config_at
from .jsonable import jsonable, to_json
from .outside import outside_level

# What transformers notes in the config of each mixture that it builds, where nothing else was asked for.
_USUAL_EXPERTS = "grouped_mm"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")


def source(
    path: str | os.PathLike[str],
    *,
    revision: str | None = "main",
    subfolder: str | os.PathLike[str] | None = "",
    variant: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool | None = False,
    local_files_only: bool | None = False,
) -> registry_pb2.ModelSource:
    """Where the checkpoint is. A local folder becomes absolute; `token` is the Hub token to send, if any."""
    text = os.fspath(path)
    if not text:
        raise InvalidRequestError("the model's path is empty: a repository, folder or URL is needed")
    return registry_pb2.ModelSource(
        path=os.path.abspath(text) if os.path.isdir(text) else text,
        revision=_text(revision, "revision") or "main",
        subfolder=_path(subfolder, "subfolder"),
        variant=_text(variant, "variant"),
        token=token or "",
        hub_endpoint=os.environ.get("HF_ENDPOINT", ""),
        cache_dir=os.path.abspath(os.fspath(cache_dir)) if cache_dir else "",
        trust_remote_code=bool(trust_remote_code),
        local_files_only=bool(local_files_only),
    )


def adapter_source(adapter_kwargs: Mapping[str, Any] | None) -> registry_pb2.ModelSource:
    """What `adapter_kwargs` say of where an adapter is. Raises InvalidRequestError for what can't be meant."""
    if not isinstance(adapter_kwargs or {}, Mapping):
        raise InvalidRequestError(f"adapter_kwargs is {adapter_kwargs!r}: a dict is needed")
    said = dict(adapter_kwargs or {})
    token = said.pop("token", None)
    values = {name: said.pop(name, None) or "" for name in ("revision", "subfolder", "cache_dir")}
    if unknown := sorted(name for name, value in said.items() if value is not None and value is not False):
        raise InvalidRequestError(
            f"adapter_kwargs {', '.join(unknown)} can't be sent to the gateway: revision, subfolder, token and "
            "cache_dir can"
        )
    if values["cache_dir"]:
        values["cache_dir"] = os.path.abspath(os.fspath(values["cache_dir"]))
    return registry_pb2.ModelSource(
        token=token if isinstance(token, str) else "",
        revision=_text(values["revision"], "revision"),
        subfolder=_path(values["subfolder"], "subfolder"),
        cache_dir=values["cache_dir"],
    )


def load_options(
    *,
    config: Any = None,
    quantization_config: Any = None,
    quantize_experts: bool | None = None,
    requantize: bool = False,
    dequantize: bool = False,
    device_map: Any = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    num_stages: int | None = None,
    dtype: Any = "auto",
    attn_implementation: str | Mapping[str, str] | None = None,
    experts_implementation: str | None = None,
    adapter_kwargs: Mapping[str, Any] | None = None,
    staging_budget: int | str | None = None,
    connections: int | None = None,
    part_cache: bool = True,
    trace: bool = False,
    reserve_tokens: int | None = None,
    link_speed: str | None = None,
    max_sessions: int | None = None,
    max_waiting: int | None = None,
    idle_timeout_s: float | None = None,
    batching: bool = True,
    **kwargs: Any,
) -> registry_pb2.LoadOptions:
    """How to load. `kwargs` are what transformers still takes by older names, and attributes of the config.

    Raises InvalidRequestError for what can't be meant or sent.
    """
    if (old_dtype := kwargs.pop("torch_dtype", None)) is not None:
        warnings.warn("`torch_dtype` is deprecated: use `dtype`", FutureWarning, stacklevel=outside_level())
        dtype = old_dtype if dtype in ("auto", None) else dtype
    options = registry_pb2.LoadOptions(
        dtype=_dtype(dtype),
        attn_implementation=_attention(attn_implementation, config),
        num_stages=_count(num_stages, "num_stages"),
        max_memory=_max_memory(max_memory),
        staging_budget=_size(staging_budget, "staging_budget"),
        connections=_count(connections, "connections"),
        quantize_experts=bool(quantize_experts),
        without_quantized_experts=quantize_experts is not None and not quantize_experts,
        requantize=_flag(requantize, "requantize"),
        dequantize=_flag(dequantize, "dequantize"),
        without_cache=not part_cache,
        trace=trace,
        reserve_tokens=_count(reserve_tokens, "reserve_tokens") if reserve_tokens else 0,
        link_speed=link_speed or "",
        max_sessions=_count(max_sessions, "max_sessions"),
        max_waiting=_count(max_waiting, "max_waiting"),
        idle_timeout_s=_seconds(idle_timeout_s, "idle_timeout_s"),
        without_batching=not batching,
    )
    if adapter_kwargs:
        options.adapter.CopyFrom(adapter_source(adapter_kwargs))
    quantization = _quantization(quantization_config, kwargs)
    if quantization is not None:
        options.quantization_config_json = to_json(quantization, "quantization_config")
    if isinstance(device_map, str) and device_map in DEVICE_MAPS:
        options.device_map = device_map
    elif device_map is not None:
        options.device_map_by_module.update(_device_map(device_map))
    if config is not None:
        options.config_json = to_json(_config(config), "config")
    overrides = without_others(kwargs)
    if experts_implementation is None and _chosen("_experts_implementation", config) != _USUAL_EXPERTS:
        experts_implementation = _chosen("_experts_implementation", config)
    if experts_implementation is not None:
        overrides["experts_implementation"] = experts_implementation  # a config's, to whoever reads one
    if overrides:
        options.config_overrides_json = to_json(overrides, "config override")
    return options


def _dtype(dtype: Any) -> str:
    if isinstance(dtype, Mapping):
        dtype = dtype.get("", "float32")  # of all modules, whatever is said of single ones, as in transformers 5
    if dtype is None:
        return ""
    name = jsonable(dtype, "dtype")
    if not isinstance(name, str):
        raise InvalidRequestError(f"dtype is {dtype!r}: a torch dtype, its name or 'auto' is needed")
    return name.removeprefix("torch.")


def _attention(value: str | Mapping[str, str] | None, config: Any) -> str:
    """As transformers has it: for each part of a model, "" being the whole; what a config object was made with, too."""
    if isinstance(value, Mapping):
        value = value.get("text_config") or value.get("")
    return _text(value or _chosen("_attn_implementation", config), "attn_implementation")


def _chosen(name: str, config: Any) -> Any:
    """What a config object says beside its values, which a config as a dict has not."""
    if not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), name, None) or getattr(config, name, None)


def _text(value: str | None, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{name} is {value!r}: a text is needed")
    return value or ""


def _path(value: str | os.PathLike[str] | None, name: str) -> str:
    return _text(os.fspath(value) if isinstance(value, os.PathLike) else value, name)


def _flag(value: bool | None, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"{name} is {value!r}: True or False is needed")
    return bool(value)


def _count(value: int | None, name: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise InvalidRequestError(f"{name} is {value!r}: a whole number above 0 is needed")
    return value


def _seconds(value: float | None, name: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InvalidRequestError(f"{name} is {value!r}: a number of seconds above 0 is needed")
    return float(value)


def _size(value: int | str | None, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidRequestError(f"{name} is {value!r}: bytes or a text like '512MiB' is needed")
    return str(value)


def _max_memory(limits: Mapping[Any, Any] | None) -> dict[str, str]:
    if limits is None:
        return {}
    if not isinstance(limits, Mapping):
        raise InvalidDeviceMapError(f"max_memory is {limits!r}: a dict from device to bytes or '20GiB' is needed")
    for device, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, (int, str)):
            raise InvalidDeviceMapError(f"max_memory[{device!r}] is {limit!r}: bytes or a text like '20GiB' is needed")
    return {str(device): str(limit) for device, limit in limits.items()}


def _device_map(device_map: Any) -> dict[str, str]:
    if isinstance(device_map, Mapping):
        return {str(module): _device(device) for module, device in device_map.items()}
    return {"": _device(device_map)}  # the whole model on one device, as transformers takes it


def _device(device: Any) -> str:
    torch = sys.modules.get("torch")
    if isinstance(device, bool) or not (
        isinstance(device, (int, str)) or (torch is not None and isinstance(device, torch.device))
    ):
        raise InvalidDeviceMapError(f"device {device!r} is neither a number nor a name such as 'cuda:0'")
    return str(device)


def _config(config: Any) -> Mapping[str, Any]:
    if isinstance(config, (str, os.PathLike)):
        return config_at(config)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise InvalidRequestError(
            f"config is a {type(config).__name__}: a PreTrainedConfig, a dict or a path is needed"
        )
    return values


def _quantization(config: Any, kwargs: dict[str, Any]) -> Mapping[str, Any] | None:
    # As transformers took them before there was a quantization_config, with the bnb_… arguments beside them.
    loose = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("bnb_4bit_", "llm_int8_"))}
    asked = {name: True for name in ("load_in_4bit", "load_in_8bit") if kwargs.pop(name, None)}
    if asked or loose:
        if config is not None:
            raise InvalidRequestError(
                f"{', '.join([*asked, *loose])} and quantization_config say the same thing: pass the latter alone"
            )
        if len(asked) != 1:
            raise InvalidRequestError("one of load_in_4bit and load_in_8bit is needed, not both or neither")
        return {"quant_method": "bitsandbytes", **asked, **loose}
    if config is None:
        return None
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise InvalidRequestError(
            f"quantization_config is a {type(config).__name__}: a BitsAndBytesConfig or a dict is needed"
        )
    if values.get("quant_method") == "bitsandbytes" and not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        # As transformers takes a BitsAndBytesConfig that says neither.
        values = {name: value for name, value in values.items() if not name.startswith("_")} | {"load_in_4bit": True}
    return values
