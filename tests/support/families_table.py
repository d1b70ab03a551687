"""docs/families.md and the README's table, from what the code and its tests know. `make families` writes both."""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shardlift.worker.anatomy import FAMILIES, TEXT_PARTS
from tests.support import checkpoints
from tests.test_experts import NAMES, NOT_BY_EXPERTS
from tests.test_families import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT, README = ROOT / "docs" / "families.md", ROOT / "README.md"
_README_HEAD = "| `model_type` | e.g. |\n| --- | --- |\n"

_TEXT = """\
# Model families

Written by `make families`; `tests/test_families_table.py` fails while it is stale.

Each family here has been run, as a tiny model with random weights in NF4 with double quantization, over three uneven
stages on a CPU, and every logit was equal to that of transformers in one process: without a cache, prefilled alone and
in chunks, decoded from the cache, with and without left padding; so were the tokens of greedy and sampled `generate`.
Over two stages, a prefill, a padded prompt in chunks and a few cached steps were. A family of each kind of anatomy and
cache is run whole over one, two and three stages each time, and all are by `make soak` (`tests/test_families.py`). For
each, and for each kind of quantization, the bytes that a plan predicts are those that its stages measure
(`tests/test_layout.py`), and what a node's cache gives back is what was loaded (`tests/test_warm_load.py`).

- **keeps**: what a session holds in each layer. *all*: keys and values of every position. *window*: of the last ones.
  *latent*: one compressed vector a position. *state*: as much for a long text as for a short one; `shardlift plan`
  counts one row's as workspace. A state can't be taken back to an earlier position, nor can a window that has moved on.
- **attention**: *shared* where it goes through transformers' interface for attention implementations, by which
  sessions of unequal length can be computed as one batch: with all and window, though not with latents, which are
  widened after they are kept, nor with states, nor with Llama 4's chunks. *own* where the family computes its own.
- **experts in 4 bits**: whether `load_in_4bit=True` quantizes them, and was compared (`tests/test_experts.py`).
  *no*: the checkpoint holds a layer's experts in one tensor, or with biases, or they have no gate, so they stay in 16
  bits.
- **also**: variants of the family that were run beside the one that its tiny configuration describes.

MiniMax-Text-01 and M1 begin with linear layers, for which transformers' own cache takes every past to be empty: there,
chunks after the first, and single tokens after padding, get other logits than without a cache, or an error. Here they
get those that they have without one, which is what `tests/test_families.py` compares them with.

Of a model that takes images too, the text alone is loaded, as `AutoModelForCausalLM` does it, where the checkpoint's
`model_type` is one of these: {text_parts}.
Of Gemma 3 it makes the whole model, which gives the same logits where there is no image. Other such models are refused.

## Other families

A `model_type` that isn't listed, and that transformers has a causal model for, is tried out when it is planned, before
a tensor is fetched (`cluster/selfcheck.py`). It takes from half a second to some fifteen (0.4 to
16 s were seen; a minute with a recurrence that torch computes step by step), on the gateway's machine:

1. A small model is made of the checkpoint's own config: few, narrow layers of each kind that there is, random weights,
   everything else as it stands.
2. One forward pass of it shows where its layers, embedding, norms and head are, and what runs around the layers.
3. It is cut by that, over every cut in two and one in three, loaded as any model is, and compared with transformers in
   one process: without a cache, prefilled whole and in chunks, decoded, with and without left padding.

A difference of 0.0 in every logit is needed, and a cache no larger than planned. Then the model is loaded, and the plan
has a note that says so. Anything else is a refusal with what differed: a family that multiplies what enters it, shares
keys and values between layers, or keeps a cache of its own kind can't be cut so. A small model can't show what only a
large one does; families in the table are run with their peculiarities set so that they show.

## The table

| `model_type` | e.g. | keeps | attention | experts in 4 bits | also |
| --- | --- | --- | --- | --- | --- |
"""


def document() -> str:
    text_parts = ", ".join(f"`{name}` (as `{part.model_type}`)" for name, part in sorted(TEXT_PARTS.items()))
    return _TEXT.format(text_parts=text_parts) + "".join(_row(family) for family in sorted(FAMILIES))


def readme(text: str) -> str:
    """`text` with its table as it should be."""
    before, after = text.split(_README_HEAD)
    rows = [f"| `{family}` | {checkpoints.FAMILIES[family].models} |\n" for family in sorted(FAMILIES)]
    return before + _README_HEAD + "".join(rows) + after[after.index("\n\n") + 1 :]


def goes_through_the_interface(family: str) -> bool:
    """Whether the family's attention asks transformers for the implementation that the config names."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(sys.modules[model_class.__module__])


def _row(family: str) -> str:
    variants = [
        ", ".join(f"`{name}={value}`" for name, value in config.items())
        for of, config in VARIANTS.values()
        if of == family
    ]
    experts = "yes" if family in NAMES else "no" if family in NOT_BY_EXPERTS else ""
    cells = [
        f"`{family}`",
        checkpoints.FAMILIES[family].models,
        ", ".join(_kinds(family)),
        "shared" if goes_through_the_interface(family) else "own",
        experts,
        "; ".join(variants),
    ]
    return re.sub(r" +", " ", f"| {' | '.join(cells)} |\n")


def _kinds(family: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        config = PreTrainedConfig.get_config_dict(checkpoints.tiny(family, Path(folder), layers=4))[0]
    parsed = CONFIG_MAPPING[family].from_dict(config).get_text_config(decoder=True)
    full = "latent" if getattr(parsed, "kv_lora_rank", None) else "all"
    kinds = {
        LinearAttentionLayer: "state",
        DynamicSlidingWindowLayer: "window",
    }
    layers = [layer for layer in DynamicCache(config=parsed).layers if not isinstance(layer, DummyLayer)]
    found = {kinds.get(type(layer), full) for layer in layers}
    return [kind for kind in ("all", "latent", "window", "state") if kind in found]


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
