"""From where an adapter is to what its workers are told: its config, its tensors, and where on the model they go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidRequestError,
    ShardliftError,
    UnsupportedModelError,
)
from ..worker.adapter_spec import AdapterSpec
from ..worker.adapters import AdapterOutline, check_adapter_config, check_peft, outline_adapter
from ..worker.anatomy import Anatomy, Cut
from ..worker.code_spec import CodeSpec
from ..worker.packed import BITSANDBYTES, quantization_method
from ..worker.records import HubToken, SourceSpec
from ..worker.remote_code import import_code
from ..worker.skeleton import build_skeleton, parse_config
from ..worker.sources import Source, open_source
from ..worker.tensors import dtype_by_name
from . import requests
from .checkpoint import exists, read_headers, read_json, resolve_source
from .layout import attention_to_plan_with
from .own_forms import can_keep
from .planning import OutlinedModel, outline_model

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What an adapter is called whose user doesn't say, as in transformers.
DEFAULT_NAME = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlinedAdapter:
    """An adapter as the workers are told of it, and what it weighs where."""

    spec: AdapterSpec
    outline: AdapterOutline


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What an adapter is injected into: a model's config as a JSON object, how it is loaded, and from where.

    anatomy, code: as in StageSpec.
    """

    config: Mapping[str, Any]
    dtype: str
    attn_implementation: str | None
    quantize_experts: bool
    source: SourceSpec
    anatomy: Anatomy | None = None
    code: CodeSpec | None = None


def outline(name: str, source: registry_pb2.ModelSource, token: HubToken, base: BaseModel) -> OutlinedAdapter:
    """Reads the adapter's config and headers, and has peft find its targets on the whole model.

    Raises the errors of sources and headers; UnsupportedModelError for a kind that stages can't have, or without peft;
    InvalidRequestError and TensorMismatchError where it doesn't go with the model.
    """
    if (method := quantization_method(base.config)) not in ("", BITSANDBYTES):
        raise UnsupportedModelError(
            f"the model's weights stay packed with {method}, and adapters can't be put on those: load it with "
            "dequantize=True (--dequantize)"
        )
    spec = resolve_source(requests.checkpoint_request(source), token)
    reader = open_source(spec, token)
    try:
        config = _read_config(reader, source.path)
        kind = check_adapter_config(config, source.path)
        check_peft()
        if not exists(reader, WEIGHTS_FILE):
            if exists(reader, "adapter_model.bin"):
                raise UnsupportedModelError(
                    f"{source.path} has only adapter_model.bin, which can't be read by range: save it once with "
                    "PeftModel.save_pretrained(folder)"
                )
            raise CheckpointNotFoundError(f"{source.path} has an {CONFIG_FILE}, but no {WEIGHTS_FILE}")
        records, versions = read_headers(reader, [WEIGHTS_FILE])
    finally:
        reader.close()
    code = None if base.code is None else import_code(base.code, base.source, token)
    # Not quantized: that changes no name and no shape of what peft adds.
    skeleton = build_skeleton(
        parse_config(base.config, code),
        dtype=dtype_by_name(base.dtype),
        attn_implementation=attention_to_plan_with(base.attn_implementation),
        anatomy=base.anatomy,
        code=code,
    )
    found = outline_adapter(skeleton, name, config, list(records.values()), source.path)
    if found.parameters and base.quantize_experts:
        raise UnsupportedModelError(
            f"{source.path} is an adapter of experts, which this model holds in 4 bits, one by one: load it with "
            "quantize_experts=False (--no-quantize-experts), which leaves experts in 16 bits"
        )
    return OutlinedAdapter(
        spec=AdapterSpec(
            name=name,
            path=spec.location if spec.kind == "url" else source.path,
            kind=kind,
            config=config,
            patterns=found.patterns,
            modules=found.modules,
            parameters=found.parameters,
            saved=found.saved,
            source=spec,
            records=tuple(records.values()),
            versions=versions,
            tied=found.tied,
        ),
        outline=found,
    )


def cuts_of(plan: registry_pb2.Plan) -> list[Cut]:
    """The stages' layers."""
    layers = plan.stages[-1].last_layer + 1
    return [Cut(first=stage.first_layer, end=stage.last_layer + 1, num_layers=layers) for stage in plan.stages]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlinedPath:
    """What a path to load comes to: a model, and the adapter that it is loaded by, where it is one's path.

    base, adapter_source: where they are. adapter: attached once the model is resident.
    """

    model: OutlinedModel
    base: registry_pb2.ModelSource
    adapter: OutlinedAdapter | None
    adapter_source: registry_pb2.ModelSource | None


