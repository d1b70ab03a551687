"""Requests of more tokens than fit into gRPC's 4 MB: whole to the last stage, and from stage to stage in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shardlift.proto.v1 import errors
from shardlift.proto.v1.limits import MOST_TOKENS
from shardlift.proto.v1.wire import FRAME_BYTES
from tests.support import checkpoints
from tests.support.ring_gateway import Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), layers=2), (1,)) as running:
        yield running


def test_masks_and_positions_over_a_frame_reach_the_next_stage(served: Served) -> None:
    ids = torch.randint(3, 250, (2400, 120), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    assert ids.numel() * 4 > FRAME_BYTES  # its positions, of 32 bits
    logits = served.model(ids, attention_mask=mask, logits_to_keep=1).logits
    few = served.model(ids[:2], attention_mask=mask[:2], logits_to_keep=1).logits
    torch.testing.assert_close(logits[:2], few, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 10_000), (4096, 1024)])
def test_as_many_tokens_as_a_request_may_have_are_read(served: Served, shape: tuple[int, int]) -> None:
    """And what is wrong with the last of them is found, so nothing has to be computed here."""
    ids = torch.full(shape, 7)
    ids[-1, -1] = 100_000
    assert ids.numel() * 8 > 4 << 20
    assert ids.numel() <= MOST_TOKENS
    for ask in (
        lambda: served.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1),
        lambda: served.model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1),
    ):
        with pytest.raises(errors.InvalidRequestError, match="token id 100000 is outside the vocabulary"):
            ask()
