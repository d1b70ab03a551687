"""A config of the same model, small enough to be tried out in a second. Pure.

What decides how a family computes (flags, kinds of layers, multipliers, activations) stays; how wide it is does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEAD_DIM = 16
_VOCABULARY = 256
_MOST_LAYERS = 12
_LEAST_LAYERS = 4

# Sizes, by the names that configs have for them. Anything else keeps its value.
_SIZES: dict[str, int] = {
    "attention_chunk_size": 16,
    "expert_intermediate_size": 32,
    "ffn_dim": 128,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "kv_lora_rank": 32,
    "linear_key_head_dim": _HEAD_DIM,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": _HEAD_DIM,
    "mamba_d_head": _HEAD_DIM,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_head_dim": _HEAD_DIM,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_inner": 128,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "original_max_position_embeddings": 128,
    "q_lora_rank": 32,
    "qk_head_dim": 2 * _HEAD_DIM,
    "qk_nope_head_dim": _HEAD_DIM,
    "qk_rope_head_dim": _HEAD_DIM,
    "query_pre_attn_scalar": _HEAD_DIM,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "rotary_dim": 8,
    "sliding_window": 8,
    "ssm_state_size": 16,
    "v_head_dim": _HEAD_DIM,
    "vocab_size": _VOCABULARY,
}
# At most so many of what there are.
_COUNTS: dict[str, int] = {
    "experts_per_token": 2,
    "first_k_dense_replace": 1,
    "moe_k": 2,
    "n_group": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "top_k": 2,
    "topk_group": 1,
}


def shrink(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`config`, a whole one with its defaults, with few narrow layers. names: of what this config has its own word for,
    from transformers' usual one (`PreTrainedConfig.attribute_map`)."""

    def own(name: str) -> str:
        return names.get(name, name)

    small = dict(config)

    def put(name: str, value: int) -> None:
        if isinstance(small.get(own(name)), int) and not isinstance(small[own(name)], bool):
            small[own(name)] = value

    layers = int(config[own("num_hidden_layers")])
    kept = _layers(config, layers)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == layers and layers > kept:
            small[name] = value[:kept]
        elif isinstance(value, list) and value and all(isinstance(each, int) for each in value) and _is_index(name):
            small[name] = [each for each in value if each < kept]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            small[name] = {key: each for key, each in value.items() if int(key) < kept}
    put("num_hidden_layers", kept)
    heads, groups = _heads(config, own)
    head_dim = _HEAD_DIM
    put("num_attention_heads", heads)
    put("num_key_value_heads", heads // groups)
    put("num_kv_heads", heads // groups)
    put("hidden_size", heads * head_dim)
    put("head_dim", head_dim)
    put("word_embed_proj_dim", heads * head_dim)
    for name, size in _SIZES.items():
        put(name, size)
    for name, most in _COUNTS.items():
        if isinstance(small.get(own(name)), int):
            put(name, min(small[own(name)], most))
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2), ("decoder_start_token_id", 1)):
        if small.get(name) is not None:
            small[name] = token
    return small


def _is_index(name: str) -> bool:
    """Whether a list of this name holds numbers of layers."""
    return name.endswith(("_layers", "_layer_ids", "_layer_idx", "_layers_idxs", "_indices"))


def _heads(config: Mapping[str, Any], own: Any) -> tuple[int, int]:
    """Heads, and how many of them share keys and values: as in the model, one, some, or all."""
    heads = config.get(own("num_attention_heads")) or 1
    shared = config.get(own("num_key_value_heads")) or config.get("num_kv_heads") or heads
    if not isinstance(heads, int) or not isinstance(shared, int):
        return 4, 1
    return (4, 1) if shared >= heads else (4, 4) if shared == 1 else (4, 2)


def _layers(config: Mapping[str, Any], layers: int) -> int:
    """The first layers until each kind has been seen, and at least one more after."""
    lists = [value for value in config.values() if isinstance(value, list) and len(value) == layers and layers > 1]
    needed = _LEAST_LAYERS
    for kinds in lists:
        texts = [str(kind) for kind in kinds]
        if len(set(texts)) < layers:
            needed = max(needed, max(texts.index(kind) for kind in set(texts)) + 1)
    return min(layers, needed, _MOST_LAYERS)
