"""Stages of every supported family compute what one-process transformers computes: difference 0.0.

Over three uneven stages, through real gRPC: prefill alone and in chunks, cached decoding, left padding, generation. A
few of the same passes over two. All of it over one and two stages for `KINDS`, and for the others in `soak`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from shardlift.proto.v1.errors import UnsupportedModelError
from shardlift.worker.anatomy import FAMILIES, TEXT_PARTS
from tests.support import checkpoints, ring
from tests.support.quantization import nf4

LENGTH = 21
DECODED = 12
CHUNKS = (12, 7, 2)
CUTS: dict[str, tuple[int, ...]] = {"one stage": (), "two": (1,), "three": (1, 3)}
Case = tuple[Path, BitsAndBytesConfig, PreTrainedModel]

_LINEAR, _FULL = "linear_attention", "full_attention"


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0] * 8,
    long_factor=[1.0 + index / 2 for index in range(8)],
    original_max_position_embeddings=30,
)

# What a family's models differ in, where it is seen around the layers or in the cache.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 128, "do_layer_norm_before": False}),
    "opt-350m": ("opt", {"hidden_size": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "gpt_bigcode-multihead": ("gpt_bigcode", {"multi_query": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    # A stage of states alone, and one of keys and values alone.
    "qwen3_next-rare": ("qwen3_next", {"full_attention_interval": 4}),
    # As all real ones begin.
    "minimax-linear": ("minimax", {"layer_types": [_LINEAR, _LINEAR, _FULL, _LINEAR]}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-40b-one-norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "mixtral-window": ("mixtral", {"sliding_window": 16}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "phi3-window": ("phi3", {"sliding_window": 16}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    # Frequencies change in the midst of a prompt.
    "llama-dynamic": ("llama", {"rope_parameters": _rope("dynamic", factor=2.0), "max_position_embeddings": 16}),
    "llama-linear": ("llama", {"rope_parameters": _rope("linear", factor=4.0)}),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 30, "rope_parameters": _LONGROPE}),
    "phi-norms": ("phi", {"qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "mpt-clipped": ("mpt", {"attn_config": {"clip_qkv": 0.5, "alibi": True}}),
    "mpt-without-alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "bloom-post": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "cohere-norms": ("cohere", {"use_qk_norm": True}),
    "deepseek_v3-whole-queries": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v3-yarn": ("deepseek_v3", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
}
CASES = {family: (family, {}) for family in sorted(FAMILIES)} | VARIANTS
# One of each kind of anatomy and cache is shown whole in every cut each time; the others in three stages, with a few
# passes in two, and whole in every cut by `make soak`.
KINDS = (
    "llama-tied",
    "gpt2",
    "gemma3_text",
    "mixtral",
    "deepseek_v3",
    "gpt_neox",
    "opt",
    "bloom",
    "qwen3_next",
    "nemotron_h",
)


def shown() -> Iterator[ParameterSet]:
    for name, case in CASES.items():
        for cut in CUTS:
            marks = () if cut == "three" or name in KINDS else (pytest.mark.soak,)
            yield pytest.param(case, cut, id=f"{name}-{cut}", marks=marks)


def test_every_supported_family_is_proven_here() -> None:
    assert {family for family, _ in CASES.values()} == set(checkpoints.FAMILIES) == set(FAMILIES)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, how it is quantized, and the model that transformers makes of it in one process."""
    family, config = request.param
    folder = checkpoints.tiny(family, tmp_path_factory.mktemp(family), layers=4, dtype="bfloat16", **config)
    quantization = nf4(skip=checkpoints.FAMILIES[family].unquantized)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    return folder, quantization, model