def outline_path(source: registry_pb2.ModelSource, options: registry_pb2.LoadOptions) -> OutlinedPath:
    """Reads configs and headers, of an adapter too, where `source` names one.

    Raises whatever of shardlift's errors stands against either.
    """

    def of_model(base: registry_pb2.ModelSource) -> OutlinedModel:
        return outline_model(
            requests.checkpoint_request(base),
            requests.access_token(base),
            requests.model_options(options),
            can_keep(options),
        )

    elsewhere = options.adapter if options.HasField("adapter") else None
    parts = Split(base=source, adapter=None)
    if elsewhere is not None or Path(source.path, source.subfolder, CONFIG_FILE).is_file():
        parts = split(source, elsewhere)
    try:
        model = of_model(parts.base)
    except (CheckpointNotFoundError, UnsupportedModelError) as error:
        parts = _split_or_raise(source, parts, error)
        model = of_model(parts.base)
    adapter = None
    if parts.adapter is not None:
        base = BaseModel(
            config=model.config,
            dtype=model.layout.outline.dtype,
            attn_implementation=model.options.attn_implementation,
            quantize_experts=model.layout.quantize_experts,
            source=model.checkpoint.source,
            anatomy=model.layout.anatomy,
            code=model.code,
        )
        adapter = outline(DEFAULT_NAME, parts.adapter, requests.access_token(parts.adapter), base)
    return OutlinedPath(model=model, base=parts.base, adapter=adapter, adapter_source=parts.adapter)


def _split_or_raise(source: registry_pb2.ModelSource, parts: Split, error: CheckpointError) -> Split:
    """What there is no model at may be an adapter; if it isn't, `error` says what is wrong."""
    if parts.adapter is None:
        try:
            parts = split(source, None)
        except InvalidRequestError:
            raise  # an adapter without a base
        except ShardliftError:
            raise error from None
        if parts.adapter is not None:
            return parts
    raise error


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A path taken apart: the model to load, and the adapter that it is loaded by, where it is one's path."""

    base: registry_pb2.ModelSource
    adapter: registry_pb2.ModelSource | None


def split(source: registry_pb2.ModelSource, elsewhere: registry_pb2.ModelSource | None) -> Split:
    """What `source` means, as transformers' from_pretrained has it: where an adapter is found, the base is what that
    names, unless a local folder holds a whole model beside it.

    elsewhere: `adapter_kwargs`, which say where to look for the adapter instead. Raises InvalidRequestError for an
    adapter that names no base.
    """
    where = registry_pb2.ModelSource()
    where.CopyFrom(source)
    where.variant = ""
    if elsewhere is not None:
        for field in ("revision", "subfolder", "token", "cache_dir"):
            if getattr(elsewhere, field):
                setattr(where, field, getattr(elsewhere, field))
    # What has become of it in the meantime is resolved again with the checkpoint: one commit for the adapter, one for
    # the base.
    token = requests.access_token(where)
    resolved = resolve_source(requests.checkpoint_request(where), token)
    reader = open_source(resolved, token)
    try:
        if not exists(reader, CONFIG_FILE):
            if elsewhere is not None:
                raise CheckpointNotFoundError(
                    f"{source.path} has no {CONFIG_FILE} where adapter_kwargs say: leave them out, or correct them"
                )
            return Split(base=source, adapter=None)
        if resolved.kind == "hub":
            where.revision = resolved.commit
        if resolved.kind == "folder" and Path(resolved.location, source.subfolder, "config.json").exists():
            return Split(base=source, adapter=where)
        config = _read_config(reader, source.path)
    finally:
        reader.close()
    base = registry_pb2.ModelSource()
    base.CopyFrom(source)
    base.path = _base_path(config, resolved, source.path)
    own = str(config.get("revision") or "")
    # The revision and the subfolder that were given are the adapter's, unless adapter_kwargs have others for it.
    base.revision = own or (source.revision if elsewhere is not None and elsewhere.revision else "")
    base.subfolder = source.subfolder if elsewhere is not None and elsewhere.subfolder else ""
    return Split(base=base, adapter=where)


def _base_path(config: Mapping[str, Any], adapter: SourceSpec, path: str) -> str:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise InvalidRequestError(
            f"{path} is an adapter whose {CONFIG_FILE} names no base model: load the base, and then "
            "model.load_adapter(path)"
        )
    if adapter.kind == "folder":
        beside = Path(adapter.location, adapter.subfolder, base)
        if not Path(base).is_absolute() and beside.is_dir():
            return str(beside.resolve())
    return base


def _read_config(reader: Source, path: str) -> dict[str, Any]:
    try:
        config = read_json(reader, CONFIG_FILE, required=True)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} is no adapter, it has no {CONFIG_FILE}: {error}") from None
    assert config is not None
    # As a JSON object that goes on to the workers.
    result: dict[str, Any] = json.loads(json.dumps(config))
    return result
