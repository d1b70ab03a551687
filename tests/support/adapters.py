"""Adapters for tests, made by peft, and what peft makes of them in one process."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shardlift.cluster import adapters
from shardlift.proto.v1 import registry_pb2
from shardlift.worker.adapter_fetch import fetch_tensors
from shardlift.worker.adapter_spec import AdapterSpec
from shardlift.worker.records import SourceSpec
from shardlift.worker.stage import ResidentStage, StepInput


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """peft warns of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(base: Path, folder: Path, config: PeftConfig, *, seed: int = 0) -> Path:
    """Saves an adapter of `base` whose every parameter makes a difference; `folder`."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
    return folder


def edit(folder: Path, **fields: Any) -> None:
    """Changes fields of a saved adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def whole(
    base: Path, paths: Mapping[str, Path], *, quantization: Mapping[str, Any] | None = None, dtype: str = "auto"
) -> Any:
    """The model in one process, with the adapters at `paths`, by their names."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=BitsAndBytesConfig(**quantization) if quantization else None
    )
    if not quantization:
        # Mapped from its file, a weight may lie anywhere; with one row, torch's products in 32 bits round by where.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    with quiet():
        first, *others = paths
        adapted = PeftModel.from_pretrained(model, str(paths[first]), adapter_name=first)
        for name in others:
            adapted.load_adapter(str(paths[name]), adapter_name=name)
    return adapted.eval()


def logits(adapted: Any, ids: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """What peft computes with these adapters; with none, the base."""
    with torch.inference_mode(), contextlib.ExitStack() as off:
        if names:
            adapted.base_model.set_adapter(list(names))
        else:
            off.enter_context(adapted.disable_adapter())
        result: torch.Tensor = adapted(ids).logits
        return result


def outlined(
    base: Path, path: Path, name: str, *, dtype: str = "float32", quantize_experts: bool = False, **fields: Any
) -> adapters.OutlinedAdapter:
    """The adapter at `path` as the controller outlines it."""
    model = adapters.BaseModel(
        config=json.loads((base / "config.json").read_text()),
        dtype=dtype,
        attn_implementation=None,
        quantize_experts=quantize_experts,
        source=SourceSpec(kind="folder", location=str(base)),
    )
    return adapters.outline(name, registry_pb2.ModelSource(path=str(path), **fields), None, model)


def attach(stages: Sequence[ResidentStage], spec: AdapterSpec) -> list[int]:
    """Attaches an adapter to loaded stages; the bytes that it takes on each."""
    sizes = []
    for stage in stages:
        modules = stage.adapters.load(spec, fetch_tensors(spec, stage.adapters.records(spec), None))
        sizes.append(sum(module.size_bytes for module in modules))
    return sizes


def through(stages: Sequence[ResidentStage], ids: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The logits of one pass through all stages."""
    positions, hidden = torch.arange(ids.shape[1])[None], ids
    for stage in stages:
        step = StepInput(
            input=hidden, attention_mask=None, position_ids=positions, use_cache=False, adapters=tuple(names)
        )
        hidden = stage.forward(step, None)
    return hidden
