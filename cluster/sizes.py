"""Resident bytes of parameters, as bitsandbytes and torch really store them. Pure.

Source: `bitsandbytes.functional.quantize_4bit`, `quantize_blockwise` and `int8_vectorwise_quant`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

from ..proto.v1.errors import TensorMismatchError
from ..worker.anatomy import Place
from ..worker.records import DTYPES, TensorRecord

BLOCK = 64  # weights that share one absolute maximum
NESTED_BLOCK = 256  # maxima that share one, with double quantization
_FLOAT32 = 4
_CODE_4BIT_BYTES = 16 * _FLOAT32
_CODE_8BIT_BYTES = 256 * _FLOAT32

# torch dtype name -> bytes an element.
ITEM_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a parameter is kept: kind "plain", "4bit" or "8bit".

    dtype: of a plain parameter. double, quant_storage: of a 4-bit one (`bnb_4bit_use_double_quant`,
    `bnb_4bit_quant_storage`).
    """

    kind: str
    dtype: str = ""
    double: bool = False
    quant_storage: str = "uint8"


def parameter_bytes(shape: tuple[int, ...], storage: Storage) -> int:
    """Device bytes of one parameter, statistics included."""
    numel = prod(shape)
    if storage.kind == "plain":
        return numel * ITEM_BYTES[storage.dtype]
    if storage.kind == "8bit":
        # One int8 an element, one float32 scale a row.
        return numel + shape[0] * _FLOAT32
    assert storage.kind == "4bit", storage
    item = ITEM_BYTES[storage.quant_storage]
    packed = ceil(ceil(numel / 2) / item) * item
    blocks = ceil(numel / BLOCK)
    if not storage.double:
        return packed + blocks * _FLOAT32 + _CODE_4BIT_BYTES
    nested = ceil(blocks / NESTED_BLOCK) * _FLOAT32 + _CODE_8BIT_BYTES + _FLOAT32  # maxima, code, offset
    return packed + blocks + nested + _CODE_4BIT_BYTES


