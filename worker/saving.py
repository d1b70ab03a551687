"""A stage's part of a checkpoint folder: bitsandbytes' serialized form, under the names that transformers writes.

Nothing is gathered: files are planned from shapes, and then made tensor by tensor, while the stage serves.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from ..proto.v1.errors import UnsupportedModelError
from .anatomy import place_of
from .experts import PROJECTIONS, Experts4bit
from .headers import LENGTH_BYTES
from .packed import BITSANDBYTES, quantization_method
from .pristine import HeldTensor, Snapshot
from .records import DTYPES
from .rounding import rounds
from .skeleton import SavedGroup, saved_groups
from .stage import ResidentStage
from .tensors import dtype_name

PIECE_BYTES = 1 << 20
OnCompute = Callable[[Callable[[], Any]], Any]
Convert = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
_TAGS = {name: tag for tag, (name, _) in DTYPES.items()}
_COPY_BYTES = 64 << 20  # of a tensor on a GPU, brought to the host at a time
_METADATA = {"format": "pt"}  # which transformers demands


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor of a file that is to be written."""

    name: str
    held: HeldTensor

    @property
    def size_bytes(self) -> int:
        return prod(self.held.shape) * self.held.dtype.itemsize


class SavedFile:
    """A safetensors file, to be read piece by piece."""

    def __init__(self, tensors: list[SavedTensor]) -> None:
        # As safetensors' own writer: wide elements first, so that each tensor begins where torch can take it from.
        self._tensors = sorted(tensors, key=lambda tensor: -tensor.held.dtype.itemsize)
        self.header = _header(self._tensors)
        self.size_bytes = len(self.header) + sum(tensor.size_bytes for tensor in tensors)

    def data(self) -> Iterator[memoryview]:
        """What follows the header, in pieces of at most PIECE_BYTES. Holds one tensor at a time."""
        for tensor in self._tensors:
            done = 0
            for piece in _pieces(tensor.held.read()):
                done += len(piece)
                yield piece
            assert done == tensor.size_bytes, tensor.name


