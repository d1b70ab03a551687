"""From a stage's spec to a resident stage: bytes by range, converted, quantized, placed, measured, kept for later."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import bitsandbytes
import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..proto.v1.errors import CorruptCheckpointError, LoadCancelledError, OutOfMemoryError, one_line
from . import quantize_cpu
from .fetch import RecordStream
from .packed import StoredTensor, stored_tensors
from .part_cache import PartCache, is_worth_keeping, key_of
from .part_file import PartFile
from .records import DTYPES, FileVersion, HubToken, TensorRecord
from .remote_code import import_code
from .residency import footprint, measure
from .serialized import serialize
from .skeleton import (
    KeyMap,
    LazyTensor,
    ParameterInfo,
    Skeleton,
    build_skeleton,
    cut_skeleton,
    load_weights,
    loading_order,
    parse_config,
    restore_weights,
)
from .sources import Cancel, Source, open_source
from .spec import LoadSnapshot, ModuleBytes, StageSpec
from .stage import ResidentStage
from .staging import HostStaging
from .tensors import dtype_by_name
from .timeline import BUILD, CAST, CONVERT, QUANTIZE, STORE, WAIT, Timeline
from .unpack import unpack

logger = logging.getLogger(__name__)

# A tensor that stays as it is has its own memory from this size on; a smaller one is copied out of what was fetched.
_ALONE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedStage:
    """A stage, resident. `keep` writes it into the node's cache; None where it is there, or isn't wanted.

    On a CPU `keep` must run before the stage's first pass, which may change how weights lie in memory.
    """

    stage: ResidentStage
    fetched_bytes: int
    cached_bytes: int
    modules: tuple[ModuleBytes, ...]
    link: str
    parameter_bytes: int
    buffer_bytes: int
    keep: Callable[[], None] | None


class LoadProgress:
    """How far a load is. Written by its threads, read by any; `cancel` ends the load, even one that waits for bytes."""

    def __init__(self, *, trace: bool = False) -> None:
        self.timeline = Timeline(keep_spans=trace)
        self.cancelled = Cancel()
        self._fetched_bytes = self._total_bytes = self._loaded_bytes = self._tensors_loaded = self._tensors = 0
        self._is_cached = False

    def snapshot(self) -> LoadSnapshot:
        return LoadSnapshot(
            fetched_bytes=self._fetched_bytes,
            total_bytes=self._total_bytes,
            loaded_bytes=self._loaded_bytes,
            tensors_loaded=self._tensors_loaded,
            tensors=self._tensors,
            is_cached=self._is_cached,
        )

    def cancel(self) -> None:
        self.cancelled.set()

    def check(self) -> None:
        if self.cancelled.is_set:
            raise LoadCancelledError("the load was cancelled")

    def begin(self, records: Sequence[TensorRecord], *, is_cached: bool) -> None:
        """What follows is counted from nothing."""
        self._total_bytes, self._tensors = sum(record.size_bytes for record in records), len(records)
        self._fetched_bytes = self._loaded_bytes = self._tensors_loaded = 0
        self._is_cached = is_cached

    def fetched(self, fetched_bytes: int) -> None:
        self._fetched_bytes = fetched_bytes

    def loaded(self, record: TensorRecord) -> None:
        self._loaded_bytes += record.size_bytes
        self._tensors_loaded += 1


def load_stage(spec: StageSpec, token: HubToken, progress: LoadProgress, cache: PartCache | None = None) -> LoadedStage:
    """Loads the stage that `spec` describes, from `cache` if it is there.

    Holds no more of the checkpoint at a time than `spec.budget_bytes` and the tensor being converted. Raises the
    errors of sources, headers and skeleton, and OutOfMemoryError; a failed load leaves nothing on the device.
    """
    try:
        return _load(spec, token, progress, cache)
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = one_line(error, 200)
    # Here, where the traceback no longer holds what was loaded so far.
    raise OutOfMemoryError(
        f"{spec.device} has no room for stage {spec.index} of {spec.num_stages} ({text}): free memory there, quantize "
        "to 4 bits, use more stages, or lower staging_budget"
    )


def _load(spec: StageSpec, token: HubToken, progress: LoadProgress, cache: PartCache | None) -> LoadedStage:
    quantize_cpu.install()
    if not is_worth_keeping(spec):
        cache = None
    key = "" if cache is None else key_of(spec, _device_class(spec.device), _versions())
    if cache is not None and (part := cache.find(key)) is not None:
        loaded = _load_cached(spec, part, token, progress)
        if loaded is not None:
            return loaded
        cache.drop(key)
        # What was loaded of it hangs in the error's frames, and there may be no room for both.
        gc.collect()
        if spec.device.startswith("cuda"):
            torch.cuda.empty_cache()
    skeleton = _build(spec, token, progress)
    source = open_source(spec.source, token)
    try:
        model, fetched_bytes = _load_records(spec, skeleton, source, progress)
        link = source.link
    finally:
        source.close()

    def keep() -> None:
        assert cache is not None
        with progress.timeline.span(STORE):
            tensors = serialize(model, skip=skeleton.tied_weights)
            cache.store(key, tensors, _about(spec), progress.cancelled)

    return LoadedStage(
        stage=_resident(spec, skeleton),
        fetched_bytes=fetched_bytes,
        cached_bytes=0,
        modules=measure(model),
        **footprint(model),
        link=link,
        keep=keep if cache is not None else None,
    )


def _load_cached(spec: StageSpec, part: PartFile, token: HubToken, progress: LoadProgress) -> LoadedStage | None:
    """None for a part that turns out not to be sound."""
    try:
        return _load_part(spec, part, token, progress)
    except CorruptCheckpointError as error:
        logger.warning("dropping a cached part: %s", one_line(error))
        return None
    finally:
        part.close()


def _load_part(spec: StageSpec, part: PartFile, token: HubToken, progress: LoadProgress) -> LoadedStage:
    skeleton = _build(spec, token, progress)
    records = list(part.records.values())
    progress.begin(records, is_cached=True)
    kept = {record.key for record in records if record.size_bytes >= _ALONE_BYTES}
    with _streaming(spec, part, records, {part.path.name: part.version}, kept, progress) as take:

        def take_kept(name: str) -> torch.Tensor:
            tensor = take(part.records[name])
            return tensor if name in kept else tensor.clone()

        with _converting(progress.timeline):
            model = restore_weights(skeleton, list(part.records), take_kept, spec.device)
    return LoadedStage(
        stage=_resident(spec, skeleton),
        fetched_bytes=0,
        cached_bytes=part.size_bytes,
        modules=measure(model),
        **footprint(model),
        link=part.link,
        keep=None,
    )


def _build(spec: StageSpec, token: HubToken, progress: LoadProgress) -> Skeleton:
    progress.check()
    with progress.timeline.span(BUILD):
        code = None if spec.code is None else import_code(spec.code, spec.source, token)
        skeleton = build_skeleton(
            parse_config(spec.config, code),
            dtype=dtype_by_name(spec.dtype),
            quantization=spec.quantization,
            device=spec.device,
            attn_implementation=spec.attn_implementation,
            quantize_experts=spec.quantize_experts,
            anatomy=spec.anatomy,
            code=code,
            keep_packing=spec.keep_packing,
            rounding=None if spec.packing is None else spec.packing.rounding,
        )
        cut_skeleton(skeleton, spec.cut)
    return skeleton


def _load_records(
    spec: StageSpec, skeleton: Skeleton, source: Source, progress: LoadProgress
) -> tuple[PreTrainedModel, int]:
    """The model, and the bytes fetched for it."""
    stored = stored_tensors({record.key: record for record in spec.records}, spec.packing)
    key_map = KeyMap(skeleton)
    order = [stored[key] for key in loading_order(list(stored), key_map)]
    infos = {info.name: info for info in skeleton.parameters()}
    places = {key: key_map(key) for key in stored}
    targets = {key: infos.get(target) for key, (target, _) in places.items()}
    # Copied into their parameter, and cast by that, as they are read.
    merged = {key for key, (_, pattern) in places.items() if key_map.merges(pattern)}
    kept = {tensor.key for tensor in order if _is_kept(tensor, targets[tensor.key], skeleton)} - merged
    records = [record for tensor in order for record in tensor.parts.values()]
    progress.begin(records, is_cached=False)
    large = {key for key in kept if stored[key].size_bytes >= _ALONE_BYTES}
    timeline = progress.timeline
    with _streaming(spec, source, records, spec.versions, large, progress) as take:

        def reader(stored: StoredTensor) -> Callable[[], torch.Tensor]:
            target = targets[stored.key]

            def read_packed() -> torch.Tensor:
                parts = {role: take(record) for role, record in stored.parts.items()}
                dtype = skeleton.dtype if target is None else dtype_by_name(target.dtype)
                assert spec.packing is not None
                with timeline.span(CAST, stored.key, stored.size_bytes):
                    return unpack(stored.key, parts, stored.shape, spec.packing, dtype)

            def read() -> torch.Tensor:
                tensor = take(stored.parts[""])
                dtype = tensor.dtype if target is None else _dtype_there(tensor.dtype, target, skeleton)
                if dtype != tensor.dtype and stored.key not in merged:
                    # What the loader would do next: here it is seen, and happens on the device.
                    with timeline.span(CAST, stored.key, stored.size_bytes):
                        return tensor.to(dtype)
                # The loader keeps what it is given: it must not hold on to the chunk that this is a view of.
                return tensor.clone() if stored.key in kept and stored.key not in large else tensor

            return read_packed if stored.is_packed else read

        tensors = {
            tensor.key: LazyTensor(next(iter(tensor.parts.values())).dtype, tensor.shape, reader(tensor))
            for tensor in order
        }
        with _converting(timeline):
            model = load_weights(skeleton, tensors, spec.device, timeline)
        for file in spec.versions:
            source.verify(file, spec.versions[file])
    return model, progress.snapshot().fetched_bytes


def _is_kept(stored: StoredTensor, target: ParameterInfo | None, skeleton: Skeleton) -> bool:
    """Whether the tensor that was read is itself what stays: neither quantized nor cast."""
    if stored.is_packed:
        return False
    dtype = DTYPES[stored.parts[""].dtype][0]
    if target is None:
        return True
    if target.quantized and not skeleton.is_prequantized:
        return False
    return _dtype_there(dtype_by_name(dtype), target, skeleton) == dtype_by_name(dtype)


def _dtype_there(dtype: torch.dtype, target: ParameterInfo, skeleton: Skeleton) -> torch.dtype:
    """What a tensor of `dtype` is cast to for `target`: what bitsandbytes has quantized stays as it is, and so do the
    integers that weights are packed in."""
    if skeleton.is_prequantized and target.quantized:
        return dtype
    if skeleton.keeps_packing and not dtype.is_floating_point:
        return dtype
    return dtype_by_name(target.dtype)


@contextlib.contextmanager
def _streaming(
    spec: StageSpec,
    source: Source,
    records: Sequence[TensorRecord],
    versions: Mapping[str, FileVersion],
    alone: set[str],
    progress: LoadProgress,
) -> Iterator[Callable[[TensorRecord], torch.Tensor]]:
    """What gives each record as a tensor on the stage's device, waiting for it; a cancelled load is told at once."""
    timeline = progress.timeline
    cuda = None
    if spec.device.startswith("cuda"):
        from .staging_cuda import CudaStaging

        cuda = CudaStaging(
            torch.device(spec.device), timeline, budget_bytes=spec.budget_bytes, connections=spec.connections
        )
    stream: RecordStream[memoryview | torch.Tensor] = RecordStream(
        source,
        records,
        versions,
        cuda or HostStaging(),
        budget_bytes=cuda.stream_bytes if cuda is not None else spec.budget_bytes,
        connections=spec.connections,
        alone=alone,
        on_progress=progress.fetched,
        timeline=timeline,
    )

    def take(record: TensorRecord) -> torch.Tensor:
        progress.check()
        with timeline.span(WAIT, record.key, record.size_bytes):
            data = stream.take(record.key)
        progress.loaded(record)
        dtype = dtype_by_name(DTYPES[record.dtype][0])
        if not record.numel:
            return torch.empty(record.shape, dtype=dtype, device=spec.device)
        flat = data.view(dtype) if isinstance(data, torch.Tensor) else torch.frombuffer(data, dtype=dtype)
        return flat.reshape(record.shape)

    try:
        with stream, progress.cancelled.calling(stream.close):
            progress.check()
            yield take
            if cuda is not None:
                with timeline.span(QUANTIZE):
                    # Only now is it done.
                    torch.cuda.synchronize(spec.device)
    finally:
        if cuda is not None:
            cuda.close()