def serialized_bytes(name: str, shape: tuple[int, ...], kind: str, stored: Mapping[str, TensorRecord]) -> int:
    """Device bytes of a parameter that the checkpoint holds as bitsandbytes has quantized it: `stored` has "weight" and
    its statistics ("weight.absmax", "SCB", …) by their names there. kind: "4bit" or "8bit".

    Raises TensorMismatchError for statistics that are missing, or for another weight.
    """
    numel = prod(shape)
    texts = [each for each in stored if each.startswith("weight.quant_state.")]
    wanted = {"weight", "SCB"} if kind == "8bit" else {"weight", "weight.absmax", "weight.quant_map"}
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    if nested & stored.keys():
        wanted |= nested
    if missing := sorted(wanted - stored.keys()):
        raise TensorMismatchError(
            f"the checkpoint has no {missing[0]} for {name}, which its config says is quantized: is it one of its "
            "llm_int8_skip_modules?"
        )
    if kind == "4bit" and len(texts) != 1:
        raise TensorMismatchError(f"the checkpoint has {len(texts)} quant_state for {name}, and needs one")
    weight = stored["weight"]
    item = ITEM_BYTES[DTYPES[weight.dtype][0]]
    size = numel if kind == "8bit" else ceil(ceil(numel / 2) / item) * item
    if weight.size_bytes != size or (kind == "8bit" and weight.shape != shape):
        raise TensorMismatchError(
            f"tensor {weight.key} has {weight.size_bytes} bytes, but the model needs {list(shape)} in {kind[0]} bits: "
            f"{size} bytes"
        )
    resident = sum(stored[each].size_bytes for each in wanted)
    return resident + (_FLOAT32 if nested & wanted else 0)  # the nested maxima's offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A parameter or buffer of the model, with the checkpoint bytes that become it (0 for a computed buffer).

    packed_shapes: of one that 4-bit quantization would pack or already packs, so that what it would weigh in another
    form can be told; none for all others. Several of one that holds experts, which are quantized one by one.
    """

    name: str
    place: Place
    resident_bytes: int
    fetch_bytes: int
    packed_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What the parts of a model weigh, in bytes: resident and fetched.

    first, last: what the first and the last stage hold beside their layers; a tied embedding is in both (once where
    they are one stage, see `tied`). shared: what every stage holds. kv_bytes_per_token: of each layer.

    workspace_bytes: what each stage needs beside all that is resident: activations and dequantized scratch.
    cuts: for each layer whether a stage may begin with it (the first entry says nothing); None where all may.
    """

    layers: tuple[tuple[int, int], ...]
    first: tuple[int, int]
    last: tuple[int, int]
    tied: tuple[int, int]
    shared: tuple[int, int]
    kv_bytes_per_token: tuple[int, ...]
    workspace_bytes: int = 0
    cuts: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.kv_bytes_per_token) == len(self.layers) > 0, (self.layers, self.kv_bytes_per_token)
        assert self.cuts is None or len(self.cuts) == len(self.layers), self.cuts
        # The partition counts on a stage never becoming heavier when it gives layers away.
        assert 0 <= self.tied[0] <= self.first[0], (self.tied, self.first)

    def may_begin(self, layer: int) -> bool:
        """Whether a stage may begin with this layer."""
        return layer == 0 or self.cuts is None or self.cuts[layer]

    def from_layer(self, layer: int) -> ModelSizes:
        """What is left of the model when a stage has taken the layers before this one, of which there is at least one.

        The rest's first stage is none of the model's: nothing stands before its layers.
        """
        assert 0 < layer < len(self.layers), layer
        return replace(
            self,
            layers=self.layers[layer:],
            first=(0, 0),
            last=(self.last[0] + self.tied[0], self.last[1] + self.tied[1]),
            tied=(0, 0),
            kv_bytes_per_token=self.kv_bytes_per_token[layer:],
            cuts=self.cuts and self.cuts[layer:],
        )

    def stage(self, first: int, end: int) -> tuple[int, int]:
        """Resident and fetched bytes of a stage of layers `[first, end)`."""
        parts = [*self.layers[first:end], self.shared]
        if first == 0:
            parts.append(self.first)
        if end == len(self.layers):
            parts.append(self.last)
            if first != 0:
                parts.append(self.tied)
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    def kv_bytes(self, first: int, end: int, tokens: int) -> int:
        """Bytes of keys and values that layers `[first, end)` keep for so many tokens."""
        return sum(self.kv_bytes_per_token[first:end]) * tokens


def sum_up(
    items: Iterable[Item],
    num_layers: int,
    *,
    tied: bool,
    kv_bytes_per_token: tuple[int, ...],
    workspace_bytes: int = 0,
    cuts: tuple[bool, ...] | None = None,
) -> ModelSizes:
    """Adds `items` up by place. `tied`: the head's weight is the embedding's, so the last stage needs that too."""
    layers = [[0, 0] for _ in range(num_layers)]
    parts = {part: [0, 0] for part in ("embedding", "before", "after", "shared")}
    for item in items:
        target = layers[item.place.layer] if item.place.part == "layer" else parts[item.place.part]
        target[0] += item.resident_bytes
        target[1] += item.fetch_bytes
    embedding, before = parts["embedding"], parts["before"]
    return ModelSizes(
        layers=tuple((resident, fetch) for resident, fetch in layers),
        first=(embedding[0] + before[0], embedding[1] + before[1]),
        last=(parts["after"][0], parts["after"][1]),
        tied=(embedding[0], embedding[1]) if tied else (0, 0),
        shared=(parts["shared"][0], parts["shared"][1]),
        kv_bytes_per_token=kv_bytes_per_token,
        workspace_bytes=workspace_bytes,
        cuts=cuts,
    )


def in_4bit(items: Iterable[Item], *, double: bool) -> list[Item]:
    """`items` with each one that 4 bits can pack in 4 bits; `double` as `bnb_4bit_use_double_quant`."""
    storage = Storage(kind="4bit", double=double)
    return [
        replace(item, resident_bytes=sum(parameter_bytes(shape, storage) for shape in item.packed_shapes))
        if item.packed_shapes
        else item
        for item in items
    ]
