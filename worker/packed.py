"""Weights that a checkpoint holds packed, as several tensors each: which those are, and what they unpack to. Pure.

A packed weight stands for the one tensor that an unquantized checkpoint would have in its place: everything after
(names, merging, quantization to NF4) goes about it as about any other. `worker/unpack.py` does the arithmetic.

Layouts: GPTQ as AutoGPTQ and GPTQModel write it (`qweight` packed along the inputs, `qzeros` along the outputs, zero
points one too small but in "gptq_v2"); AWQ's "gemm" (both along the outputs, in the order 0 2 4 6 1 3 5 7); FP8 with a
scale for each block, as DeepSeek-V3 is published, or for each matrix, as AutoFP8 writes it; MXFP4 as gpt-oss is; and
what compressed-tensors writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..proto.v1.errors import CorruptCheckpointError, TensorMismatchError, UnsupportedModelError
from .compressed_config import bits_of, compressed, rounds_activations
from .records import TensorRecord

AWQ, COMPRESSED, FP8, GPTQ, MXFP4 = "awq", "compressed-tensors", "fp8", "gptq", "mxfp4"
BITSANDBYTES = "bitsandbytes"

_WORD = 32  # bits of the integers that GPTQ and AWQ pack into
_MXFP4_BLOCK = 32  # values that share a scale, two in a byte
_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a zero point
_INTEGERS, _FLOATS = ("I32",), ("F16", "BF16", "F32")

# What else a checkpoint may be quantized with -> the package that transformers reads it with.
_PACKAGES = {
    "aqlm": "aqlm[gpu]",
    "auto-round": "auto-round",
    "bitnet": "bitnet",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fouroversix": "fouroversix",
    "fp_quant": "fp_quant",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "metal": "kernels",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sinq": "sinq",
    "spqr": "spqr_quant[gpu]",
    "torchao": "torchao",
    "vptq": "vptq",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a checkpoint packs its weights.

    method: one of AWQ, COMPRESSED, FP8, GPTQ, MXFP4. zero_offset: GPTQ's, added to each stored zero point. group_size:
    inputs that share a scale, where no `g_idx` says it; 0 where the shapes do. has_order: every weight needs a `g_idx`.
    block: rows and columns that share an FP8 scale; None where the shapes say it. config: compressed-tensors' own,
    whose package reads it. dequantize: of it, too, that weights alone count, as in transformers with
    `CompressedTensorsConfig(dequantize=True)`; else what its first pass makes of them, and activations are rounded.
    """

    method: str
    zero_offset: int = 0
    group_size: int = 0
    has_order: bool = False
    block: tuple[int, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    dequantize: bool = False

    @property
    def rounding(self) -> Mapping[str, Any] | None:
        """The config that says how activations, or cached keys and values, are rounded; None where none are."""
        return self.config if not self.dequantize and rounds_activations(self.config) else None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Packing:
        fields = dict(value)
        fields["block"] = tuple(fields["block"]) if fields["block"] else None
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as the model wants it, with the records that it is made of: itself alone, or a packed weight's parts.

    shape: unpacked. parts: role -> record; the role of a tensor that isn't packed is "".
    """

    key: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorRecord]

    @property
    def is_packed(self) -> bool:
        return "" not in self.parts

    @property
    def size_bytes(self) -> int:
        """In the checkpoint."""
        return sum(record.size_bytes for record in self.parts.values())


def quantization_method(config: Mapping[str, Any]) -> str:
    """What the checkpoint's `quantization_config` says that it is quantized with; "" where it has none."""
    quantization = _quantization(config)
    if not quantization:
        return ""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return BITSANDBYTES
    method = quantization.get("quant_method") or "an unknown method"
    return str(getattr(method, "value", method))


def has_plain_weights(config: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes, which the checkpoint is said to be quantized with, keeps its weights as they are."""
    return bool(_quantization(config).get("llm_int8_has_fp16_weight"))


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(found := place.get("quantization_config"), Mapping) and found:
            return found
    return {}


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """How a checkpoint with this `config.json` packs its weights; None where it doesn't, or bitsandbytes reads it.

    Raises UnsupportedModelError, with what would help, for what nobody here can read.
    """
    method = quantization_method(config)
    if method in ("", BITSANDBYTES):
        return None
    said = _quantization(config)
    if method == GPTQ:
        return _gptq(said)
    if method == AWQ:
        layout = str(said.get("version") or said.get("format") or "gemm").lower()
        if layout != "gemm":
            raise _unsupported(f"{method} in {layout} layout", "gptqmodel", "only gemm can be unpacked here")
        if (bits := said.get("bits", said.get("w_bit", 4))) != 4:
            raise _unsupported(f"{method} in {bits} bits", "gptqmodel", "only 4 bits can be unpacked here")
        return Packing(method=AWQ)
    if method in (FP8, "mxfp8"):
        return Packing(method=FP8, block=_block(said.get("weight_block_size")))
    if method == MXFP4:
        return Packing(method=MXFP4)
    if method == COMPRESSED:
        return Packing(method=COMPRESSED, config=compressed(said))
    raise _unsupported(method, _PACKAGES.get(method, ""))


def _block(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise CorruptCheckpointError(f"config.json has weight_block_size {size!r}: two numbers above 0 are needed")
    return size[0], size[1]


def _gptq(said: Mapping[str, Any]) -> Packing:
    layout = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()
    if layout not in _GPTQ_FORMATS or said.get("is_marlin_format"):
        layout = "marlin" if said.get("is_marlin_format") else layout
        raise _unsupported(f"gptq in {layout} layout", "gptqmodel", "only gptq and gptq_v2 can be unpacked here")
    if (bits := said.get("bits", 4)) not in _GPTQ_BITS:
        raise _unsupported(f"gptq in {bits} bits", "gptqmodel", "2, 3, 4 and 8 can be unpacked here")
    size = said.get("group_size")
    return Packing(
        method=GPTQ,
        zero_offset=_GPTQ_FORMATS[layout],
        group_size=size if isinstance(size, int) and size > 0 else 0,
        has_order=bool(said.get("desc_act")),
    )


def _unsupported(what: str, package: str, detail: str = "") -> UnsupportedModelError:
    reads = f"transformers reads it with `pip install {package}` in one process, and can save it in 16 bits: " * bool(
        package
    )
    return UnsupportedModelError(
        f"the checkpoint is quantized with {what}, which can't be loaded into a cluster"
        f"{f' ({detail})' if detail else ''}: {reads}load a checkpoint in 16 or 32 bits and have it quantized here, or "
        "one of bitsandbytes, GPTQ, AWQ, FP8, MXFP4 or compressed-tensors"
    )


# ---- which tensors belong together -----------------------------------------------------------------------------------


def stored_tensors(records: Mapping[str, TensorRecord], packing: Packing | None) -> dict[str, StoredTensor]:
    """Every tensor of the unpacked checkpoint by its key there, in the order of `records`.

    What only kernels for packed weights need (FP8's scales of activations) is left out. Raises TensorMismatchError for
    a packed weight whose parts don't fit together.
    """
    if packing is None:
        return {key: _plain(record) for key, record in records.items()}
    found: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for key in records:
        packed = _GROUPS[packing.method](key, records, packing)
        if packed is not None:
            found[packed.key] = packed
            used.update(record.key for record in packed.parts.values())
    ignored = {
        f"{stored.key.rpartition('.')[0]}.{name}" for stored in found.values() for name in _FOR_KERNELS[packing.method]
    }
    plain = {key: _plain(record) for key, record in records.items() if key not in used and key not in ignored}
    if both := sorted(plain.keys() & found.keys()):
        raise TensorMismatchError(f"the checkpoint has tensor {both[0]} both packed and unpacked")
    return plain | found


def _plain(record: TensorRecord) -> StoredTensor:
    return StoredTensor(key=record.key, shape=record.shape, parts={"": record})


def _gptq_weight(key: str, records: Mapping[str, TensorRecord], packing: Packing) -> StoredTensor | None:
    stem, dot, name = key.rpartition(".")
    if name != "qweight":
        return None
    parts = {role: _part(records, stem + dot + role, key) for role in ("qweight", "qzeros", "scales")}
    g_idx = records.get(f"{stem}{dot}g_idx")
    if g_idx is not None or packing.has_order:
        parts["g_idx"] = g_idx = _part(records, f"{stem}{dot}g_idx", key)
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    _expect(qweight, 2, _INTEGERS)
    _expect(qzeros, 2, _INTEGERS)
    _expect(scales, 2, _FLOATS)
    groups, outputs = scales.shape
    # By their shapes: single modules may be packed in other bits than the config says.
    bits = qzeros.shape[1] * _WORD // outputs if outputs else 0
    if bits not in _GPTQ_BITS or qzeros.shape != (groups, outputs * bits // _WORD) or qweight.shape[1] != outputs:
        raise _misfit(stem, qweight, qzeros, scales)
    inputs = qweight.shape[0] * _WORD // bits
    if qweight.shape[0] * _WORD % bits or inputs % _WORD:
        raise _misfit(stem, qweight, qzeros, scales)
    if g_idx is not None:
        _expect(g_idx, 1, ("I32", "I64"))
        if g_idx.shape[0] != inputs:
            raise _misfit(stem, qweight, g_idx)
    elif groups != -(-inputs // (packing.group_size or inputs)):
        raise _misfit(stem, qweight, scales)
    return StoredTensor(key=f"{stem}{dot}weight", shape=(outputs, inputs), parts=parts)


def _awq_weight(key: str, records: Mapping[str, TensorRecord], packing: Packing) -> StoredTensor | None:
    stem, dot, name = key.rpartition(".")
    if name != "qweight":
        return None
    parts = {role: _part(records, stem + dot + role, key) for role in ("qweight", "qzeros", "scales")}
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    _expect(qweight, 2, _INTEGERS)
    _expect(qzeros, 2, _INTEGERS)
    _expect(scales, 2, _FLOATS)
    inputs, (groups, outputs) = qweight.shape[0], scales.shape
    fits = qweight.shape[1] * 8 == outputs == qzeros.shape[1] * 8 and qzeros.shape[0] == groups
    if not fits or not groups or inputs % groups:
        raise _misfit(stem, qweight, qzeros, scales)
    return StoredTensor(key=f"{stem}{dot}weight", shape=(outputs, inputs), parts=parts)


def _fp8_weight(key: str, records: Mapping[str, TensorRecord], packing: Packing) -> StoredTensor | None:
    weight = records[key]
    # What a value is multiplied with, by either name: AutoFP8's is the second.
    scale = records.get(f"{key}_scale_inv") or records.get(f"{key}_scale")
    if scale is None:
        return None
    if len(weight.shape) < 2 or weight.dtype not in ("F8_E4M3", "F8_E5M2"):
        raise TensorMismatchError(
            f"tensor {key} has {scale.key} beside it, but is {weight.dtype} {list(weight.shape)}: FP8 matrices have"
        )
    if scale.dtype not in (*_FLOATS, "U8"):
        raise TensorMismatchError(
            f"tensor {scale.key} has dtype {scale.dtype}: scales are floats, or bytes (exponents)"
        )
    fp8_block(weight.shape, scale.shape, packing.block)
    return StoredTensor(key=key, shape=weight.shape, parts={"weight": weight, "scale": scale})


def fp8_block(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a matrix, or of each of several, that share one of the scales in `grid`.

    The last of a row or column of blocks may be a partial one. Raises TensorMismatchError where they don't fit.
    """
    if len(grid) < 2:
        grid = (1, 1) if grid in ((), (1,)) else (*grid, 1)
    rows, columns = shape[-2:]
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == grid[-2:] and grid[:-2] == shape[:-2]:
        return block
    # Scales of whole rows, of the whole matrix, or in blocks that the config doesn't tell.
    if grid[:-2] == shape[:-2] and all(grid[-2:]) and rows % grid[-2] == 0 and columns % grid[-1] == 0:
        return rows // grid[-2], columns // grid[-1]
    raise TensorMismatchError(
        f"scales {list(grid)} don't fit a weight {list(shape)}"
        + (f" in blocks of {block[0]}x{block[1]}" if block else "")
    )


def _mxfp4_weight(key: str, records: Mapping[str, TensorRecord], packing: Packing) -> StoredTensor | None:
    if not key.endswith("_blocks"):
        return None
    name = key.removesuffix("_blocks")
    blocks, scales = records[key], _part(records, f"{name}_scales", key)
    _expect(blocks, 4, ("U8",))
    _expect(scales, 3, ("U8",))
    if blocks.shape[:3] != scales.shape or blocks.shape[3] * 2 != _MXFP4_BLOCK:
        raise _misfit(name, blocks, scales)
    experts, outputs, groups = scales.shape
    # The model computes with its transpose.
    shape = (experts, groups * _MXFP4_BLOCK, outputs)
    return StoredTensor(key=name, shape=shape, parts={"blocks": blocks, "scales": scales})


_COMPRESSED = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_g_idx",
)


def _compressed_weight(key: str, records: Mapping[str, TensorRecord], packing: Packing) -> StoredTensor | None:
    stem, dot, name = key.rpartition(".")
    if name != "weight_scale":
        return None
    parts = {each: records[stem + dot + each] for each in _COMPRESSED if stem + dot + each in records}
    weight = parts.get("weight")
    if weight is not None:
        if weight.dtype in _FLOATS:
            raise UnsupportedModelError(
                f"tensor {weight.key} is {weight.dtype}, with scales beside it: it isn't compressed, and "
                "compressed-tensors would round it at each pass: save it compressed (save_pretrained of llmcompressor)"
            )
        shape = weight.shape
    else:
        packed = _part(records, f"{stem}{dot}weight_packed", key)
        if len(packed.shape) != 2:
            raise _misfit(stem, packed)
        bits = bits_of(stem, packing.config)
        per_item = (_WORD if packed.dtype == "I32" else 8) // bits
        shape = (packed.shape[0], packed.shape[1] * per_item)
    return StoredTensor(key=f"{stem}{dot}weight", shape=shape, parts=parts)


_GROUPS = {
    AWQ: _awq_weight,
    COMPRESSED: _compressed_weight,
    FP8: _fp8_weight,
    GPTQ: _gptq_weight,
    MXFP4: _mxfp4_weight,
}
_FOR_KERNELS: Mapping[str, tuple[str, ...]] = {
    AWQ: (),
    COMPRESSED: (),  # what rounds activations may be wanted: compressed_config.ROUNDING
    FP8: ("activation_scale", "input_scale"),
    GPTQ: (),
    MXFP4: (),
}


def part_records(stored: Mapping[str, StoredTensor]) -> Iterator[TensorRecord]:
    """The records of `stored`, tensor by tensor."""
    for tensor in stored.values():
        yield from tensor.parts.values()


def _part(records: Mapping[str, TensorRecord], name: str, beside: str) -> TensorRecord:
    record = records.get(name)
    if record is None:
        raise TensorMismatchError(f"the checkpoint has no tensor {name}, without which {beside} can't be unpacked")
    return record


def _expect(record: TensorRecord, dimensions: int, dtypes: tuple[str, ...]) -> None:
    if len(record.shape) != dimensions or record.dtype not in dtypes:
        raise TensorMismatchError(
            f"tensor {record.key} is {record.dtype} {list(record.shape)}: packed weights have {' or '.join(dtypes)} "
            f"of {dimensions} dimension(s) there"
        )


def _misfit(stem: str, *records: TensorRecord) -> TensorMismatchError:
    shapes = ", ".join(f"{record.key.rpartition('.')[2]} {list(record.shape)}" for record in records)
    return TensorMismatchError(f"the parts of packed weight {stem} don't fit together: {shapes}")
