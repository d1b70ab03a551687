"""Checkpoints of a chosen family and size: true names and shapes, random weights.

transformers writes one with a few layers; its decoder layers are then repeated until the size is reached.

    python -m bench.synthetic FOLDER --family llama --size 2GB
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from shardlift.worker.byte_sizes import parse_size

SHARD_BYTES = 2 << 30

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=\.h\.)\d+(?=\.)")
_DENSE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": _DENSE,
    "llama-8b": {**_DENSE, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256},
    "qwen3": {**_DENSE, "head_dim": 128},
    "qwen3_moe": {
        **_DENSE,
        "head_dim": 128,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}


def write_checkpoint(folder: Path, family: str, size_bytes: int, seed: int = 0) -> int:
    """A checkpoint of about `size_bytes`, at least one layer's. Gives the bytes of its tensors."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        config = AutoConfig.for_model(family.partition("-")[0], num_hidden_layers=1, **FAMILIES[family])
        config.dtype = torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(name, max_shard_size="100GB")
        config.architectures = [type(model).__name__]
        del model
        (file,) = Path(name).glob("*.safetensors")
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
    layer = {key: tensor for key, tensor in tensors.items() if _LAYER.search(key)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in layer}
    layer_bytes, rest_bytes = _bytes(layer), _bytes(rest)
    layers = max(1, round((size_bytes - rest_bytes) / layer_bytes))
    folder.mkdir(parents=True)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shards = 0

    def flush() -> None:
        nonlocal shards
        if shard:
            shards += 1
            name = f"model-{shards:05d}.safetensors"
            safetensors.torch.save_file(shard, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

    for index in range(layers):
        # Views would share memory, which safetensors refuses.
        shard |= {_LAYER.sub(str(index), key): tensor.clone() for key, tensor in layer.items()}
        if _bytes(shard) + layer_bytes > SHARD_BYTES:
            flush()
    shard |= rest
    flush()
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return rest_bytes + layers * layer_bytes


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--size", type=parse_size, default=parse_size("1GB"))
    options = parser.parse_args()
    print(write_checkpoint(options.folder, options.family, options.size))


if __name__ == "__main__":
    main()
