"""Small values in Ray's GCS, under names of shardlift's own; they live as long as the cluster does. Blocking."""

from __future__ import annotations

from ray.experimental import internal_kv

_NAMESPACE = b"shardlift"


def put(key: str, value: bytes) -> None:
    internal_kv._internal_kv_put(key.encode(), value, namespace=_NAMESPACE)


def delete(key: str) -> None:
    """Twice is as good as once."""
    internal_kv._internal_kv_del(key.encode(), namespace=_NAMESPACE)


def get(key: str) -> bytes | None:
    value: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=_NAMESPACE)
    return value


def names(prefix: str) -> list[str]:
    """What follows `prefix` in each key that begins so."""
    keys = internal_kv._internal_kv_list(prefix.encode(), namespace=_NAMESPACE)
    return [bytes(key).decode().removeprefix(prefix) for key in keys]
