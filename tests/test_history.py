"""What a session was fed, fed again to another, makes the same keys and values: to the bit of the next logits."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator

import pytest
import torch

from shardlift.cluster.history import History
from shardlift.proto.v1 import inference_pb2
from shardlift.worker.tensors import to_message
from tests.support import checkpoints, ring
from tests.support.quantization import nf4
from tests.support.session import Session


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    return checkpoints.tiny(request.param, tmp_path_factory.mktemp(request.param), dtype="bfloat16")


@pytest.fixture(params=[True, False], ids=["batches", "singly"])
async def pipeline(request: pytest.FixtureRequest, folder: object) -> AsyncIterator[ring.Ring]:
    stages = ring.load(folder, (2,), quantization=nf4().to_dict(), dtype="bfloat16")  # type: ignore[arg-type]
    async with ring.serve(stages, batches=request.param) as serving:
        yield serving
        await serving.idle()


class Life:
    """A session that does what chance says, and its history."""

    def __init__(self, pipeline: ring.Ring, seed: int) -> None:
        self.chance = random.Random(seed)
        self.session = Session(pipeline)
        self.history = History()
        self.mask = torch.empty((0, 0), dtype=torch.bool)

    async def act(self) -> None:
        chance, session = self.chance, self.session
        request = inference_pb2.SessionRequest()
        ends = list(itertools.accumulate(each.length for each in self.history._passes))[:-1]
        # A pass that is cut has other shapes when it comes again, and a window that has moved on is computed anew.
        if ends and chance.random() < 0.3 and session.length < 16:
            request.keep = chance.choice(ends)
            self.mask = self.mask[:, : request.keep]
        if session.length and chance.random() < 0.3:
            request.rows.extend(chance.randrange(session.rows) for _ in range(chance.randrange(1, 4)))
            self.mask = self.mask[list(request.rows)]
        rows = len(self.mask) or 2
        length = chance.randrange(1, 9)
        new = torch.tensor([[chance.randrange(3, 250) for _ in range(length)] for _ in range(rows)])
        seen = torch.ones_like(new, dtype=torch.bool)
        if not session.length:
            seen[0, : min(2, new.shape[1] - 1)] = False  # padding
        self.mask = torch.cat([self.mask.reshape(rows, -1), seen], dim=1)
        if chance.random() < 0.5:
            positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            request.forward.CopyFrom(
                inference_pb2.ForwardRequest(
                    input_ids=to_message(new), attention_mask=to_message(self.mask), position_ids=to_message(positions)
                )
            )
        else:
            request.generate.CopyFrom(
                inference_pb2.GenerateRequest(
                    input_ids=to_message(new), attention_mask=to_message(self.mask), seed=chance.randrange(99)
                )
            )
            count = chance.randrange(1, 6)
            request.generate.generation.update({"max_new_tokens": count, "do_sample": chance.random() < 0.5})
        given = {name: getattr(request, name) for name in ("forward", "generate") if request.HasField(name)}
        keep = request.keep if request.HasField("keep") else None
        _, steps = await session.act(**given, rows=request.rows, keep=keep)
        if request.HasField("keep"):
            self.history.keep(request.keep)
        if request.rows:
            self.history.select(request.rows)
        if request.HasField("forward"):
            self.history.add_forward(request.forward)
        else:
            self.history.add_generation(request.generate, session.rows, steps)
            cached = torch.ones((rows, len(steps) - 1), dtype=torch.bool)
            self.mask = torch.cat([self.mask, cached], dim=1)
        assert self.history.length == session.length


@pytest.mark.parametrize("seed", range(3))
async def test_a_replayed_session_goes_on_to_the_same_bits(pipeline: ring.Ring, seed: int) -> None:
    life = Life(pipeline, seed)
    for _ in range(7):
        await life.act()
        again = Session(pipeline)
        for past in life.history.replay():
            await again.act(forward=past)
        assert (again.length, again.rows) == (life.session.length, life.session.rows)
        token = torch.full((again.rows, 1), 7)
        life.mask = torch.cat([life.mask, torch.ones((again.rows, 1), dtype=torch.bool)], dim=1)
        look = inference_pb2.ForwardRequest(input_ids=to_message(token), attention_mask=to_message(life.mask))
        ours, _ = await again.act(forward=look)
        expected, _ = await life.session.act(forward=look)
        assert torch.equal(ours, expected)
        life.history.add_forward(look)
        await again.close()
    await life.session.close()
