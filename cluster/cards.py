"""Cards of resident models in Ray's GCS: what is left of a model whose workers have all gone at once. Blocking.

The workers are the registry's truth, and each carries its model's card. This copy is looked at where none of them
answers, by a controller that was not there when they went. It lives as long as the cluster does, and goes with the
model. It holds no token, and no secret of the stages.
"""

from __future__ import annotations

from . import ray_kv

_CARD = "card:"


def keep(load: str, card: bytes) -> None:
    """load: "model:load_id"."""
    ray_kv.put(_CARD + load, card)


def forget(load: str) -> None:
    """Twice is as good as once."""
    ray_kv.delete(_CARD + load)


def find() -> dict[str, bytes]:
    """Every card, by its load."""
    found = {load: ray_kv.get(_CARD + load) for load in ray_kv.names(_CARD)}
    return {load: card for load, card in found.items() if card is not None}
