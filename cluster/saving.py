"""A model as a checkpoint folder of its client's: numbers the stages' files, and passes on what they give."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio

from ..proto.v1 import saving_pb2, stage_pb2_grpc
from ..proto.v1.credentials import stage_channel
from ..proto.v1.errors import (
    InternalError,
    InvalidRequestError,
    ModelUnavailableError,
    SaveError,
    ShardliftError,
    one_line,
)
from ..proto.v1.saving_pb2 import SaveModelResponse, SaveRequest, SaveResponse
from ..proto.v1.status import from_rpc_error, sent_by_us
from ..proto.v1.tls import TLS
from ..proto.v1.wire import FRAME_BYTES, STAGE_CHANNEL_OPTIONS
from ..worker.byte_sizes import parse_size
from ..worker.sources import open_source
from .adapters import CONFIG_FILE, WEIGHTS_FILE
from .registry import Registry
from .resident import Resident

logger = logging.getLogger(__name__)

_DEFAULT_SHARD_SIZE = "50GB"  # transformers'
_MOST_FILES = 99_999  # what five digits number
_VARIANT = re.compile(r"[A-Za-z0-9_-]{0,64}")
_WAITING = 2  # messages of each stage that wait for the client


async def save(registry: Registry, request: saving_pb2.SaveModelRequest) -> AsyncIterator[SaveModelResponse]:
    """What a save tells its client, to the end. When this is closed, or fails, the stages take back what they wrote.

    Raises InvalidRequestError, SaveError, UnsupportedModelError, ModelNotFoundError and ModelUnavailableError; of an
    adapter, what its source raises.
    """
    if not _VARIANT.fullmatch(request.variant):
        raise InvalidRequestError(f"variant {request.variant!r} is no part of a file's name: letters, digits, - and _")
    if request.way == saving_pb2.SAVE_WAY_FOLDER and not request.folder:
        raise InvalidRequestError("the workers can't write without a folder")
    resident = await registry.ready_resident(request.name)
    if request.adapter:
        async for response in _save_adapter(resident, request.adapter):
            yield response
        return
    calls = [
        _StageCall(index, address, resident.metadata, resident.tls) for index, address in enumerate(resident.addresses)
    ]
    try:
        async for response in _save(resident, calls, request):
            yield response
    finally:
        await asyncio.gather(*(call.close() for call in calls))


async def _save(
    resident: Resident, calls: Sequence[_StageCall], request: saving_pb2.SaveModelRequest
) -> AsyncIterator[SaveModelResponse]:
    begin = saving_pb2.SaveBegin(
        folder="" if request.way == saving_pb2.SAVE_WAY_STREAM else request.folder,
        save_id=request.save_id,
        probe=request.probe,
        max_shard_bytes=parse_size(request.max_shard_size or _DEFAULT_SHARD_SIZE),
        keep_quantized_experts=request.keep_quantized_experts,
    )
    answers = await asyncio.gather(*(call.ask(SaveRequest(begin=begin), "part") for call in calls))
    parts = [answer.part for answer in answers]
    blind = [index for index, part in enumerate(parts) if not part.sees_folder]
    if blind and request.way == saving_pb2.SAVE_WAY_FOLDER:
        places = ", ".join(sorted({resident.info.plan.stages[index].node for index in blind}))
        raise SaveError(
            f"the workers on {places} don't see {request.folder} as its client does, or can't write there: choose a "
            "folder that every node shares, or have the bytes streamed (shared=False)"
        )
    names = _names([len(part.file_bytes) for part in parts], request.variant)
    files = [
        saving_pb2.SaveFile(name=name, bytes=size, weights=True)
        for part, of_stage in zip(parts, names, strict=True)
        for name, size in zip(of_stage, part.file_bytes, strict=True)
    ]
    small = {"config.json": parts[0].config_json, "generation_config.json": parts[0].generation_config_json}
    try:
        small |= await asyncio.to_thread(resident.tokenizer_files)
    except ShardliftError as error:
        yield SaveModelResponse(warning=f"the tokenizer is not saved: it can't be read any more ({one_line(error)})")
    small_files = [saving_pb2.SaveFile(name=name, bytes=len(data)) for name, data in small.items()]
    yield SaveModelResponse(
        planned=saving_pb2.SavePlanned(
            stages_write=not blind, files=[*files, *small_files], parameters=sum(part.parameters for part in parts)
        )
    )
    for number, data in enumerate(small.values(), len(files)):
        for start in range(0, len(data), FRAME_BYTES):
            piece = saving_pb2.SaveData(file=number, data=data[start : start + FRAME_BYTES])
            yield SaveModelResponse(data=piece)
    first = 0
    streams = []
    for call, of_stage in zip(calls, names, strict=True):
        streams.append(call.write(saving_pb2.SaveWrite(names=of_stage, to_folder=not blind), first))
        first += len(of_stage)
    async for response in _merged(streams):
        yield response
    await asyncio.gather(*(call.ask(SaveRequest(commit=saving_pb2.SaveCommit()), "committed") for call in calls))
    yield SaveModelResponse(finished=saving_pb2.SaveFinished())


async def _save_adapter(resident: Resident, name: str) -> AsyncIterator[SaveModelResponse]:
    """The adapter's files from where it was loaded: nothing has changed it since."""
    attached = resident.adapters.get(name)
    if attached is None:
        raise InvalidRequestError(
            f"model {resident.info.name} has no adapter {name!r}; loaded: {', '.join(resident.adapters) or 'none'}"
        )
    spec = attached.spec
    [(file, version)] = spec.versions.items()
    config = json.dumps(dict(spec.config), indent=2, sort_keys=True).encode()
    source = open_source(spec.source, resident.adapter_token(name))
    try:
        yield SaveModelResponse(
            planned=saving_pb2.SavePlanned(
                files=[
                    saving_pb2.SaveFile(name=CONFIG_FILE, bytes=len(config)),
                    saving_pb2.SaveFile(name=WEIGHTS_FILE, bytes=version.size_bytes),
                ]
            )
        )
        yield SaveModelResponse(data=saving_pb2.SaveData(file=0, data=config))
        for start in range(0, version.size_bytes, FRAME_BYTES):
            piece = bytearray(min(FRAME_BYTES, version.size_bytes - start))
            await asyncio.to_thread(source.read_into, file, start, memoryview(piece), version)
            yield SaveModelResponse(data=saving_pb2.SaveData(file=1, data=bytes(piece)))
    finally:
        source.close()
    yield SaveModelResponse(finished=saving_pb2.SaveFinished())


