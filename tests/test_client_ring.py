"""The handle on real stages in this process, against transformers: what it drives step by step, and sessions.

There is no gateway between them: the client talks to the last stage as the gateway would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers

from shardlift.client import channel
from shardlift.client.gateway import Gateway
from shardlift.client.handle import RemoteModel
from shardlift.client.values import ModelInfo
from shardlift.proto.v1 import inference_pb2_grpc, registry_pb2
from shardlift.worker.service import SECRET_HEADER, StageServer
from tests.support import checkpoints, ring

# A plain one, windows beside full attention, a cache that the family itself throws away, positions that are learnt.
FAMILIES = ["llama", "gemma3_text", "phi3", "gpt2"]
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}


class StageSecret(channel._Bearer):
    def __init__(self) -> None:
        self._metadata = (SECRET_HEADER, ring.SECRET)


@contextlib.contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two stages of the checkpoint, in an event loop of their own; gives the last one's address."""
    stages = ring.load(folder, [1])
    addresses: list[str] = []
    started, start = threading.Event(), StageServer.start

    async def noted(self: StageServer, host: str) -> str:
        addresses.append(await start(self, host))
        return addresses[-1]

    async def serve() -> None:
        nonlocal loop, over
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with ring.serve(stages) as running:
                started.set()
                await over.wait()
                await running.idle()
        finally:
            started.set()

    loop: asyncio.AbstractEventLoop | None = None
    over: asyncio.Event | None = None
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(StageServer, "start", noted)
    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    assert not failures
    try:
        yield addresses[-1]
    finally:
        assert loop is not None
        assert over is not None
        loop.call_soon_threadsafe(over.set)
        thread.join()
    assert not failures, failures  # such as a session that a stage still held


@pytest.fixture(params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, RemoteModel]]:
    """The model in one process, and the handle for its stages."""
    folder = checkpoints.tiny(request.param, tmp_path)
    local = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    defaults = {key: value for key, value in local.generation_config.to_dict().items() if value is not None}
    info = ModelInfo.from_proto(
        registry_pb2.ModelInfo(
            name="model",
            config_json=json.dumps(local.config.to_dict()),
            generation_config_json=json.dumps(defaults),
            plan=registry_pb2.Plan(dtype="float32", stages=[registry_pb2.StagePlan()]),
        )
    )
    with serving(folder, monkeypatch) as address:
        gateway = Gateway(address, None)
        signed = grpc.intercept_channel(gateway._channel, StageSecret())
        gateway._inference = inference_pb2_grpc.InferenceServiceStub(signed)
        gateway._connected = True  # a stage answers no question after its health
        try:
            yield local, RemoteModel(gateway, "model", info)
        finally:
            gateway.close()


def prompts(local: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids, the first of them padded on the left, and their mask."""
    torch.manual_seed(0)
    ids = torch.randint(5, local.config.vocab_size, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def test_what_is_driven_step_by_step(pair: tuple[Any, RemoteModel]) -> None:
    local, model = pair
    ids, mask = prompts(local)
    repeated = ids[:1].repeat(1, 3)
    for given, arguments in (
        (ids, {"num_beams": 3, "num_return_sequences": 2}),
        (ids, {"num_beams": 3, "attention_mask": mask}),
        (ids, {"num_beams": 2, "prefill_chunk_size": 3}),
        (ids, {"guidance_scale": 1.5}),
        (ids, {"prefix_allowed_tokens_fn": lambda batch, past: list(range(5, local.config.vocab_size, 2))}),
        (repeated, {"prompt_lookup_num_tokens": 3}),
    ):
        expected = local.generate(given, **ARGUMENTS, **arguments)
        assert torch.equal(model.generate(given, **ARGUMENTS, **arguments), expected), arguments


def test_a_session(pair: tuple[Any, RemoteModel]) -> None:
    local, model = pair
    ids, mask = prompts(local)
    new = torch.randint(5, local.config.vocab_size, (2, 4))
    whole = torch.cat([mask, torch.ones(2, 14, dtype=torch.long)], dim=1)
    with model.session() as session:
        first = session.generate(ids, attention_mask=mask, **ARGUMENTS)
        assert torch.equal(first, local.generate(ids, attention_mask=mask, **ARGUMENTS))
        following = local.generate(torch.cat([first, new], dim=1), attention_mask=whole, **ARGUMENTS)
        assert torch.equal(session.generate(new, **ARGUMENTS), following)
        session.rollback(first.shape[1])
        assert torch.equal(session.generate(new, **ARGUMENTS), following)
        session.rollback(9)
        retold = local.generate(first[:, :9], attention_mask=whole[:, :9], **ARGUMENTS)
        assert torch.equal(session.generate(**ARGUMENTS), retold)
        session.rollback(0)
        assert torch.equal(session.generate(ids[:1], **ARGUMENTS), local.generate(ids[:1], **ARGUMENTS))
