"""Nothing is compressed unless somebody asks for it: what would shrink to little is counted where it passes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import torch

import shardlift
from tests.support import checkpoints, ring
from tests.support.ring_gateway import NAME, serving

# The same token everywhere: hidden states and logits are the same at every position, too.
IDS = torch.full((1, 2000), 7)
WIDTH, VOCABULARY = 64, 256


class Wire:
    """A relay before `address`, which counts the bytes that pass towards it and from it."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self.sent = self.received = 0

    @contextlib.asynccontextmanager
    async def laid(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        with contextlib.suppress(asyncio.CancelledError):  # at the loop's end
            await asyncio.gather(self._pass(reader, back, "sent"), self._pass(there, writer, "received"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_between_stages(tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path, max_position_embeddings=4096)
    async with ring.serve(ring.load(folder, (1, 3))) as pipeline, contextlib.AsyncExitStack() as laid:
        wires = [Wire(address) for address in pipeline.addresses]
        addresses = [await laid.enter_async_context(wire.laid()) for wire in wires]
        for index, server in enumerate(pipeline.servers):
            await server.join(addresses[(index + 1) % 3])
        session = pipeline.session()
        logits = await session(IDS, logits_to_keep=1)
        await session.close()
        assert logits.shape == (1, 1, VOCABULARY)
        # Ids into the first stage, hidden states into the others; positions into each.
        for wire, token_bytes in zip(wires, (8, 4 * WIDTH, 4 * WIDTH), strict=True):
            least = IDS.numel() * (token_bytes + 4)
            assert least < wire.sent < 1.1 * least
        for server, address in zip(pipeline.servers, pipeline.addresses[1:] + pipeline.addresses[:1], strict=True):
            await server.join(address)


def test_between_client_and_gateway(tmp_path: Path) -> None:
    with serving(checkpoints.tiny("llama", tmp_path, max_position_embeddings=4096), (2,)) as served:
        wire, laid = Wire(served.address), contextlib.AsyncExitStack()
        address = served.call(lambda: laid.enter_async_context(wire.laid()))
        expected = IDS.numel() * VOCABULARY * 4
        with shardlift.connect(address) as client:
            logits = client.model(NAME)(IDS).logits
            assert expected < wire.received < 1.1 * expected
            assert IDS.numel() * 8 < wire.sent < IDS.numel() * 8 + 30_000
        # What it would have been, had somebody asked.
        before = wire.sent
        with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
            call = channel.stream_stream(
                "/shardlift.v1.InferenceService/Forward", request_serializer=bytes, response_deserializer=bytes
            )
            request = shardlift.client.forward.request(NAME, IDS).SerializeToString()
            assert list(call(iter([request])))
        assert wire.sent - before < IDS.numel()
        assert torch.equal(logits[0, 0].argmax(), logits[0, -1].argmax())
        served.call(laid.aclose)
