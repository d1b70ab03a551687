"""What a checkpoint's tensors become in the model, and what that weighs: config + records → outline.

Runs transformers on the meta device: it is the definition of the model, of the names and of what is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..proto.v1.errors import InvalidRequestError, TensorMismatchError
from ..worker.anatomy import TEXT_PARTS, Anatomy, Cut, place_of
from ..worker.compressed_config import ROUNDING
from ..worker.experts import by_expert
from ..worker.packed import COMPRESSED, Packing, StoredTensor, stored_tensors
from ..worker.quantization import describe_quantization
from ..worker.records import DTYPES, TensorRecord
from ..worker.remote_code import ModelCode
from ..worker.skeleton import (
    KeyMap,
    ParameterInfo,
    Skeleton,
    build_skeleton,
    parse_config,
    separable_experts,
    unmatched_keys,
)
from ..worker.tensors import dtype_by_name, dtype_name
from ..worker.unpack import check_package
from ..worker.workspace import CHUNK_TOKENS, LEAST_BYTES, activation_bytes, inner_size
from .plan import ModelOutline
from .sizes import ITEM_BYTES, Item, ModelSizes, Storage, in_4bit, parameter_bytes, serialized_bytes, sum_up

_MODEL_DTYPES = ("bfloat16", "float16", "float32", "float64")
_FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")
_UNLISTED = (
    "model type {!r} isn't one of the families that shardlift is tested with; a small model of this config, cut into "
    "stages, gave transformers' own logits to the bit"
)
_LEFT_OUT = "the model has no place for these tensors of the checkpoint, which are not fetched: {}"
_MOST_NAMED = 5
# Beside a weight they say that it is quantized, or packed: bitsandbytes', FP8's, GPTQ's and AWQ's.
_STATISTICS = re.compile(
    r"(.+)\.(?:SCB|weight_format|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)"
    r"|weight_scale(?:_inv)?|scales|qzeros|g_idx)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An outline for the planner, and which parameter each of the checkpoint's tensors goes to.

    targets: key of a tensor, unpacked -> parameter. stored: what it is made of. quantize_experts: whether experts are
    held one by one, quantized. is_unlisted: the anatomy is not one of `worker.anatomy.FAMILIES`: workers must be told.
    """

    outline: ModelOutline
    targets: Mapping[str, str]
    stored: Mapping[str, StoredTensor]
    anatomy: Anatomy
    quantize_experts: bool = False
    is_unlisted: bool = False

    def records_of(self, cut: Cut, records: Mapping[str, TensorRecord]) -> tuple[TensorRecord, ...]:
        """The records that a stage needs."""
        return tuple(
            records[part.key]
            for key, target in self.targets.items()
            if place_of(target, self.anatomy).held_by(cut, tied=self.outline.tied)
            for part in self.stored[key].parts.values()
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


def attention_to_plan_with(attn_implementation: str | None) -> str | None:
    """FlashAttention changes no tensor's name or size, and where plans are made, on a head without a GPU, it is not
    installed: whether a worker has it, that says when it builds the model."""
    return None if attn_implementation in _FLASH_ATTENTION else attn_implementation


def lay_out(
    config: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    *,
    dtype: str,
    quantization: Mapping[str, Any] | None,
    attn_implementation: str | None,
    quantize_experts: bool | None = False,
    packing: Packing | None = None,
    anatomy: Anatomy | None = None,
    code: ModelCode | None = None,
    keep_packing: bool = False,
) -> Layout:
    """`config`, `quantization` and `packing` as `quantized.settle` leaves them. quantize_experts: None for a mixture's
    experts in 4 bits wherever the model is quantized to 4 bits and they can be. anatomy: of a family that isn't listed,
    as a self-check has found it. code: the checkpoint's own. keep_packing: packed weights stay as they are, in the
    modules of transformers' quantizer.

    Tensors that the model has no place for stay where they are, and a note names them, as transformers does. Raises
    UnsupportedModelError, InvalidRequestError, and TensorMismatchError for tensors that are missing, misshapen, or say
    that another is not what it seems.
    """
    parsed = parse_config(config, code)
    if part := TEXT_PARTS.get(str(config.get("model_type"))):
        records = {key: record for key, record in records.items() if not key.startswith(part.others)}
    check_package(packing)
    stored = stored_tensors(records, packing)

    def build(*, experts: bool) -> tuple[Skeleton, KeyMap]:
        skeleton = build_skeleton(
            parsed,
            dtype=dtype_by_name(dtype),
            quantization=quantization,
            attn_implementation=attention_to_plan_with(attn_implementation),
            quantize_experts=experts,
            anatomy=anatomy,
            code=code,
            keep_packing=keep_packing,
            rounding=None if packing is None else packing.rounding,
        )
        return skeleton, KeyMap(skeleton)

    is_default = quantize_experts is None and bool((quantization or {}).get("load_in_4bit"))
    skeleton, key_map = build(experts=quantize_experts or is_default)
    if skeleton.is_prequantized and _has_quantized_experts(skeleton, key_map, stored):
        skeleton, key_map = build(experts=True)
    elif skeleton.separate and (key := _all_in_one(skeleton, key_map, stored)) is not None:
        if not is_default:
            raise InvalidRequestError(
                f"tensor {key} holds the experts of a layer in one, which can't be quantized by experts: "
                "leave quantize_experts out"
            )
        skeleton, key_map = build(experts=False)
    infos = list(skeleton.parameters())
    targets, unexpected = _match(skeleton, key_map, infos, stored)
    if packing is not None and packing.method == COMPRESSED:
        # Scales by which activations are not rounded: experts', or all of them.
        unexpected = {key for key in unexpected if key.rpartition(".")[2] not in ROUNDING}
    fetch: dict[str, int] = {}
    for key, target in targets.items():
        fetch[target] = fetch.get(target, 0) + stored[key].size_bytes
    serialized = _serialized(skeleton, key_map, targets, records)
    separable = frozenset() if quantize_experts is False else _separable(skeleton, key_map, stored)

    def resident_bytes(info: ParameterInfo) -> int:
        if skeleton.is_prequantized and info.quantized:
            return serialized_bytes(info.name, info.shape, info.quantized, serialized.get(info.name, {}))
        if keep_packing and info.name in fetch and "float" not in info.dtype:
            return fetch[info.name]  # transformers casts no integers
        return parameter_bytes(info.shape, _storage(info, skeleton))

    items = [
        Item(
            name=info.name,
            place=place_of(info.name, skeleton.anatomy),
            resident_bytes=resident_bytes(info),
            fetch_bytes=fetch.get(info.name, 0),
            packed_shapes=_packed_shapes(info, skeleton, separable),
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
        lighter=tuple(
            (option, summed(in_4bit(items, double=double)))
            for option, double in _lighter(quantization, skeleton, packing)
        ),
        modules=tuple((name, place_of(name, skeleton.anatomy)) for name in skeleton.module_names()),
        tied=skeleton.head_is_tied,
        quantization=describe_quantization(skeleton.quantization),
        dtype=dtype_name(skeleton.dtype),
        notes=(
            *([] if anatomy is None else [_UNLISTED.format(skeleton.model.config.model_type)]),
            *(_notes_on_experts(skeleton, infos) if is_default else ()),
            *([_LEFT_OUT.format(_listed(unexpected))] if unexpected else []),
        ),
        is_fixed=skeleton.is_prequantized or keep_packing,
    )
    return Layout(
        outline=outline,
        targets=targets,
        stored=stored,
        anatomy=skeleton.anatomy,
        quantize_experts=bool(skeleton.separate),
        is_unlisted=anatomy is not None,
    )


def _has_quantized_experts(skeleton: Skeleton, key_map: KeyMap, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether bitsandbytes has quantized experts that transformers would merge: transformers before 5 kept them one by
    one, and so did what was saved by it."""
    return any(
        key_map.merges(key_map(f"{key.removesuffix(end)}.weight")[1])
        for end in (".weight.absmax", ".SCB")
        for key in stored
        if key.endswith(end)
    )


def _all_in_one(skeleton: Skeleton, key_map: KeyMap, keys: Iterable[str]) -> str | None:
    """A tensor that holds what the skeleton wants expert by expert."""
    return next((key for key in keys if skeleton.is_separate(key_map(key)[0])), None)


def _serialized(
    skeleton: Skeleton, key_map: KeyMap, targets: Mapping[str, str], records: Mapping[str, TensorRecord]
) -> dict[str, dict[str, TensorRecord]]:
    """Of a checkpoint that bitsandbytes has quantized: parameter -> what belongs to it, by the names that transformers
    collects it under."""
    found: dict[str, dict[str, TensorRecord]] = {}
    if skeleton.is_prequantized:
        for key, target in targets.items():
            found.setdefault(target, {})[str(key_map(key)[1])] = records[key]
    return found


def _notes_on_experts(skeleton: Skeleton, infos: Sequence[ParameterInfo]) -> tuple[str, ...]:
    if skeleton.separate:
        return (
            "the experts of this mixture are quantized to 4 bits, too, each by itself; quantize_experts=False "
            f"(--no-quantize-experts) leaves them in {dtype_name(skeleton.dtype)}, as transformers does",
        )
    if any(len(info.shape) == 3 and ".experts." in info.name for info in infos):
        return (
            f"the experts of this mixture stay in {dtype_name(skeleton.dtype)}, as in transformers: bitsandbytes can't "
            "quantize them as this family, or this checkpoint, has them",
        )
    return ()


def _separable(skeleton: Skeleton, key_map: KeyMap, keys: Iterable[str]) -> frozenset[str]:
    """Modules of experts in 16 bits that `load_in_4bit=True` would quantize one by one: none where any layer's lie in
    the checkpoint in one tensor."""
    if skeleton.quantizer is not None:
        return frozenset()
    separable = separable_experts(skeleton)
    matched = (key_map(key) for key in keys)
    in_one = any(name.rpartition(".")[0] in separable and not key_map.merges(pattern) for name, pattern in matched)
    return frozenset() if in_one else separable


def _packed_shapes(info: ParameterInfo, skeleton: Skeleton, separable: frozenset[str]) -> tuple[tuple[int, ...], ...]:
    """What 4-bit quantization packs of it, or would: the layers' matrices, as transformers chooses them by default, and
    those of their experts."""
    if skeleton.quantizer is not None:
        return (info.shape,) if info.quantized == "4bit" else ()
    if place_of(info.name, skeleton.anatomy).part != "layer":
        return ()
    if info.name.rpartition(".")[0] in separable:
        return tuple(shape for _, shape in by_expert(info.name, info.shape))
    return (info.shape,) if skeleton.is_linear(info.name) else ()


def _lighter(
    quantization: Mapping[str, Any] | None, skeleton: Skeleton, packing: Packing | None
) -> list[tuple[str, bool]]:
    """What a user could write to make the model lighter than it is, and whether that is double quantization."""
    if skeleton.is_prequantized:
        return []
    if skeleton.keeps_packing:
        return []  # the shapes that would be packed anew aren't here
    if not quantization:
        flags = "load_in_4bit=True, requantize=True" if packing else "load_in_4bit=True"
        return [(flags, False), (f"{flags}, bnb_4bit_use_double_quant=True", True)]
    if quantization.get("load_in_4bit") and not quantization.get("bnb_4bit_use_double_quant"):
        return [("bnb_4bit_use_double_quant=True", True)]
    return []


def _workspace_bytes(skeleton: Skeleton, infos: Sequence[ParameterInfo]) -> int:
    """What a stage needs while it computes: activations of one chunk of a prompt, one row's states, and, for a chunk,
    the largest 4-bit weight as it is multiplied with, since bitsandbytes unpacks it whole."""
    config = skeleton.model.config.get_text_config(decoder=True)
    item = ITEM_BYTES[dtype_name(skeleton.dtype)]
    workspace = activation_bytes(CHUNK_TOKENS, config.hidden_size, inner_size(config), item)
    workspace += sum(skeleton.state_bytes_per_row())
    if skeleton.keeps_packing:
        # Kernels for packed weights may unpack one whole, too.
        shapes = [
            (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
            for module in skeleton.model.modules()
        ]
        workspace += max(rows * columns for rows, columns in shapes) * item
    packed = [prod(info.shape) for info in infos if info.quantized == "4bit"]
    if packed:
        compute_dtype = skeleton.quantizer.quantization_config.bnb_4bit_compute_dtype
        workspace += max(packed) * ITEM_BYTES[dtype_name(compute_dtype)]
    # Less is lost in what an allocator rounds up to: a small model may fill its device to the last byte.
    return workspace if workspace >= LEAST_BYTES else 0


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


def _match(
    skeleton: Skeleton, key_map: KeyMap, infos: Sequence[ParameterInfo], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, str], set[str]]:
    """Tensor's key -> parameter, for each that the model uses; and the keys of those that it should know of, and has no
    place for."""
    targets: dict[str, str] = {}
    unexpected: set[str] = set()
    misshapen: list[str] = []
    shapes = {info.name: info.checkpoint_shape for info in infos}
    shapes |= {name: shapes[source] for name, source in skeleton.tied_weights.items() if source in shapes}
    # Packed, and weighed by what belongs to them.
    serialized = {info.name for info in infos if info.quantized} if skeleton.is_prequantized else set()
    for key, tensor in stored.items():
        target, pattern = key_map(key)
        if target not in key_map:
            unexpected.add(key)
            continue
        targets[key] = target
        if target not in serialized and key_map.keeps_shape(pattern) and tensor.shape != shapes[target]:
            misshapen.append(f"tensor {key} has shape {list(tensor.shape)}, the model needs {list(shapes[target])}")
    if packed := [key for key in unexpected if key.endswith(".qweight")]:
        raise TensorMismatchError(
            f"tensor {min(packed)} is packed, but config.json has no quantization_config that says how: put "
            "quantize_config.json's fields there, with their quant_method (gptq or awq)"
        )
    missing, unexpected = unmatched_keys(skeleton, set(targets.values()), unexpected)
    if missing:
        raise TensorMismatchError(f"the checkpoint has no tensor for {_some(missing)}")
    if misshapen:
        raise TensorMismatchError(_some(set(misshapen)))
    # One expert more than there should be is a wrong config, and what transformers merges then has a wrong shape.
    if stray := {key for key in unexpected if _expert_of(key_map(key)[0]) in skeleton.separate}:
        raise TensorMismatchError(f"the model has no place for tensor {_some(stray)}")
    if telling := {key for key in unexpected if (of := _STATISTICS.fullmatch(key)) and f"{of[1]}.weight" in targets}:
        raise TensorMismatchError(
            f"tensor {_some(telling)} belongs to a quantized weight, but config.json has no quantization_config by "
            "which it is one: put the one there that it was quantized with"
        )
    return targets, unexpected


def _expert_of(name: str) -> str:
    """The path of the experts that "path.3.up_proj.weight" would be of."""
    return name.rsplit(".", 3)[0]


def _listed(names: set[str]) -> str:
    """As many as one can read, in their order."""
    first = sorted(names)[:_MOST_NAMED]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + more


def _some(names: set[str]) -> str:
    first = min(names)
    return f"{first} (and {len(names) - 1} more)" if len(names) > 1 else first
