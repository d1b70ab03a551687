"""`save_pretrained`: a resident model as a checkpoint folder, written by its workers or here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import grpc

from ..proto.v1 import saving_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError, SaveError
from .gateway import Gateway
from .outside import outside_level

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .described import DescribedModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")
# What safetensors itself takes for the longest header.
_MOST_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_WAYS = {
    None: saving_pb2.SAVE_WAY_UNSPECIFIED,
    True: saving_pb2.SAVE_WAY_FOLDER,
    False: saving_pb2.SAVE_WAY_STREAM,
}
_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProgress:
    """How far a save is: bytes of weights, of all stages together."""

    written_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """What `save_pretrained` takes beside the folder. shared: whether the workers write; None where they can. adapter:
    the one to save, in the place of the model."""

    max_shard_size: int | str = "50GB"
    variant: str | None = None
    shared: bool | None = None
    dequantize_experts: bool = True
    on_progress: Callable[[SaveProgress], None] | None = None
    adapter: str = ""

    def request(self, name: str) -> saving_pb2.SaveModelRequest:
        if isinstance(self.max_shard_size, bool) or not isinstance(self.max_shard_size, (int, str)):
            raise InvalidRequestError(
                f"max_shard_size is {self.max_shard_size!r}: bytes or a text like '5GB' is needed"
            )
        return saving_pb2.SaveModelRequest(
            name=name,
            max_shard_size=str(self.max_shard_size),
            variant=self.variant or "",
            way=_WAYS[self.shared],
            keep_quantized_experts=not self.dequantize_experts,
            adapter=self.adapter,
        )


class Stop:
    """Lets another thread end a save."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._call: Any = None

    def watch(self, call: Any) -> None:
        with self._lock:
            self._call = call
            if self._stopped:
                call.cancel()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._call is not None:
                self._call.cancel()


def save(
    gateway: Gateway,
    name: str,
    save_directory: str | os.PathLike[str],
    options: SaveOptions,
    *,
    generation_config: str | None = None,
    stop: Stop | None = None,
) -> list[str]:
    """Saves the model called `name`; gives the names of the files that are the checkpoint.

    generation_config: what to write in the place of the model's own. Raises SaveError where the folder can't take it.
    Until all is there, files have temporary names; whatever ends it earlier, they are removed.
    """
    request = options.request(name)
    folder = Path(os.path.abspath(os.fspath(save_directory)))
    with _folder(folder):
        save_id = secrets.token_hex(16)
        request.save_id, request.folder, request.probe = save_id, str(folder), secrets.token_bytes(32)
        try:
            with _told(folder):
                (folder / _temporary(save_id)).write_bytes(request.probe)
            files = _Files(folder, save_id, options.on_progress)
            call = gateway.registry_stream("SaveModel", request)
            if stop is not None:
                stop.watch(call)
            try:
                while (response := _next(gateway, call)) is not None:
                    files.take(response)
            finally:
                call.cancel()
                files.close()
            return files.finish_adapter() if options.adapter else files.finish(options.variant or "", generation_config)
        finally:
            for path in folder.glob(f"{_temporary(save_id)}*"):
                with contextlib.suppress(OSError):
                    path.unlink()


