"""Which adapters a handle asks for, and what it says of one to load. No I/O."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

from ..proto.v1 import inference_pb2, registry_pb2
from ..proto.v1.errors import InvalidRequestError
from . import options
from .hub_token import hub_token

# What an adapter is called whose user doesn't say, as in transformers.
DEFAULT_NAME = "default"
# A name, several, None for the base alone, or ... for what the handle has chosen.
Adapters = str | Sequence[str] | None | EllipsisType

# Of transformers' `load_adapter`: what changes nothing here, whatever it is.
_MEANINGLESS = ("low_cpu_mem_usage", "device_map", "max_memory", "offload_folder", "offload_index")


def names_of(adapters: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in what a user passes. Raises InvalidRequestError."""
    if adapters is None:
        return ()
    names = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    if not all(isinstance(name, str) and name for name in names):
        raise InvalidRequestError(f"adapter is {adapters!r}: a name, several, or None for the base is needed")
    if len(set(names)) < len(names):
        raise InvalidRequestError(f"adapter is {list(names)}: name each once")
    return names


def choice(names: Sequence[str] | None) -> inference_pb2.AdapterChoice | None:
    """As a request says it; None for what the model was loaded with."""
    return None if names is None else inference_pb2.AdapterChoice(names=names)


def say(
    request: inference_pb2.GenerateRequest | inference_pb2.ForwardRequest, chosen: inference_pb2.AdapterChoice | None
) -> None:
    """Has `request` name its adapters, be it none; with None it leaves that to the model."""
    if chosen is not None:
        request.adapters.SetInParent()
        request.adapters.names[:] = chosen.names


def load_request(
    model: str,
    path: str | os.PathLike[str],
    name: str | None,
    address: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    adapter_kwargs: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
) -> registry_pb2.LoadAdapterRequest:
    """The request of `load_adapter`. `others`: what else a caller passed. Raises InvalidRequestError."""
    for key, value in (others or {}).items():
        if key not in _MEANINGLESS and value not in (None, False) and (key, value) != ("hotswap", "auto"):
            raise InvalidRequestError(f"{key} is not supported when loading an adapter into a cluster: leave it out")
    elsewhere = options.adapter_source(adapter_kwargs)
    own = (adapter_kwargs or {}).get("token")
    return registry_pb2.LoadAdapterRequest(
        model=model,
        name=name or "",
        source=options.source(
            path,
            revision=elsewhere.revision or revision,
            subfolder=elsewhere.subfolder or subfolder,
            token=hub_token(token if own is None else own, address),
            cache_dir=elsewhere.cache_dir or cache_dir,
            local_files_only=local_files_only,
        ),
    )