@contextlib.contextmanager
def _converting(timeline: Timeline) -> Iterator[None]:
    """Counts as "convert" what is left of the context's time beside the other phases of this thread."""
    phases = (WAIT, CAST, QUANTIZE)
    before = timeline.seconds(*phases)
    started = time.perf_counter()
    try:
        yield
    finally:
        inside = timeline.seconds(*phases) - before
        timeline.count(CONVERT, max(0.0, time.perf_counter() - started - inside))


def _resident(spec: StageSpec, skeleton: Skeleton) -> ResidentStage:
    """The stage that `skeleton` has become, its weights loaded."""
    skeleton.model.generation_config = _generation_config(spec, skeleton.model.config)
    keys = tuple(record.key for record in spec.records)
    return ResidentStage(skeleton.model, skeleton.anatomy, spec.cut, spec.device, checkpoint_keys=keys)


def _generation_config(spec: StageSpec, config: PreTrainedConfig) -> GenerationConfig:
    """As `from_pretrained` does: the checkpoint's own, else what its config implies."""
    if spec.generation_config is not None:
        return GenerationConfig.from_dict(dict(spec.generation_config))
    return GenerationConfig.from_model_config(config)


# ---- the cache's side ------------------------------------------------------------------------------------------------


def _device_class(device: str) -> str:
    """Devices that quantize to the same bytes. That CPUs and GPUs do is not known."""
    if not device.startswith("cuda"):
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-{major}.{minor}"


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }


def _about(spec: StageSpec) -> dict[str, object]:
    """What people are told of a part."""
    return {
        "model": spec.source.location,
        "commit": spec.source.commit,
        "layers": [spec.cut.first, spec.cut.end - 1],
        "quantization": dict(spec.quantization) if spec.quantization else None,
        "quantize_experts": spec.quantize_experts,
        "dtype": spec.dtype,
        "device": _device_class(spec.device),
        **_versions(),
    }
