"""A stage's side of a save: plans its files, writes them or gives their bytes, while the stage serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from ..proto.v1 import saving_pb2
from ..proto.v1.errors import InvalidRequestError, ModelUnavailableError, SaveError
from .pipeline import StagePipeline
from .saving import PIECE_BYTES, SavedFile, SavePlan, StageSaver

T = TypeVar("T")

_SAVE_ID = re.compile(r"[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_LEAST_PROBE_BYTES, _MOST_PROBE_BYTES = 16, 4096
_STEP_BYTES = 32 << 20  # written between two words about it


def temporary(save_id: str, name: str = "") -> str:
    """The name that a file of a save goes by until all of them are whole; without `name`, the probe's."""
    return f".shardlift-{save_id}-{name}" if name else f".shardlift-{save_id}"


class SaveCall:
    """One save of one stage. Whatever ends it before `commit` has made its files final, `close` removes them."""

    def __init__(self, pipeline: StagePipeline) -> None:
        self._first_layer = pipeline.stage.cut.first
        self._is_first = pipeline.stage.cut.is_first
        self._saver = StageSaver(pipeline.stage, pipeline.between_layers)
        # One that ends with the save: OpenMP keeps a team of threads for each thread that has computed.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._begun: saving_pb2.SaveBegin | None = None
        self._plan: SavePlan | None = None
        self._written: dict[Path, Path] = {}
        self._closed = False

    async def begin(self, request: saving_pb2.SaveBegin) -> saving_pb2.SavePart:
        """Raises InvalidRequestError, and UnsupportedModelError for a model that has no such form."""
        if not _SAVE_ID.fullmatch(request.save_id):
            raise InvalidRequestError("a save's id is 32 hexadecimal digits")
        if request.folder and not os.path.isabs(request.folder):
            raise InvalidRequestError(f"the folder {request.folder!r} is no absolute path")
        if request.folder and not _LEAST_PROBE_BYTES <= len(request.probe) <= _MOST_PROBE_BYTES:
            raise InvalidRequestError(f"a probe of {len(request.probe)} bytes proves nothing: send 32")
        self._begun = request
        return await self._in_thread(lambda: self._begin(request))

    def _begin(self, request: saving_pb2.SaveBegin) -> saving_pb2.SavePart:
        sees = bool(request.folder) and _sees(request, f"stage-{self._first_layer}")
        plan = self._saver.plan(request.max_shard_bytes, keep_quantized_experts=request.keep_quantized_experts)
        self._plan = plan
        config, generation = self._saver.config_files() if self._is_first else (b"", b"")
        return saving_pb2.SavePart(
            file_bytes=[file.size_bytes for file in plan.files],
            sees_folder=sees,
            parameters=plan.parameters,
            config_json=config,
            generation_config_json=generation,
        )

    async def write(self, request: saving_pb2.SaveWrite) -> AsyncGenerator[saving_pb2.SaveResponse, None]:
        """Raises SaveError where the folder can't take the files."""
        self._check_open()
        if self._plan is None or self._begun is None:
            raise InvalidRequestError("a save has to begin before it is written")
        files, names = self._plan.files, list(request.names)
        if len(names) != len(files) or not all(map(_FILE_NAME.fullmatch, names)) or len(set(names)) < len(names):
            raise InvalidRequestError(f"{len(names)} names for {len(files)} files, or names that no such file can have")
        for number, (file, name) in enumerate(zip(files, names, strict=True)):
            for start in range(0, len(file.header), PIECE_BYTES):
                data = saving_pb2.SaveData(file=number, data=file.header[start : start + PIECE_BYTES])
                yield saving_pb2.SaveResponse(data=data)
            if request.to_folder:
                # Closed where the client goes, not when the generator is collected: its file is open.
                async with contextlib.aclosing(self._write(file, Path(self._begun.folder), name)) as writing:
                    async for done in writing:
                        yield saving_pb2.SaveResponse(progress=saving_pb2.SaveProgress(file=number, bytes=done))
                continue
            pieces = self._saver.data(file)
            while frame := await self._in_thread(partial(_next_frame, pieces)):
                yield saving_pb2.SaveResponse(data=saving_pb2.SaveData(file=number, data=frame))

    async def _write(self, file: SavedFile, folder: Path, name: str) -> AsyncGenerator[int, None]:
        """The bytes written so far, again and again."""
        assert self._begun is not None
        path = folder / temporary(self._begun.save_id, name)
        self._written[path] = folder / name
        with _told(path):
            out = await self._in_thread(lambda: path.open("xb"))
        try:
            pieces = self._saver.data(file)
            done = len(file.header)
            with _told(path):
                await self._in_thread(lambda: out.write(file.header))
            yield done
            while written := await self._in_thread(lambda: _write_some(out, pieces, path)):
                done += written
                yield done
            assert done == file.size_bytes
        finally:
            with _told(path):
                out.close()

    async def commit(self) -> None:
        """Gives the files their names."""

        def rename() -> None:
            for path, final in list(self._written.items()):
                with _told(final):
                    os.replace(path, final)
                del self._written[path]

        await self._in_thread(rename)

    async def close(self) -> None:
        """Returns once the thread has ended, and nothing temporary is left."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown)
        for path in self._written:
            with contextlib.suppress(OSError):
                path.unlink()
        self._plan = None

    def _check_open(self) -> None:
        if self._closed:
            raise ModelUnavailableError("the model is being unloaded")

    async def _in_thread(self, function: Callable[[], T]) -> T:
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _next_frame(pieces: Iterator[memoryview]) -> bytes:
    """The bytes of the next pieces, as many as make a message worth it; less than twice PIECE_BYTES."""
    frame, size = [], 0
    for piece in pieces:
        frame.append(bytes(piece))
        size += len(piece)
        if size >= PIECE_BYTES:
            break
    return b"".join(frame)


def _write_some(out: IO[bytes], pieces: Iterator[memoryview], path: Path) -> int:
    """Writes the next bytes, and gives how many; 0 after the last, when all are on the disk."""
    written = 0
    for piece in pieces:
        with _told(path):
            out.write(piece)
        written += len(piece)
        if written >= _STEP_BYTES:
            return written
    if not written:
        with _told(path):
            out.flush()
            os.fsync(out.fileno())
    return written


def _sees(request: saving_pb2.SaveBegin, own: str) -> bool:
    """Whether the client's folder is here, and takes files."""
    folder = Path(request.folder)
    try:
        descriptor = os.open(folder / temporary(request.save_id), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if file.read(len(request.probe) + 1) != request.probe:
                return False
        path = folder / temporary(request.save_id, own)
        path.open("xb").close()
        path.unlink()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path.name} can't be written in {path.parent}: {error.strerror}") from None
