"""Cards of resident models in Ray's GCS: what is left of a model whose workers have all gone at once. Blocking.

The workers are the registry's truth, and each carries its model's card. This copy is looked at where none of them
answers, by a controller that was not there when they went. It lives as long as the cluster does, and goes with the
model. It holds no token, and no secret of the stages.
"""

from __future__ import annotations

from ray.experimental import internal_kv

_KV_NAMESPACE = b"shardlift"
_CARD = b"card:"


def keep(load: str, card: bytes) -> None:
    """load: "model:load_id"."""
    internal_kv._internal_kv_put(_CARD + load.encode(), card, namespace=_KV_NAMESPACE)


def forget(load: str) -> None:
    """Twice is as good as once."""
    internal_kv._internal_kv_del(_CARD + load.encode(), namespace=_KV_NAMESPACE)


def find() -> dict[str, bytes]:
    """Every card, by its load."""
    found = {}
    for key in internal_kv._internal_kv_list(_CARD, namespace=_KV_NAMESPACE):
        card = internal_kv._internal_kv_get(key, namespace=_KV_NAMESPACE)
        if card is not None:
            found[bytes(key).removeprefix(_CARD).decode()] = card
    return found
