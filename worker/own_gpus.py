"""The GPUs of this process's node as Ray counts them: by their place among those that its raylet was given."""

from __future__ import annotations

import ray
from ray._private import worker as ray_worker


def visible() -> list[str] | None:
    """What the raylet was started with in CUDA_VISIBLE_DEVICES: indices or UUIDs, in its order; None for all GPUs.

    Read in a worker process, whose own variable Ray has set to the GPU that it may use.
    """
    known = getattr(ray_worker.global_worker, "original_visible_accelerator_ids", None) or {}
    found = known.get("GPU")
    return None if found is None else [str(each) for each in found]


def among_visible(rows: list[list[str]]) -> list[list[str]]:
    """Of `nvidia-smi`'s rows, which begin with a GPU's index and its UUID, those that the raylet was given, in its
    order: by index or by (the beginning of) their UUID."""
    among = visible()
    if among is None:
        return rows
    return [row for each in among for row in rows if row[0] == each or (each and row[1].startswith(each))]


def own() -> int | None:
    """The place of the GPU that this worker holds, from 0; None if it holds none."""
    ids = ray.get_gpu_ids()
    if not ids:
        return None
    among = visible()
    return among.index(str(ids[0])) if among is not None else int(ids[0])