def _header(tensors: list[SavedTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": _METADATA}
    position = 0
    for tensor in tensors:
        end = position + tensor.size_bytes
        tag = _TAGS[dtype_name(tensor.held.dtype)]
        entries[tensor.name] = {"dtype": tag, "shape": list(tensor.held.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes. On a CPU by numpy: a thread that computes with torch has a team of threads of its own, which
    the computing one's would have to share the cores with."""
    if not tensor.numel():
        return
    if tensor.device.type == "cpu":
        flat = tensor.detach()
        if not flat.is_contiguous():
            flat = _contiguous(flat)
        bytes_ = flat.reshape(-1).view(torch.uint8)
    else:
        bytes_ = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in bytes_.split(_COPY_BYTES):
        data = part.cpu().numpy().data
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return torch.from_numpy(np.ascontiguousarray(tensor.view(bits).numpy())).view(tensor.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """parameters: how many the files hold, as transformers counts those of quantized weights."""

    files: list[SavedFile]
    parameters: int


class StageSaver:
    """Writes out a stage that serves. `on_compute` runs something quick between two passes, and gives its result.

    Its methods are for a thread of their own.
    """

    def __init__(self, stage: ResidentStage, on_compute: OnCompute) -> None:
        self._stage = stage
        self._on_compute = on_compute
        self._stream = torch.cuda.Stream(stage.device) if stage.device.type == "cuda" else None
        self._last: tuple[SavedGroup, dict[str, torch.Tensor]] | None = None

    def plan(self, max_shard_bytes: int, *, keep_quantized_experts: bool) -> SavePlan:
        """Raises UnsupportedModelError for weights that can't be brought into a checkpoint's form."""
        quantizer = getattr(self._stage.model, "hf_quantizer", None)
        said = {} if quantizer is None else {"quantization_config": quantizer.quantization_config.to_dict()}
        if (method := quantization_method(said)) not in ("", BITSANDBYTES):
            raise UnsupportedModelError(
                f"the model's weights are packed with {method}, and their kernels may have packed them otherwise than "
                "its checkpoint by now: copy that, or load it with dequantize=True (--dequantize)"
            )
        if rounds(self._stage.model):
            raise UnsupportedModelError(
                "the model rounds activations as its compressed-tensors checkpoint says, and beside unpacked weights "
                "that can't be said: copy the checkpoint, or load it with dequantize=True (--dequantize)"
            )
        tensors = self._saved(keep_quantized_experts)
        files: list[list[SavedTensor]] = []
        room = 0
        for tensor in tensors:
            if not files or tensor.size_bytes > room:
                files.append([])
                room = max_shard_bytes
            files[-1].append(tensor)
            room -= tensor.size_bytes
        return SavePlan(files=[SavedFile(file) for file in files], parameters=self._count())

    def data(self, file: SavedFile) -> Iterator[memoryview]:
        """As `file.data()`. On a GPU beside what it computes."""
        pieces = file.data()
        while True:
            with torch.cuda.stream(self._stream):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def config_files(self) -> tuple[bytes, bytes]:
        """`config.json` and `generation_config.json`, as transformers writes them. Of the first stage, whose first
        parameter is the whole model's."""
        model = self._stage.model
        config = copy.deepcopy(model.config)
        for each in (config, *(getattr(config, part) for part in config.sub_configs)):
            if each is not None:  # as transformers tells the parts of a config, too
                each.dtype = dtype_name(model.dtype)
        config.architectures = [type(model).__name__]
        if hasattr(config, "transformers_weights"):  # the name that the files had where they were read
            del config.transformers_weights
        generation = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
        return config.to_json_string(use_diff=True).encode(), generation.encode()

    # -- what there is ---------------------------------------------------------------------------------------------

    def _is_ours(self, name: str) -> bool:
        """Whether this stage, of those that hold it, writes it."""
        stage = self._stage
        place = place_of(name, stage.anatomy)
        return stage.cut.is_first if place.part == "shared" else place.held_by(stage.cut, tied=False)

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """The base's, whichever adapters are attached or deleted meanwhile."""
        found: list[tuple[str, nn.Module]] = self._on_compute(lambda: list(self._stage.adapters.base_modules()))
        return found

    def _tied(self) -> set[str]:
        """Names of parameters that are another's, here."""
        parameters = {
            _joined(path, name): parameter
            for path, module in self._modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        return {
            name
            for name, source in self._stage.model.all_tied_weights_keys.items()
            if name in parameters and parameters[name] is parameters.get(source)
        }

    def _count(self) -> int:
        tied, total = self._tied(), 0
        for path, module in self._modules():
            for name, parameter in module.named_parameters(recurse=False):
                full = _joined(path, name)
                if full in tied or not self._is_ours(full):
                    continue
                state = getattr(parameter, "quant_state", None)
                total += parameter.numel() if state is None else prod(state.shape)
        return total

    def _snapshot(self, module: nn.Module) -> Snapshot:
        def take() -> Snapshot:
            with self._stage.adapters.base_only():
                return self._stage.pristine.snapshot(module)

        snapshot: Snapshot = self._on_compute(take)
        return snapshot

    # -- what becomes of it ----------------------------------------------------------------------------------------

    def _saved(self, keep_quantized_experts: bool) -> list[SavedTensor]:
        """Every tensor that this stage writes, in the order of transformers' files."""
        model = self._stage.model
        left_out = self._tied() | set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        resident: dict[str, HeldTensor] = {}
        quantized: set[str] = set()
        experts: dict[str, Experts4bit] = {}
        for path, module in self._modules():
            if any(path.startswith(f"{each}.") for each in experts):
                continue
            if isinstance(module, Experts4bit):
                experts[path] = module
                resident |= {f"{path}.{name}": held for name, held in _merged(module, self._stage.dtype).items()}
                continue
            snapshot = self._snapshot(module)
            for name, held in self._stage.pristine.held(snapshot).items():
                full = _joined(path, name)
                if full in left_out or not self._is_ours(full):
                    continue
                resident[full] = HeldTensor(dtype=held.dtype, shape=held.shape, read=partial(self._read, module, name))
                is_quantized = snapshot.state is not None or snapshot.scales is not None
                if is_quantized and name.startswith("weight"):
                    quantized.add(full)
        meta = {name: torch.empty(held.shape, dtype=held.dtype, device="meta") for name, held in resident.items()}
        saved: list[SavedTensor] = []
        for group in saved_groups(model, self._stage.checkpoint_keys, meta):
            path = group.names[0].rpartition(".")[0]
            if path in experts:
                saved += self._saved_experts(path, experts[path], group, keep_quantized_experts)
            elif group.convert is None:
                [name], [as_saved] = group.names, group.saved
                saved.append(SavedTensor(name=as_saved, held=resident[name]))
            else:
                if found := sorted(quantized.intersection(group.names)):
                    raise UnsupportedModelError(
                        f"{found[0]} is quantized, and checkpoints of {model.config.model_type} models have it joined, "
                        "split or turned: quantized, there is no such checkpoint that transformers could load"
                    )
                saved += self._converted(group, group.convert, resident)
        return saved

    def _converted(
        self, group: SavedGroup, convert: Convert, resident: Mapping[str, HeldTensor]
    ) -> Iterator[SavedTensor]:
        def read(name: str) -> torch.Tensor:
            # The tensors of a group are read one after the other.
            if self._last is None or self._last[0] is not group:
                self._last = None
                self._last = group, convert({source: resident[source].read() for source in group.names})
            return self._last[1][name]

        for name, tensor in group.saved.items():
            held = HeldTensor(dtype=tensor.dtype, shape=tuple(tensor.shape), read=partial(read, name))
            yield SavedTensor(name=name, held=held)

    def _saved_experts(
        self, path: str, module: Experts4bit, group: SavedGroup, keep_quantized: bool
    ) -> Iterator[SavedTensor]:
        """Experts that were quantized one by one, under the names that checkpoints have for each of them."""
        [merged] = group.names
        # In this order transformers splits a common tensor: projection by projection, and of each expert by expert.
        places = [(each, number) for each in PROJECTIONS[merged.rpartition(".")[2]] for number in range(len(module))]
        if len(places) != len(group.saved):
            raise UnsupportedModelError(f"{merged} has no tensors of single experts in a checkpoint")
        for name, (projection, number) in zip(group.saved, places, strict=True):
            linear = module.get_submodule(f"{number}.{projection}")
            snapshot = self._snapshot(linear)
            if snapshot.state is not None and not keep_quantized:
                held = self._stage.pristine.dequantized(snapshot)
                read = partial(self._dequantize, linear)
                yield SavedTensor(name=name, held=HeldTensor(dtype=held.dtype, shape=held.shape, read=read))
                continue
            for part, held in self._stage.pristine.held(snapshot).items():
                read = partial(self._read, linear, part)
                yield SavedTensor(
                    name=name + part.removeprefix("weight"),
                    held=HeldTensor(dtype=held.dtype, shape=held.shape, read=read),
                )

    # Looked up when it is written: until then nothing is held on to.

    def _read(self, module: nn.Module, name: str) -> torch.Tensor:
        return self._stage.pristine.held(self._snapshot(module))[name].read()

    def _dequantize(self, module: nn.Module) -> torch.Tensor:
        return self._stage.pristine.dequantized(self._snapshot(module)).read()


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _merged(experts: Experts4bit, dtype: torch.dtype) -> dict[str, HeldTensor]:
    """What transformers has in the place of `experts`, of which there is only the shape."""

    def read() -> torch.Tensor:
        raise AssertionError("separate experts have no common tensor")

    shapes = {}
    for name, projections in PROJECTIONS.items():
        linears: list[Any] = [experts.get_submodule(f"0.{each}") for each in projections]
        shapes[name] = (len(experts), sum(each.out_features for each in linears), linears[0].in_features)
    return {name: HeldTensor(dtype=dtype, shape=shape, read=read) for name, shape in shapes.items()}
