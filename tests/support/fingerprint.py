"""What a loaded stage holds, to the bit."""

from __future__ import annotations

import hashlib

import torch

from shardlift.worker.residency import measure
from shardlift.worker.serialized import serialize


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """A hash of each tensor that the model holds, quantization statistics and computed buffers among them.

    To be taken before the first forward pass, which may repack weights.
    """
    found = {name: _hash(tensor) for name, tensor in serialize(model, skip=()).items()}
    found |= {name: _hash(buffer) for name, buffer in model.named_buffers()}
    held = sum(module.size_bytes for module in measure(model))
    return {**found, "held": str(held)}


def _hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()