def prompt(*, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 250, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    return ids, mask


@pytest.mark.parametrize(("case", "cut"), list(shown()), indirect=["case"])
async def test_logits_and_tokens_equal_one_process(case: Case, cut: str) -> None:
    folder, quantization, whole = case
    options = {"quantization": quantization.to_dict(), "dtype": "bfloat16"}
    stages = ring.load(folder, CUTS[cut], **options)
    assert len(stages) == len(CUTS[cut]) + 1
    steps: dict[tuple[bool, int], list[Step]] = {}
    async with ring.serve(stages) as pipeline:
        for padded in (False, True):
            ids, mask = prompt(padded=padded)
            await check_forward(pipeline, whole, ids, mask)
            for chunks in ((LENGTH,), CHUNKS):
                steps[padded, len(chunks)] = decoded_by(whole, ids, mask, chunks, DECODED if len(chunks) == 1 else 4)
                await check_steps(pipeline, steps[padded, len(chunks)])
            await check_generate(pipeline, whole, ids, mask)
        await pipeline.idle()
    if cut == "three":
        # Once more in two, otherwise: what has been computed tells of it, too.
        async with ring.serve(ring.load(folder, (2,), **options)) as pipeline:
            await check_steps(pipeline, steps[False, 1][:3])
            await check_steps(pipeline, steps[True, len(CHUNKS)])


STATES_FIRST: dict[str, tuple[str, ...]] = {
    "minimax": (_LINEAR, _LINEAR, _FULL, _LINEAR),
    "qwen3_next": (_LINEAR, _LINEAR, _FULL, _LINEAR),
    "qwen3_5_text": (_LINEAR, _LINEAR, _FULL, _LINEAR),
    "lfm2": ("conv", "conv", _FULL, "conv"),
    "granitemoehybrid": (_LINEAR, _LINEAR, _FULL, _LINEAR),
    "nemotron_h": ("mlp", _LINEAR, _FULL, _LINEAR),
}


@pytest.mark.parametrize("family", STATES_FIRST)
async def test_where_states_come_first_a_cache_changes_nothing(family: str, tmp_path: Path) -> None:
    """Chunks and single tokens, padded and not, equal one pass without a cache: transformers' own cache may be wrong.

    Not to the bit: states are computed block by block in a first pass, and token by token after.
    """
    folder = checkpoints.tiny(family, tmp_path, layer_types=list(STATES_FIRST[family]))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    async with ring.serve(ring.load(folder, (2,))) as pipeline:
        for padded in (False, True):
            ids, mask = prompt(padded=padded)
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
            with torch.inference_mode():
                expected = whole(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            session, past, found = pipeline.session(), 0, []
            for tokens in (12, 5, 1, 1, 2):
                end = past + tokens
                found.append(await session(ids[:, past:end], mask[:, :end], positions[:, past:end]))
                past = end
            assert past == LENGTH
            await session.close()
            seen = mask[..., None].bool()
            torch.testing.assert_close(torch.cat(found, 1) * seen, expected * seen, rtol=0, atol=2e-3)
        await pipeline.idle()


@pytest.mark.parametrize("model_type", TEXT_PARTS)
async def test_the_text_of_a_model_with_images(model_type: str, tmp_path: Path) -> None:
    """As AutoModelForCausalLM makes it of the same files, and without a byte of the rest."""
    folder = checkpoints.tiny_with_images(model_type, tmp_path)
    quantization = nf4(skip=checkpoints.FAMILIES[TEXT_PARTS[model_type].model_type].unquantized)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    specs = ring.specs(folder, (1, 3), quantization=quantization.to_dict(), dtype="bfloat16")
    assert not [record.key for spec in specs for record in spec.records if "vis" in record.key]
    stages = ring.load(folder, (1, 3), quantization=quantization.to_dict(), dtype="bfloat16")
    async with ring.serve(stages) as pipeline:
        for padded in (False, True):
            ids, mask = prompt(padded=padded)
            await check_forward(pipeline, whole, ids, mask)
            await check_decoding(pipeline, whole, ids, mask, CHUNKS, 4)
            await check_generate(pipeline, whole, ids, mask)
        await pipeline.idle()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
async def test_gemma_3_by_either_of_its_names(prefix: str, tmp_path: Path) -> None:
    """As published and as transformers 5 has it; bitsandbytes' own, with a module that it left alone."""
    folder = checkpoints.tiny_with_images("gemma3", tmp_path / "plain")
    chosen = nf4(skip=["lm_head", f"{prefix}layers.1.mlp", "model.language_model.layers.1.mlp"])
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=chosen, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "quantized")
    [file] = (tmp_path / "quantized").glob("*.safetensors")
    tensors = {
        re.sub(r"^(language_model\.model|model\.language_model)\.", prefix, k): v for k, v in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    ids, mask = prompt(padded=True)
    async with ring.serve(ring.load(tmp_path / "quantized", (2,))) as pipeline:
        await check_forward(pipeline, whole, ids, mask)
        assert not any("absmax" in key and ".layers.1.mlp." in key for key in tensors)


@pytest.mark.parametrize("model_type", ["gemma3n", "mistral3", "qwen2_5_vl"])
def test_other_models_with_images_are_refused_in_words(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"model.norm.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=f"'{model_type}' takes more than text, .* of these it can: gemma3, "
    ):
        ring.specs(tmp_path, ())


class RightMiniMaxCache(MiniMaxCache):
    """transformers' own takes lengths from its first layer, which has none where that is a linear one, as in all real
    MiniMax models: its masks are then wrong for chunks, and for single tokens after padding."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self.first)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self.first)


def cache_for(whole: PreTrainedModel) -> DynamicCache:
    if whole.config.model_type == "minimax":
        return RightMiniMaxCache(whole.config.layer_types.index("full_attention"))
    return DynamicCache(config=whole.config)


async def check_forward(pipeline: ring.Ring, whole: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """`model(input_ids, attention_mask).logits`, without a cache."""
    with torch.inference_mode():
        expected = whole(ids, attention_mask=mask, use_cache=False).logits
    session = pipeline.session()
    assert torch.equal(await session(ids, mask, use_cache=False), expected)
    await session.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A pass with a cache, and the logits that transformers in one process gives."""

    new: torch.Tensor
    arguments: dict[str, torch.Tensor]
    logits: torch.Tensor


def decoded_by(
    whole: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, chunks: tuple[int, ...], decoded: int
) -> list[Step]:
    """Prefill in `chunks`, then greedy steps on the cache."""
    cache = cache_for(whole)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    inputs = list(ids.split(chunks, dim=-1))
    steps: list[Step] = []
    past, logits = 0, torch.empty(0)
    for step in range(len(chunks) + decoded):
        new = inputs[step] if step < len(chunks) else logits[:, -1:].argmax(-1)
        if step >= len(chunks):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=-1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=-1)
        end = past + new.shape[1]
        arguments = {"attention_mask": mask[:, :end], "position_ids": positions[:, past:end]}
        with torch.inference_mode():
            logits = whole(new, past_key_values=cache, use_cache=True, **arguments).logits
        steps.append(Step(new=new, arguments=arguments, logits=logits))
        past = end
    return steps


async def check_steps(pipeline: ring.Ring, steps: list[Step]) -> None:
    """Every logit of every step."""
    session = pipeline.session()
    for index, step in enumerate(steps):
        found = await session(step.new, **step.arguments)
        assert torch.equal(found, step.logits), f"step {index} of {len(steps)}"
    await session.close()


async def check_decoding(
    pipeline: ring.Ring,
    whole: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    chunks: tuple[int, ...],
    decoded: int,
) -> None:
    await check_steps(pipeline, decoded_by(whole, ids, mask, chunks, decoded))


async def check_generate(pipeline: ring.Ring, whole: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Greedy and sampled `generate`, tokens and raw logits."""
    cache = {"past_key_values": cache_for(whole)} if whole.config.model_type == "minimax" else {}
    expected = whole.generate(
        ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **cache
    )
    tokens, logits = await pipeline.generate(ids, mask, max_new_tokens=12, output_logits=True)
    assert torch.equal(tokens, expected.sequences[:, LENGTH:])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected.logits, strict=True))

    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2}
    torch.manual_seed(11)
    cache = {"past_key_values": cache_for(whole)} if cache else {}
    sampled = whole.generate(ids, attention_mask=mask, max_new_tokens=8, **sampling, **cache)
    tokens, _ = await pipeline.generate(ids, mask, max_new_tokens=8, seed=11, **sampling)
    assert torch.equal(tokens, sampled[:, LENGTH:])
