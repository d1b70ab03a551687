"""Where adapters find room on the devices of a resident model, and what is then left for keys and values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import OutOfMemoryError
from ..worker.byte_sizes import format_size
from .plan import room_bytes


def kv_tokens_beside(stages: Sequence[registry_pb2.StagePlan], adapter_bytes: Sequence[int], name: str) -> int:
    """Tokens that have room on every stage beside adapters of so many bytes on each; 0 where that isn't known.

    What the plan has left of a node's memory is taken first, then what it has set aside for keys and values, but for
    what `reserve_tokens` has promised. A GPU's rest is slack, and stays that. name: the adapter to blame.
    """
    tokens = []
    for stage, held_bytes in zip(stages, adapter_bytes, strict=True):
        if not stage.kv_budget_bytes:
            continue
        planned = stage.resident_bytes + stage.workspace_bytes + stage.kv_budget_bytes
        spare = 0 if stage.device.startswith("cuda") else max(0, stage.capacity_bytes - planned)
        left = stage.kv_budget_bytes - max(0, held_bytes - spare)
        least = max(stage.kv_bytes, stage.kv_bytes_per_token)
        if left < least:
            room = spare + stage.kv_budget_bytes - least
            raise OutOfMemoryError(
                f"adapter {name} needs {format_size(held_bytes)} on {stage.node}/{stage.device}, those that are there "
                f"counted, and {format_size(max(0, room))} are free beside the model and reserved tokens: delete an "
                "adapter, or load the model over more devices or with fewer reserve_tokens"
            )
        if stage.kv_bytes_per_token:
            tokens.append(left // stage.kv_bytes_per_token)
    return min(tokens, default=0)


def rooms_beside(stages: Sequence[registry_pb2.StagePlan], adapter_bytes: Sequence[int]) -> list[tuple[int, int]]:
    """What adapters of so many bytes leave of the stages' rooms (see SessionLimits). Empty where it isn't known."""
    if not all(stage.capacity_bytes for stage in stages):
        return []
    return [
        (
            room_bytes(
                is_gpu=stage.device.startswith("cuda"),
                capacity_bytes=stage.capacity_bytes,
                resident_bytes=stage.resident_bytes,
                workspace_bytes=stage.workspace_bytes,
                kv_budget_bytes=stage.kv_budget_bytes,
            )
            - held_bytes,
            stage.kv_bytes_per_token,
        )
        for stage, held_bytes in zip(stages, adapter_bytes, strict=True)
    ]


def added(sizes: Iterable[Sequence[int]], stages: int) -> list[int]:
    """What adapters take together, stage by stage."""
    total = [0] * stages
    for each in sizes:
        total = [one + other for one, other in zip(total, each, strict=True)]
    return total
