"""What a checkpoint's tensors become in the model, and what that weighs: config + records → outline.

Runs transformers on the meta device: it is the definition of the model, of the names and of what is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..proto.v1.errors import InvalidRequestError, TensorMismatchError, UnsupportedModelError
from ..worker.anatomy import Cut, place_of
from ..worker.records import DTYPES, TensorRecord
from ..worker.skeleton import KeyMap, ParameterInfo, Skeleton, build_skeleton, parse_config, unmatched_keys
from ..worker.tensors import dtype_by_name, dtype_name
from .plan import ModelOutline
from .sizes import ITEM_BYTES, Item, Storage, parameter_bytes, sum_up

_MODEL_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An outline for the planner, and which parameter each of the checkpoint's keys goes to."""

    outline: ModelOutline
    targets: Mapping[str, str]
    anatomy: Any

    def records_of(self, cut: Cut, records: Mapping[str, TensorRecord]) -> tuple[TensorRecord, ...]:
        """The records that a stage needs."""
        return tuple(
            records[key]
            for key, target in self.targets.items()
            if place_of(target, self.anatomy).held_by(cut, tied=self.outline.tied)
        )


def resolve_dtype(dtype: str, config: Mapping[str, Any], records: Mapping[str, TensorRecord]) -> str:
    """A torch dtype's name for "auto": the config's, else that of the first floating tensor, as transformers does."""
    if dtype not in ("", "auto"):
        return _model_dtype(dtype)
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        return _model_dtype(named)
    for key in sorted(records):
        name = DTYPES[records[key].dtype][0]
        if "float" in name and not name.startswith("float8"):
            return name
    return "float32"


def _model_dtype(text: str) -> str:
    name = dtype_name(dtype_by_name(text.removeprefix("torch.")))
    if name not in _MODEL_DTYPES:
        raise InvalidRequestError(f"a model can't be loaded as {name}: take one of {', '.join(_MODEL_DTYPES)}")
    return name


def lay_out(
    config: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    *,
    dtype: str,
    quantization: Mapping[str, Any] | None,
    attn_implementation: str | None,
) -> Layout:
    """Raises UnsupportedModelError, InvalidRequestError, and TensorMismatchError for tensors that the model lacks,
    has too many, or wants in another shape."""
    if config.get("quantization_config"):
        method = (config["quantization_config"] or {}).get("quant_method", "an unknown method")
        raise UnsupportedModelError(
            f"the checkpoint is already quantized with {method}, which can't be loaded yet: "
            "load one in 16 or 32 bits, and let it be quantized here"
        )
    parsed = parse_config(config)
    skeleton = build_skeleton(
        parsed, dtype=dtype_by_name(dtype), quantization=quantization, attn_implementation=attn_implementation
    )
    targets = _match(skeleton, records)
    fetch: dict[str, int] = {}
    for key, target in targets.items():
        fetch[target] = fetch.get(target, 0) + records[key].size_bytes
    anatomy = skeleton.anatomy
    items = [
        Item(
            name=info.name,
            place=place_of(info.name, anatomy),
            resident_bytes=parameter_bytes(info.shape, _storage(info, skeleton)),
            fetch_bytes=fetch.get(info.name, 0),
        )
        for info in skeleton.parameters()
    ]
    known = {item.name for item in items}
    # A tied weight that the file holds all the same is fetched, compared with the other, and then shared.
    items += [
        Item(name=name, place=place_of(name, anatomy), resident_bytes=0, fetch_bytes=size)
        for name, size in fetch.items()
        if name not in known
    ]
    itemsize = ITEM_BYTES[dtype_name(skeleton.dtype)]
    outline = ModelOutline(
        sizes=sum_up(
            items,
            skeleton.num_layers,
            tied=skeleton.head_is_tied,
            kv_bytes_per_token=tuple(elements * itemsize for elements in skeleton.kv_elements_per_token()),
        ),
        modules=tuple((name, place_of(name, anatomy)) for name in skeleton.module_names()),
        tied=skeleton.head_is_tied,
        quantization=describe_quantization(quantization),
        dtype=dtype_name(skeleton.dtype),
    )
    return Layout(outline=outline, targets=targets, anatomy=anatomy)


def describe_quantization(quantization: Mapping[str, Any] | None) -> str:
    """ "nf4", "nf4+double", "int8" or "none"."""
    if not quantization:
        return "none"
    if quantization.get("load_in_8bit"):
        return "int8"
    kind = str(quantization.get("bnb_4bit_quant_type", "fp4"))
    return f"{kind}+double" if quantization.get("bnb_4bit_use_double_quant") else kind


def _storage(info: ParameterInfo, skeleton: Skeleton) -> Storage:
    if info.quantized == "4bit":
        config = skeleton.quantizer.quantization_config
        return Storage(
            kind="4bit",
            double=bool(config.bnb_4bit_use_double_quant),
            quant_storage=dtype_name(config.bnb_4bit_quant_storage),
        )
    if info.quantized == "8bit":
        return Storage(kind="8bit")
    return Storage(kind="plain", dtype=info.dtype)


def _match(skeleton: Skeleton, records: Mapping[str, TensorRecord]) -> dict[str, str]:
    """Checkpoint key -> parameter, for each key that the model uses."""
    key_map = KeyMap(skeleton)
    targets: dict[str, str] = {}
    unexpected: set[str] = set()
    misshapen: list[str] = []
    shapes = {info.name: info.checkpoint_shape for info in skeleton.parameters()}
    shapes |= {name: shapes[source] for name, source in skeleton.tied_weights.items() if source in shapes}
    for key, record in records.items():
        target, pattern = key_map(key)
        if target not in key_map:
            unexpected.add(key)
            continue
        targets[key] = target
        if pattern is None and record.shape != shapes[target]:
            misshapen.append(f"tensor {key} has shape {list(record.shape)}, the model needs {list(shapes[target])}")
    missing, unexpected = unmatched_keys(skeleton, set(targets.values()), unexpected)
    if missing:
        raise TensorMismatchError(f"the checkpoint has no tensor for {_some(missing)}")
    if unexpected:
        raise TensorMismatchError(f"the model has no place for tensor {_some(unexpected)}")
    if misshapen:
        raise TensorMismatchError(_some(set(misshapen)))
    return targets


def _some(names: set[str]) -> str:
    first = min(names)
    return f"{first} (and {len(names) - 1} more)" if len(names) > 1 else first
