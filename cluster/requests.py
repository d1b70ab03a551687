"""Requests as they come over the wire, checked and made into the planner's values."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InvalidRequestError, UnsupportedModelError
from ..worker.byte_sizes import parse_rate, parse_size
from ..worker.records import HubToken
from ..worker.sources.urls import is_url, parse_url
from ..worker.spec import MOST_IDLE_S
from .checkpoint import CheckpointRequest
from .load_time import Speeds
from .plan import PlanOptions
from .planning import ModelOptions, ServingOptions, TransferOptions

_LEAST_BUDGET_BYTES = 1 << 20
_MOST_CONNECTIONS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_remote_code(source: registry_pb2.ModelSource, *, allowed: bool) -> None:
    """Raises UnsupportedModelError for trust_remote_code where the gateway's operator doesn't allow it."""
    if source.trust_remote_code and not allowed:
        raise UnsupportedModelError(
            "trust_remote_code=True is refused by this gateway: it runs no code of a checkpoint, unless its operator "
            "starts it with `shardlift up --allow-remote-code`"
        )


def checkpoint_request(source: registry_pb2.ModelSource) -> CheckpointRequest:
    """Of a source that `check_remote_code` has let pass."""
    return CheckpointRequest(
        path=source.path,
        revision=source.revision or "main",
        subfolder=source.subfolder,
        variant=source.variant,
        hub_endpoint=source.hub_endpoint.rstrip("/"),
        cache_dir=source.cache_dir,
        trust_remote_code=source.trust_remote_code,
        local_files_only=source.local_files_only,
    )


def access_token(source: registry_pb2.ModelSource) -> HubToken:
    """The token for the Hub: the request's own; else the cluster's, but never to a Hub that the request named."""
    if source.token:
        return source.token
    return False if source.hub_endpoint else None


def model_options(options: registry_pb2.LoadOptions) -> ModelOptions:
    return ModelOptions(
        dtype=options.dtype or "auto",
        quantization=_json_object(options.quantization_config_json, "quantization_config"),
        quantize_experts=options.quantize_experts or (False if options.without_quantized_experts else None),
        requantize=options.requantize,
        dequantize=options.dequantize,
        attn_implementation=options.attn_implementation or None,
        config=_json_object(options.config_json, "config"),
        config_overrides=_json_object(options.config_overrides_json, "config_overrides"),
    )


def plan_options(options: registry_pb2.LoadOptions) -> PlanOptions:
    return PlanOptions(
        device_map=options.device_map or "auto",
        by_module=dict(options.device_map_by_module) or None,
        max_memory=dict(options.max_memory) or None,
        num_stages=options.num_stages,
        reserve_tokens=options.reserve_tokens,
    )


def given_speeds(options: registry_pb2.LoadOptions, known: Speeds | None = None) -> Speeds:
    """`known`, or what the request gives in its place. Raises InvalidRequestError."""
    known = known or Speeds()
    if not options.link_speed:
        return known
    return replace(known, link=parse_rate(options.link_speed), is_measured=False)


def transfer_options(options: registry_pb2.LoadOptions) -> TransferOptions:
    """Raises InvalidRequestError for a budget or a number of connections that makes no sense."""
    defaults = TransferOptions()
    budget_bytes = parse_size(options.staging_budget) if options.staging_budget else defaults.budget_bytes
    if budget_bytes < _LEAST_BUDGET_BYTES:
        raise InvalidRequestError(
            f"staging_budget {options.staging_budget!r} is {budget_bytes} bytes: at least {_LEAST_BUDGET_BYTES} are "
            "needed to fetch anything at speed"
        )
    connections = options.connections or defaults.connections
    if connections > _MOST_CONNECTIONS:
        raise InvalidRequestError(f"connections={connections}, but at most {_MOST_CONNECTIONS} a worker are opened")
    return TransferOptions(
        budget_bytes=budget_bytes,
        connections=connections,
        use_cache=not options.without_cache,
        trace=options.trace,
    )


def serving_options(options: registry_pb2.LoadOptions) -> ServingOptions:
    """Raises InvalidRequestError for an idle time that makes no sense."""
    defaults = ServingOptions()
    idle_timeout_s = options.idle_timeout_s or defaults.idle_timeout_s
    if not 0 < idle_timeout_s <= MOST_IDLE_S:
        raise InvalidRequestError(f"idle_timeout_s={idle_timeout_s:g}: write more than 0, and {MOST_IDLE_S} at most")
    return ServingOptions(
        max_sessions=options.max_sessions or defaults.max_sessions,
        max_waiting=options.max_waiting or defaults.max_waiting,
        idle_timeout_s=idle_timeout_s,
        use_batches=not options.without_batching,
    )


def model_name(name: str, path: str) -> str:
    """The name in the registry: the one given, checked, or one made from the path. Raises InvalidRequestError."""
    if is_url(path):
        path = parse_url(path).text  # first of all: it refuses a URL with a password in it, which no message may quote
    if name:
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"{name[:80]!r} can't be a model's name: use up to 63 letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit"
            )
        return name
    derived = re.sub(r"[^A-Za-z0-9._-]+", "-", path.rstrip("/").rsplit("/", 1)[-1]).strip("-._")[:63]
    if not derived:
        raise InvalidRequestError(f"no name can be made from path {path!r}: give one")
    return derived


def _json_object(text: str, name: str) -> dict[str, Any] | None:
    """The object that `text` is; None for none or an empty one. Raises InvalidRequestError."""
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not JSON: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise InvalidRequestError(f"{name} is a JSON {type(value).__name__}, not an object")
    return value or None