def _next(gateway: Gateway, call: Any) -> saving_pb2.SaveModelResponse | None:
    with gateway.errors():
        try:
            response: saving_pb2.SaveModelResponse = next(call)
            return response
        except StopIteration:
            return None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise SaveError("the save was cancelled: nothing of it is left") from None
            raise


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes the folder; takes it away again where it was new, nothing is in it, and the save failed."""
    if folder.exists() and not folder.is_dir():
        raise InvalidRequestError(f"{folder} is a file: save_pretrained writes into a folder")
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in missing:
                each.rmdir()
        raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path} can't be written: {error.strerror}") from None


def _temporary(save_id: str, name: str = "") -> str:
    """As the workers name theirs."""
    return f".shardlift-{save_id}-{name}" if name else f".shardlift-{save_id}"


class _File:
    """One file of the checkpoint while it comes. out: where its bytes go; None where a worker has the file."""

    def __init__(self, planned: saving_pb2.SaveFile, out: IO[bytes] | None, *, header_only: bool) -> None:
        self.name = planned.name
        self.size_bytes = planned.bytes
        self.is_weights = planned.weights
        self.written_bytes = 0
        self._out = out
        self._header_only = header_only
        self._header = bytearray()
        self._came = 0

    def add(self, data: bytes) -> None:
        self._came += len(data)
        if self._came > self.size_bytes:
            raise InternalError(f"{self.name} is longer than its {self.size_bytes:,} bytes")
        if self.is_weights and len(self._header) < self._header_end:
            self._header += data
            if self._header_end > min(_MOST_HEADER_BYTES, self.size_bytes):
                raise InternalError(f"{self.name} has a header of {self._header_end:,} bytes")
        if self._out is not None:
            self._out.write(data)
            self.written_bytes = self._came

    @property
    def _header_end(self) -> int:
        if len(self._header) < _LENGTH_BYTES:
            return _LENGTH_BYTES
        return _LENGTH_BYTES + int.from_bytes(self._header[:_LENGTH_BYTES], "little")

    def tensors(self) -> list[str]:
        """Names of the tensors in it."""
        entries = json.loads(self._header[_LENGTH_BYTES : self._header_end])
        return [name for name in entries if name != "__metadata__"]

    @property
    def data_bytes(self) -> int:
        return self.size_bytes - self._header_end

    def close(self) -> None:
        if self._out is not None:
            self._out.close()

    def check(self) -> None:
        """Raises InternalError unless all of it came."""
        needed = self._header_end if self._header_only else self.size_bytes
        if self._came < needed or (self._header_only and self.written_bytes != self.size_bytes):
            raise InternalError(f"{self.name} is not whole: {self._came:,} of {needed:,} bytes came")


class _Files:
    """What a save has brought so far."""

    def __init__(self, folder: Path, save_id: str, on_progress: Callable[[SaveProgress], None] | None) -> None:
        self._folder = folder
        self._save_id = save_id
        self._on_progress = on_progress
        self._files: list[_File] = []
        self._parameters = 0
        self._finished = False

    def take(self, response: saving_pb2.SaveModelResponse) -> None:
        match response.WhichOneof("event"):
            case "planned":
                with _told(self._folder):
                    self._plan(response.planned)
            case "data":
                with _told(self._folder):
                    self._file(response.data.file).add(response.data.data)
                self._tell()
            case "progress":
                self._file(response.progress.file).written_bytes = response.progress.bytes
                self._tell()
            case "warning":
                warnings.warn(response.warning, stacklevel=outside_level())
            case "finished":
                self._finished = True

    def _plan(self, planned: saving_pb2.SavePlanned) -> None:
        names = [file.name for file in planned.files]
        if self._files or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
            raise InternalError("the gateway names files that can't be those of a checkpoint")
        self._parameters = planned.parameters
        own_bytes = sum(file.bytes for file in planned.files if not (file.weights and planned.stages_write))
        free = shutil.disk_usage(self._folder).free
        if own_bytes > free:
            raise SaveError(f"{self._folder} has {free:,} bytes free, and the checkpoint needs {own_bytes:,}")
        for file in planned.files:
            header_only = file.weights and planned.stages_write
            out = None if header_only else (self._folder / _temporary(self._save_id, file.name)).open("xb")
            self._files.append(_File(file, out, header_only=header_only))

    def _file(self, number: int) -> _File:
        if number >= len(self._files):
            raise InternalError(f"the gateway sends file {number} of {len(self._files)}")
        return self._files[number]

    def _tell(self) -> None:
        if self._on_progress is not None:
            weights = [file for file in self._files if file.is_weights]
            self._on_progress(
                SaveProgress(
                    written_bytes=sum(file.written_bytes for file in weights),
                    total_bytes=sum(file.size_bytes for file in weights),
                )
            )

    def close(self) -> None:
        for file in self._files:
            with _told(self._folder):
                file.close()

    def finish_adapter(self) -> list[str]:
        """Gives the files their names, the config's last."""
        self._check()
        names = [file.name for file in self._files]
        with _told(self._folder):
            for name in reversed(names):
                os.replace(self._folder / _temporary(self._save_id, name), self._folder / name)
        return names

    def _check(self) -> None:
        if not self._finished:
            raise InternalError("the gateway's report of the save stopped before its end")
        for file in self._files:
            file.check()

    def finish(self, variant: str, generation_config: str | None) -> list[str]:
        """Gives the files their names, removes those of an earlier save, and writes the index last."""
        self._check()
        weights = [file for file in self._files if file.is_weights]
        small = [file.name for file in self._files if not file.is_weights]
        index = self._index(weights)
        with _told(self._folder):
            if any((self._folder / name).exists() for name in small if name not in _CONFIGS):
                # A tokenizer is there already, which may be another than the model came with.
                small = [name for name in small if name in _CONFIGS]
            if generation_config is not None:
                path = self._folder / _temporary(self._save_id, "generation_config.json")
                path.write_text(generation_config, encoding="utf-8")
            names = [file.name for file in weights]
            for name in [*names, *small]:
                path = self._folder / _temporary(self._save_id, name)
                if path.exists():
                    os.replace(path, self._folder / name)
            stem = f"model.{variant}" if variant else "model"
            index_name = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
            self._remove_older(stem, index_name, names)
            if len(names) > 1:
                path = self._folder / _temporary(self._save_id, index_name)
                path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                os.replace(path, self._folder / index_name)
                names.append(index_name)
        return [*names, *small]

    def _index(self, weights: list[_File]) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        for file in weights:
            for tensor in file.tensors():
                if tensor in weight_map:
                    raise InternalError(f"{tensor} is in {weight_map[tensor]} and in {file.name}")
                weight_map[tensor] = file.name
        sizes = {"total_parameters": self._parameters, "total_size": sum(file.data_bytes for file in weights)}
        return {"metadata": sizes, "weight_map": weight_map}

    def _remove_older(self, stem: str, index_name: str, names: list[str]) -> None:
        """What another save left, and a reader would take in the place of this one's files, or beside them."""
        for path in list(self._folder.iterdir()):
            rest = path.name.removeprefix(stem)
            is_shard = path.name.startswith(stem) and _SHARD.fullmatch(rest) is not None
            is_other = path.name in (f"{stem}.safetensors", index_name)
            if (is_shard or is_other) and path.name not in names and path.is_file():
                path.unlink()


