"""Which modules of each model family run before, in, and after the layer loop. Pure data.

A stage is the family's whole model with everything that other stages own replaced by pass-throughs. That is only
right where what runs around the loop is known, so a family is listed here once its slices have been shown to equal
the whole, bit for bit (tests/test_families.py). Any other must pass a check of its own (`cluster.selfcheck`), or is
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..proto.v1.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Names of a causal model's parts. All but `base` and `head` are relative to the base model.

    base: path of the base model in the `...ForCausalLM`: the module whose `forward` runs the loop.
    layers: the `ModuleList` of decoder layers.
    embedding: token embedding; first stage only (and the last one's, where the head is tied to it).
    before: other modules that run before the loop; first stage only. As in `after`, a config may leave some out.
    additive: those of `before` whose output is added to what enters, so that later stages need zeros from them.
    after: modules between the loop and the head; last stage only.
    head: the output projection on the `...ForCausalLM`; last stage only.
    neutral: attributes of the base model that later stages must hold at these values, since they act on
        `inputs_embeds` whatever it holds.
    layers_give_tuples: the loop takes the first entry of what a layer returns.
    asked_of_layers: attributes of a layer that the loop reads, of another stage's layers too.
    positions: the config's name for how many positions there are, where they are rows of a table; else they have no
        end.
    counts_by_mask: without positions from the caller the model counts by the attention mask, and puts padding at -1;
        the others count every token.
    """

    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    before: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()
    after: tuple[str, ...] = ("norm",)
    head: str = "lm_head"
    neutral: Mapping[str, float] = field(default_factory=dict)
    layers_give_tuples: bool = False
    asked_of_layers: tuple[str, ...] = ()
    positions: str = ""
    counts_by_mask: bool = False

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Anatomy:
        """Of the object that `dataclasses.asdict` makes, through JSON or not."""
        fields: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in value.items()}
        return cls(**fields)


_LLAMA = Anatomy()