def _names(counts: Sequence[int], variant: str) -> list[list[str]]:
    """Names of each stage's files, of which it has so many: as transformers gives them."""
    total = sum(counts)
    if total > _MOST_FILES:
        raise InvalidRequestError(f"max_shard_size would make {total:,} files of this; at most {_MOST_FILES:,} can be")
    stem = f"model.{variant}" if variant else "model"
    if total == 1:
        return [[f"{stem}.safetensors"] * count for count in counts]
    numbers: Iterator[int] = iter(range(1, total + 1))
    return [[f"{stem}-{next(numbers):05d}-of-{total:05d}.safetensors" for _ in range(count)] for count in counts]


class _StageCall:
    """The Save call to one stage."""

    def __init__(self, index: int, address: str, metadata: list[tuple[str, str]], tls: TLS | None) -> None:
        self._index = index
        self._address = address
        self._channel = stage_channel(address, tls, STAGE_CHANNEL_OPTIONS)
        self._call: Any = stage_pb2_grpc.StageServiceStub(self._channel).Save(metadata=metadata)

    async def ask(self, request: SaveRequest, answer: str) -> SaveResponse:
        await self._send(request)
        response = await self._next()
        if response.WhichOneof("event") != answer:
            raise InternalError(f"stage {self._index} answered with {response.WhichOneof('event')}, not {answer}")
        return response

    async def write(self, request: saving_pb2.SaveWrite, first: int) -> AsyncIterator[SaveModelResponse]:
        """What the stage gives, its files counted on from `first`."""
        await self._send(SaveRequest(write=request))
        while (response := await self._next()).WhichOneof("event") != "written":
            if response.HasField("data"):
                response.data.file += first
                yield SaveModelResponse(data=response.data)
            else:
                response.progress.file += first
                yield SaveModelResponse(progress=response.progress)

    async def _send(self, request: SaveRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._explained(error) from None

    async def _next(self) -> SaveResponse:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise await self._explained(error) from None
        if not isinstance(response, SaveResponse):
            raise await self._explained(None)
        return response

    async def _explained(self, error: BaseException | None) -> Exception:
        """What has ended the call."""
        if not isinstance(error, grpc.aio.AioRpcError):
            try:
                await self._call  # raises it
            except grpc.aio.AioRpcError as raised:
                error = raised
        if isinstance(error, grpc.aio.AioRpcError) and sent_by_us(error):
            return from_rpc_error(error, self._address)
        return ModelUnavailableError(
            f"stage {self._index} was lost while it was being saved: once the model is ready again, save it anew"
        )

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)


async def _merged(streams: Sequence[AsyncIterator[SaveModelResponse]]) -> AsyncIterator[SaveModelResponse]:
    """All that the streams give, as it comes; no faster than it is taken. The first failure ends all."""
    queue: asyncio.Queue[SaveModelResponse | Exception | None] = asyncio.Queue(maxsize=_WAITING * len(streams))

    async def pass_on(stream: AsyncIterator[SaveModelResponse]) -> None:
        try:
            async for response in stream:
                await queue.put(response)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pass_on(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            response = await queue.get()
            if isinstance(response, Exception):
                raise response
            if response is None:
                left -= 1
            else:
                yield response
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
