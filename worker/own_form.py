"""Whether a packed checkpoint (GPTQ, AWQ, FP8, …) can stay as it is on this machine, in transformers' own quantizer.

Asked of each node before a model is planned; `python -m shardlift.worker.own_form` answers in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

from ..proto.v1.errors import one_line
from .packed import AWQ, COMPRESSED, FP8, GPTQ, quantization_method

# What the quantizer of each needs beside transformers: modules, and what a user installs.
_NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    GPTQ: (("optimum", "gptqmodel"), "optimum gptqmodel"),
    AWQ: (("gptqmodel",), "gptqmodel"),
    FP8: (("kernels",), "kernels"),
    COMPRESSED: (("compressed_tensors",), "compressed-tensors"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """config: the checkpoint's, which says how it is packed. dtype, attn_implementation: as in StageSpec. device: "cpu"
    or "cuda", as stages would have it there."""

    config: Mapping[str, Any]
    dtype: str
    attn_implementation: str | None
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """why_not: why weights can't stay packed; "" where they can. tensors: fingerprint of the packed model's tensors,
    by name, shape and dtype, as they are there."""

    why_not: str
    tensors: str = ""


def why_not_anywhere(config: Mapping[str, Any]) -> str:
    """What can be told from the config and this machine's packages alone, without building anything; "" for nothing."""
    method = quantization_method(config)
    if method not in _NEEDS:
        return f"{method} is always unpacked here"
    modules, packages = _NEEDS[method]
    if any(find_spec(module) is None for module in modules):
        return f"that needs `pip install {packages}` on every node, and on the head"
    if method == COMPRESSED and not config["quantization_config"].get("use_optimized_inference"):
        return "transformers, too, unpacks compressed-tensors, at the first pass"
    if method == COMPRESSED and not all(map(_is_fp8, config["quantization_config"].get("config_groups", {}).values())):
        return "transformers has kernels for FP8 alone, and not all weights are that"
    return ""


def _is_fp8(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return isinstance(weights, Mapping) and (weights.get("type"), weights.get("num_bits")) == ("float", 8)


def answer(question: Question) -> Answer:
    """Asks transformers, on this machine. Never raises."""
    if why := why_not_anywhere(question.config):
        return Answer(why_not=why)
    try:
        from .skeleton import check_quantizer, parse_config

        if why := check_quantizer(parse_config(question.config), question.device):
            return Answer(why_not=why)
        return Answer(why_not="", tensors=fingerprint(question))
    except Exception as error:
        # What the packages raise on a machine that isn't fit is of any kind.
        return Answer(why_not=one_line(error, 300) or type(error).__name__)


def needs_gpu(config: Mapping[str, Any]) -> bool:
    """Whether transformers keeps such weights packed on GPUs alone."""
    return quantization_method(config) in (FP8, COMPRESSED)


def fingerprint(question: Question) -> str:
    """Of the packed model's tensors, as transformers' quantizer makes them here, whatever it thinks of this machine.

    Raises what it raises.
    """
    # Heavy, and not there at all where only a package is asked for.
    from .skeleton import build_skeleton, parse_config
    from .tensors import dtype_by_name

    skeleton = build_skeleton(
        parse_config(question.config),
        dtype=dtype_by_name(question.dtype),
        device=question.device or "cpu",
        attn_implementation=question.attn_implementation,
        keep_packing=True,
    )
    state = skeleton.model.state_dict()
    tensors = sorted((name, tuple(value.shape), str(value.dtype)) for name, value in state.items())
    return sha256(json.dumps(tensors).encode()).hexdigest()


def main() -> None:
    question = Question(**json.loads(sys.stdin.read()))
    # The packages talk to stdout: the answer is its last line.
    print("\n" + json.dumps(asdict(answer(question))), flush=True)


if __name__ == "__main__":
    main()
