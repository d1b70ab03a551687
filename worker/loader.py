"""From a stage's spec to a resident stage: bytes by range, converted, quantized, placed, measured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from ..proto.v1.errors import LoadCancelledError
from .anatomy import anatomy_of
from .fetch import RecordStream
from .records import DTYPES, HubToken, TensorRecord
from .residency import measure
from .skeleton import KeyMap, LazyTensor, build_skeleton, cut_skeleton, load_weights, loading_order, parse_config
from .sources import open_source
from .spec import ModuleBytes, StageSpec
from .stage import ResidentStage
from .tensors import dtype_by_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedStage:
    stage: ResidentStage
    fetched_bytes: int
    modules: tuple[ModuleBytes, ...]


class LoadProgress:
    """How far a load is. Written by its threads, read by any; `cancel` ends the load, even one that waits for bytes."""

    def __init__(self) -> None:
        self.fetched_bytes = 0
        self.tensors_loaded = 0
        self._cancelled = threading.Event()
        self._stream: RecordStream | None = None

    def cancel(self) -> None:
        self._cancelled.set()
        if self._stream is not None:
            self._stream.close()

    def attach(self, stream: RecordStream | None) -> None:
        """`stream` is what a cancelled load must no longer wait for; None once it is done with."""
        self._stream = stream

    def check(self) -> None:
        if self._cancelled.is_set():
            raise LoadCancelledError("the load was cancelled")


def load_stage(spec: StageSpec, token: HubToken, progress: LoadProgress) -> LoadedStage:
    """Loads the stage that `spec` describes.

    Holds no more of the checkpoint at a time than `spec.budget_bytes` and the tensor being converted. Raises the
    errors of sources, headers and skeleton; a failed load leaves nothing on the device.
    """
    config = parse_config(spec.config)
    skeleton = build_skeleton(
        config,
        dtype=dtype_by_name(spec.dtype),
        quantization=spec.quantization,
        device=spec.device,
        attn_implementation=spec.attn_implementation,
    )
    cut_skeleton(skeleton, spec.cut)
    records = {record.key: record for record in spec.records}
    order = [records[key] for key in loading_order(list(records), KeyMap(skeleton))]

    def on_progress(fetched_bytes: int) -> None:
        progress.fetched_bytes = fetched_bytes

    source = open_source(spec.source, token)
    try:
        with RecordStream(
            source, order, spec.versions, budget_bytes=spec.budget_bytes, on_progress=on_progress
        ) as stream:
            progress.attach(stream)
            progress.check()
            tensors = {
                record.key: LazyTensor(
                    record.dtype, record.shape, _reader(stream, record, progress, keep=spec.device == "cpu")
                )
                for record in order
            }
            model = load_weights(skeleton, tensors, spec.device)
            fetched_bytes = stream.fetched_bytes
    finally:
        progress.attach(None)
        source.close()
    model.generation_config = _generation_config(spec)
    modules = measure(model)
    return LoadedStage(
        stage=ResidentStage(model, anatomy_of(config.model_type), spec.cut, spec.device),
        fetched_bytes=fetched_bytes,
        modules=modules,
    )


def _reader(
    stream: RecordStream, record: TensorRecord, progress: LoadProgress, *, keep: bool
) -> Callable[[], torch.Tensor]:
    dtype = dtype_by_name(DTYPES[record.dtype][0])

    def read() -> torch.Tensor:
        progress.check()
        data = stream.take(record.key)
        tensor = torch.frombuffer(data, dtype=dtype) if record.numel else torch.empty(0, dtype=dtype)
        progress.tensors_loaded += 1
        # On a CPU the loader keeps the tensor it is given: it must not hold on to the chunk that this is a view of.
        return tensor.reshape(record.shape).clone() if keep else tensor.reshape(record.shape)

    return read


def _generation_config(spec: StageSpec) -> GenerationConfig:
    """As `from_pretrained` does: the checkpoint's own, else what its config implies."""
    if spec.generation_config is not None:
        return GenerationConfig.from_dict(dict(spec.generation_config))
    return GenerationConfig.from_model_config(parse_config(spec.config))