FAMILIES: dict[str, Anatomy] = {
    "apertus": _LLAMA,
    "arcee": _LLAMA,
    "bloom": Anatomy(
        base="transformer",
        layers="h",
        embedding="word_embeddings",
        before=("word_embeddings_layernorm",),
        after=("ln_f",),
        layers_give_tuples=True,
    ),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
    "dots1": _LLAMA,
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": _LLAMA,
    "exaone4": _LLAMA,
    "exaone_moe": _LLAMA,
    "falcon": Anatomy(
        base="transformer",
        layers="h",
        embedding="word_embeddings",
        after=("ln_f",),
        layers_give_tuples=True,
    ),
    "flex_olmo": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "glm4_moe": _LLAMA,
    "glm4_moe_lite": _LLAMA,
    "gpt2": Anatomy(
        base="transformer",
        layers="h",
        embedding="wte",
        before=("wpe", "drop"),
        additive=("wpe",),
        after=("ln_f",),
        positions="max_position_embeddings",
    ),
    "gpt_bigcode": Anatomy(
        base="transformer",
        layers="h",
        embedding="wte",
        before=("wpe", "drop"),
        additive=("wpe",),
        after=("ln_f",),
        positions="max_position_embeddings",
    ),
    "gpt_neox": Anatomy(
        base="gpt_neox",
        embedding="embed_in",
        before=("emb_dropout",),
        after=("final_layer_norm",),
    ),
    "gpt_oss": _LLAMA,
    "gptj": Anatomy(
        base="transformer",
        layers="h",
        embedding="wte",
        before=("drop",),
        after=("ln_f",),
        layers_give_tuples=True,
        positions="max_position_embeddings",
    ),
    "granite": Anatomy(neutral={"embedding_multiplier": 1.0}),
    "granitemoe": Anatomy(neutral={"embedding_multiplier": 1.0}),
    "granitemoehybrid": Anatomy(neutral={"embedding_multiplier": 1.0}),
    "granitemoeshared": Anatomy(neutral={"embedding_multiplier": 1.0}),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": _LLAMA,
    "hy_v3": _LLAMA,
    "lfm2": Anatomy(after=("embedding_norm",)),
    "lfm2_moe": Anatomy(after=("embedding_norm",)),
    "llama": _LLAMA,
    "llama4_text": _LLAMA,
    "minimax": _LLAMA,
    "minimax_m2": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "mpt": Anatomy(
        base="transformer",
        layers="blocks",
        embedding="wte",
        after=("norm_f",),
        layers_give_tuples=True,
        positions="max_seq_len",
    ),
    "nemotron": _LLAMA,
    "nemotron_h": Anatomy(embedding="embeddings", after=("norm_f",), asked_of_layers=("block_type",)),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "olmoe": _LLAMA,
    "opt": Anatomy(
        base="model.decoder",
        before=("embed_positions", "project_in"),
        additive=("embed_positions",),
        after=("final_layer_norm", "project_out"),
        positions="max_position_embeddings",
        counts_by_mask=True,
    ),
    "phi": Anatomy(before=("embed_dropout",), after=("final_layernorm",)),
    "phi3": _LLAMA,
    "phimoe": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_5_moe_text": _LLAMA,
    "qwen3_5_text": _LLAMA,
    "qwen3_moe": _LLAMA,
    "qwen3_next": _LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "solar_open": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": Anatomy(neutral={"embedding_dropout": 0.0}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """The causal model inside a model that takes images too, and what its checkpoint's other tensors begin with.

    model_type: the text's, a key of FAMILIES. others: those alone that transformers doesn't itself know to ignore.
    prefixes: pattern of a key's beginning -> what the text alone has there, where transformers doesn't itself know it.
    """

    model_type: str
    others: tuple[str, ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)


# By the checkpoint's model type. `AutoModelForCausalLM` makes a model of the text alone, or, for Gemma 3, the whole
# one, which computes the same where it gets no image.
TEXT_PARTS: dict[str, TextPart] = {
    "gemma3": TextPart(
        model_type="gemma3_text",
        others=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        # As published, and as transformers 5 has it in memory.
        prefixes={r"^language_model\.(model|lm_head)\.": r"\1.", r"^model\.language_model\.": "model."},
    ),
    "llama4": TextPart(model_type="llama4_text", others=("multi_modal_projector.", "vision_model.")),
    "qwen3_5": TextPart(model_type="qwen3_5_text"),
    "qwen3_5_moe": TextPart(model_type="qwen3_5_moe_text"),
}


def anatomy_of(model_type: str) -> Anatomy:
    """The anatomy of a family. Raises UnsupportedModelError for one that isn't listed."""
    anatomy = FAMILIES.get(model_type)
    if anatomy is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} has not been shown to come out right over several stages; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return anatomy


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The part of a model that one stage holds: decoder layers `[first, end)` of `num_layers`."""

    first: int
    end: int
    num_layers: int

    def __post_init__(self) -> None:
        assert 0 <= self.first < self.end <= self.num_layers, (self.first, self.end, self.num_layers)

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a model a parameter or buffer belongs: one layer, or `part` "embedding", "before", "after", "shared".

    "shared" is what every stage keeps, such as rotary frequencies.
    """

    part: str
    layer: int = -1

    def held_by(self, cut: Cut, *, tied: bool) -> bool:
        """Whether the stage of `cut` holds it; `tied` says that the head's weight is the embedding's."""
        if self.part == "layer":
            return cut.first <= self.layer < cut.end
        if self.part == "embedding":
            return cut.is_first or (tied and cut.is_last)
        if self.part == "before":
            return cut.is_first
        if self.part == "after":
            return cut.is_last
        return True


def place_of(name: str, anatomy: Anatomy) -> Place:
    """The place of a parameter, buffer or module called `name` (as in the model's state dict)."""

    def under(*modules: str) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in modules)

    base = anatomy.base
    layers = f"{base}.{anatomy.layers}"
    if under(layers) and name != layers:
        return Place(part="layer", layer=int(name[len(layers) + 1 :].split(".", 1)[0]))
    if under(f"{base}.{anatomy.embedding}"):
        return Place(part="embedding")
    if under(*(f"{base}.{module}" for module in anatomy.before)):
        return Place(part="before")
    if under(anatomy.head, *(f"{base}.{module}" for module in anatomy.after)):
        return Place(part="after")
    return Place(part="shared")