# Of transformers' arguments those that can't be otherwise: names are those of checkpoints, an adapter's are peft's, and
# what is written is safetensors.
_USUAL = {"save_peft_format": True, "save_original_format": True, "distributed_checkpoint": False}


def _weight_names(variant: str) -> list[str]:
    """Patterns of the names that weights and their index have."""
    stem, index = (f"model.{variant}", f".{variant}") if variant else ("model", "")
    return [f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"model.safetensors.index{index}.json"]


def _adapter_of(model: DescribedModel) -> str:
    """The adapter that transformers would save in the place of the model: the one that it computes with; "" for none.

    Raises InvalidRequestError for several.
    """
    used = model.adapters_used()
    if len(used) > 1:
        raise InvalidRequestError(
            f"adapters {used} are active, and several are not saved together: model.set_adapter(one of them), then "
            "model.save_pretrained(folder), for each; or model.disable_adapters() to save the base"
        )
    return "".join(used)


def save_pretrained(
    model: DescribedModel,
    gateway: Gateway,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    safe_serialization: bool = True,
    stop: Stop | None = None,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> CommitInfo | None:
    """What both handles' `save_pretrained` do. What the Hub says of the commit, where there was one."""
    if state_dict is not None:
        raise InvalidRequestError("state_dict is not supported: what the workers hold is saved")
    if not safe_serialization:
        raise InvalidRequestError("safe_serialization=False is not supported: only safetensors are written")
    for name, usual in _USUAL.items():
        if (value := options.pop(name, usual)) != usual:
            raise InvalidRequestError(f"{name}={value!r} is not supported: it is always {usual}")
    if tags := options.pop("tags", None):
        raise InvalidRequestError(
            f"tags={tags!r} is not supported, since no model card is written: push, and then call "
            "huggingface_hub.metadata_update(repo_id, {'tags': […]})"
        )
    if not is_main_process:
        return None
    folder = os.path.abspath(os.fspath(save_directory))
    adapter = _adapter_of(model)
    for path in (model.info_path, *model.adapter_paths()):
        if os.path.isdir(path) and os.path.realpath(path) == os.path.realpath(folder):
            raise InvalidRequestError(
                f"{folder} is what {model.name} was loaded from, and a lost stage is loaded from there again: save it "
                "elsewhere"
            )
    changed = None
    if not adapter and model.changed_generation_config is not None:
        changed = model.changed_generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    files = save(
        gateway, model.name, folder, SaveOptions(**options, adapter=adapter), generation_config=changed, stop=stop
    )
    if not push_to_hub:
        return None
    from .pushing import push_folder

    return push_folder(
        folder,
        files,
        repo_id or os.path.basename(folder),
        older=[] if adapter else _weight_names(options.get("variant") or ""),
        token=token,
        private=private,
        revision=revision,
        commit_message=commit_message,
        commit_description=commit_description,
        create_pr=create_pr,
    )


def push_to_hub(model: DescribedModel, gateway: Gateway, repo_id: str, **arguments: Any) -> CommitInfo:
    """What both handles' `push_to_hub` do: a save into a folder that goes away again, and a commit of it."""
    with tempfile.TemporaryDirectory(prefix="shardlift-push-") as folder:
        commit = save_pretrained(model, gateway, folder, push_to_hub=True, repo_id=repo_id, **arguments)
        assert commit is not None
        return commit
