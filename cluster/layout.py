"""What a checkpoint's tensors become in the model, and what that weighs: config + records → outline.

Runs transformers on the meta device: it is the definition of the model, of the names and of what is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..proto.v1.errors import InvalidRequestError, TensorMismatchError, UnsupportedModelError
from ..worker.anatomy import TEXT_PARTS, Anatomy, Cut, place_of
from ..worker.quantization import describe_quantization
from ..worker.records import DTYPES, TensorRecord
from ..worker.remote_code import ModelCode
from ..worker.skeleton import KeyMap, ParameterInfo, Skeleton, build_skeleton, parse_config, unmatched_keys
from ..worker.tensors import dtype_by_name, dtype_name
from .plan import ModelOutline
from .sizes import ITEM_BYTES, Item, ModelSizes, Storage, in_4bit, parameter_bytes, sum_up

_CHUNK_TOKENS = 512  # of a prompt, at a time
# Less is lost in what an allocator rounds up to: a small model may fill its device to the last byte.
_LEAST_WORKSPACE_BYTES = 16 << 20
_MODEL_DTYPES = ("bfloat16", "float16", "float32", "float64")
_UNLISTED = (
    "model type {!r} isn't one of the families that shardlift is tested with; a small model of this config, cut into "
    "stages, gave transformers' own logits to the bit"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An outline for the planner, and which parameter each of the checkpoint's keys goes to.

    is_unlisted: the anatomy is not one of `worker.anatomy.FAMILIES`: workers must be told.
    """

    outline: ModelOutline
    targets: Mapping[str, str]
    anatomy: Anatomy
    is_unlisted: bool = False

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
    quantize_experts: bool = False,
    anatomy: Anatomy | None = None,
    code: ModelCode | None = None,
) -> Layout:
    """anatomy: of a family that isn't listed, as a self-check has found it. code: the checkpoint's own.

    Raises UnsupportedModelError, InvalidRequestError, and TensorMismatchError for tensors that the model lacks, has too
    many, or wants in another shape.
    """
    if config.get("quantization_config"):
        method = (config["quantization_config"] or {}).get("quant_method", "an unknown method")
        raise UnsupportedModelError(
            f"the checkpoint is already quantized with {method}, which can't be loaded yet: "
            "load one in 16 or 32 bits, and let it be quantized here"
        )
    parsed = parse_config(config, code)
    skeleton = build_skeleton(
        parsed,
        dtype=dtype_by_name(dtype),
        quantization=quantization,
        attn_implementation=attn_implementation,
        quantize_experts=quantize_experts,
        anatomy=anatomy,
        code=code,
    )
    infos = list(skeleton.parameters())
    if part := TEXT_PARTS.get(str(config.get("model_type"))):
        records = {key: record for key, record in records.items() if not key.startswith(part.others)}
    targets = _match(skeleton, infos, records)
    fetch: dict[str, int] = {}
    for key, target in targets.items():
        fetch[target] = fetch.get(target, 0) + records[key].size_bytes
    items = [
        Item(
            name=info.name,
            place=place_of(info.name, skeleton.anatomy),
            resident_bytes=parameter_bytes(info.shape, _storage(info, skeleton)),
            fetch_bytes=fetch.get(info.name, 0),
            packed_shape=info.shape if _could_be_4bit(info, skeleton.anatomy) else None,
        )
        for info in infos
    ]
    workspace_bytes = _workspace_bytes(skeleton, infos)
    known = {item.name for item in items}
    # A tied weight that the file holds all the same is fetched, compared with the other, and then shared.
    items += [
        Item(name=name, place=place_of(name, skeleton.anatomy), resident_bytes=0, fetch_bytes=size)
        for name, size in fetch.items()
        if name not in known
    ]
    itemsize = ITEM_BYTES[dtype_name(skeleton.dtype)]

    def summed(parts: list[Item]) -> ModelSizes:
        return sum_up(
            parts,
            skeleton.num_layers,
            tied=skeleton.head_is_tied,
            kv_bytes_per_token=tuple(elements * itemsize for elements in skeleton.kv_elements_per_token()),
            workspace_bytes=workspace_bytes,
        )

    outline = ModelOutline(
        sizes=summed(items),
        lighter=tuple((option, summed(in_4bit(items, double=double))) for option, double in _lighter(quantization)),
        modules=tuple((name, place_of(name, skeleton.anatomy)) for name in skeleton.module_names()),
        tied=skeleton.head_is_tied,
        quantization=describe_quantization(quantization),
        dtype=dtype_name(skeleton.dtype),
        notes=() if anatomy is None else (_UNLISTED.format(skeleton.model.config.model_type),),
    )
    return Layout(outline=outline, targets=targets, anatomy=skeleton.anatomy, is_unlisted=anatomy is not None)


def _could_be_4bit(info: ParameterInfo, anatomy: Anatomy) -> bool:
    """Whether 4-bit quantization packs it, or would: the layers' matrices, as transformers chooses them by default."""
    if info.quantized:
        return info.quantized == "4bit"
    is_matrix = len(info.shape) == 2 and info.name.endswith(".weight")
    return is_matrix and place_of(info.name, anatomy).part == "layer"


def _lighter(quantization: Mapping[str, Any] | None) -> list[tuple[str, bool]]:
    """What a user could write to make the model lighter than it is, and whether that is double quantization."""
    if not quantization:
        return [("load_in_4bit=True", False), ("load_in_4bit=True, bnb_4bit_use_double_quant=True", True)]
    if quantization.get("load_in_4bit") and not quantization.get("bnb_4bit_use_double_quant"):
        return [("bnb_4bit_use_double_quant=True", True)]
    return []


def _workspace_bytes(skeleton: Skeleton, infos: Sequence[ParameterInfo]) -> int:
    """What a stage needs while it computes: activations of one chunk of a prompt, one row's states, and, for a chunk,
    the largest 4-bit weight as it is multiplied with, since bitsandbytes unpacks it whole."""
    config = skeleton.model.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    inner = max(getattr(config, "intermediate_size", None) or 0, getattr(config, "n_inner", None) or 0, 4 * hidden)
    item = ITEM_BYTES[dtype_name(skeleton.dtype)]
    # The residual stream, queries, keys and values, and both halves of a gated inner layer.
    workspace = _CHUNK_TOKENS * (4 * hidden + 2 * inner) * item + sum(skeleton.state_bytes_per_row())
    packed = [prod(info.shape) for info in infos if info.quantized == "4bit"]
    if packed:
        compute_dtype = skeleton.quantizer.quantization_config.bnb_4bit_compute_dtype
        workspace += max(packed) * ITEM_BYTES[dtype_name(compute_dtype)]
    return workspace if workspace >= _LEAST_WORKSPACE_BYTES else 0


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


def _match(skeleton: Skeleton, infos: Sequence[ParameterInfo], records: Mapping[str, TensorRecord]) -> dict[str, str]:
    """Checkpoint key -> parameter, for each key that the model uses."""
    key_map = KeyMap(skeleton)
    targets: dict[str, str] = {}
    unexpected: set[str] = set()
    misshapen: list[str] = []
    shapes = {info.name: info.checkpoint_shape for info in infos}
    shapes |= {name: shapes[source] for name, source in skeleton.tied_weights.items() if source in shapes}
    for key, record in records.items():
        target, pattern = key_map(key)
        if target not in key_map:
            if skeleton.is_separate(target):
                raise InvalidRequestError(
                    f"tensor {key} holds the experts of a layer in one, which can't be quantized by experts: "
                    "leave quantize_experts out"
                )
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
