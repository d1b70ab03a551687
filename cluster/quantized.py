"""What becomes of a checkpoint that is quantized already: whose quantization counts, and what is said of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..proto.v1.errors import InvalidRequestError, UnsupportedModelError
from ..worker.compressed_config import rounds_activations
from ..worker.packed import (
    BITSANDBYTES,
    Packing,
    has_plain_weights,
    packing_of,
    quantization_method,
)

# transformers' own words (AutoHfQuantizer.merge_quantization_configs).
CHECKPOINT_WINS = (
    "You passed `quantization_config` or equivalent parameters to `from_pretrained` but the model you're loading"
    " already has a `quantization_config` attribute. The `quantization_config` from the model will be used."
)
_HOW = "quantization_config=BitsAndBytesConfig(load_in_4bit=True, …) and requantize=True (--load-in-4bit --requantize)"
_ACTIVATIONS = "the rounding of activations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """config: the checkpoint's, without a quantization where weights are unpacked. quantization: what to do on the way
    in. packing: how the checkpoint packs weights that are unpacked. keep_packing: they stay packed, as `config` says.
    notes: what the user should know."""

    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    packing: Packing | None = None
    keep_packing: bool = False
    notes: tuple[str, ...] = ()


def settle(
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    *,
    requantize: bool = False,
    dequantize: bool = False,
) -> Quantized:
    """Weighs a checkpoint's own quantization against `quantization`, which the caller asked for.

    bitsandbytes' own wins over the caller's, as in transformers. Any other is undone: the weights are then held as the
    model's dtype, or, with `requantize`, as the caller asked. Activations are rounded as compressed-tensors says, but
    with neither `dequantize` nor `requantize`. Raises UnsupportedModelError for a quantization that can't be read, and
    InvalidRequestError where the caller's contradicts the checkpoint's.
    """
    method = quantization_method(config)
    asked = _method(quantization)
    if not method:
        if quantization and asked != BITSANDBYTES:
            raise InvalidRequestError(
                f"quantization_config says {asked}, but on the way in models are quantized with bitsandbytes alone: "
                "pass a BitsAndBytesConfig"
            )
        return Quantized(config=_plain(config), quantization=quantization)
    if method == BITSANDBYTES:
        if has_plain_weights(config):
            raise UnsupportedModelError(
                "the checkpoint's quantization_config says llm_int8_has_fp16_weight, with which weights stay in 16 "
                "bits: take quantization_config out of its config.json, and pass it to from_pretrained"
            )
        if requantize:
            raise InvalidRequestError(
                "requantize=True, but the checkpoint is quantized with bitsandbytes, and loaded as it is: leave "
                "requantize out"
            )
        if quantization and asked != BITSANDBYTES:
            raise InvalidRequestError(
                f"the checkpoint is quantized with bitsandbytes, but quantization_config says {asked}: leave "
                "quantization_config out"
            )
        return Quantized(config=config, quantization=None, notes=(CHECKPOINT_WINS,) if quantization else ())
    packing = packing_of(config)
    assert packing is not None, method
    plain = _plain(config)
    if quantization and asked == BITSANDBYTES:
        if not requantize:
            raise InvalidRequestError(
                f"the checkpoint is quantized with {method} already: to quantize what that unpacks to, pass "
                "requantize=True (--requantize) beside quantization_config, or leave quantization_config out to hold "
                "it unpacked"
            )
        packing = replace(packing, dequantize=True)
        notes = (f"{_ACTIVATIONS} is left out where weights are quantized anew",) * rounds_activations(packing.config)
        return Quantized(config=plain, quantization=quantization, packing=packing, notes=notes)
    if requantize:
        raise InvalidRequestError(f"requantize=True needs to know to what: pass {_HOW}")
    if quantization and asked != method:
        raise InvalidRequestError(
            f"the checkpoint is quantized with {method}, but quantization_config says {asked}: leave it out, or pass "
            f"{_HOW}"
        )
    if dequantize or (quantization or {}).get("dequantize") or _said(config).get("dequantize"):
        packing = replace(packing, dequantize=True)
    note = (
        f"the checkpoint is quantized with {method}: its weights are unpacked, and held unquantized. To hold them in 4 "
    )
    return Quantized(
        config=plain, quantization=None, packing=packing, notes=(f"{note}bits, pass {_HOW}", *_on_activations(packing))
    )


def _on_activations(packing: Packing) -> tuple[str, ...]:
    if not rounds_activations(packing.config):
        return ()
    if packing.dequantize:
        return (f"{_ACTIVATIONS} is left out with dequantize=True, as in transformers",)
    return (f"{_ACTIVATIONS} is done as the checkpoint says; dequantize=True (--dequantize) leaves it out",)


def own_form(
    config: Mapping[str, Any], quantization: Mapping[str, Any] | None, *, dequantize: bool = False
) -> Mapping[str, Any] | None:
    """The config of a packed checkpoint as transformers' own quantizer is to read it, where weights might stay packed;
    None where nothing is packed, or the caller wants it otherwise.

    As in transformers, a config of the checkpoint's own method changes how it is loaded: `dequantize`, and for
    compressed-tensors `use_optimized_inference`. To be asked before `settle`, which refuses contradictions.
    """
    method = quantization_method(config)
    if method in ("", BITSANDBYTES) or dequantize:
        return None
    if quantization and (_method(quantization) != method or quantization.get("dequantize")):
        return None
    said = _said(config)
    if said.get("dequantize"):
        return None
    optimized = (quantization or {}).get("use_optimized_inference")
    return {**config, "quantization_config": {**said, **({"use_optimized_inference": True} if optimized else {})}}


def kept(settled: Quantized, config: Mapping[str, Any]) -> Quantized:
    """In place of `settled`, with which weights would be unpacked. config: from `own_form`."""
    method = quantization_method(config)
    note = (
        f"the checkpoint is quantized with {method}: its weights stay so, and transformers' own quantizer computes "
        "with them; dequantize=True (--dequantize) unpacks them"
    )
    return replace(settled, config=config, packing=None, keep_packing=True, notes=(note,))


def unpacked(settled: Quantized, why_not_kept: str) -> Quantized:
    """`settled`, with why its weights don't stay packed."""
    return replace(settled, notes=(*settled.notes, f"its weights don't stay packed: {why_not_kept}"))


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("quantization_config") or config["text_config"]["quantization_config"]
    return found


def _method(quantization: Mapping[str, Any] | None) -> str:
    return quantization_method({"quantization_config": quantization}) if quantization else ""


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without a quantization."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
    return plain
