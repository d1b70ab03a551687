"""The cluster's nodes by the names that people give them, and which of them are drained. Blocking: asks Ray's GCS.

What is drained is kept in the GCS itself, which lives as long as the nodes' ids mean anything: a restarted gateway
knows it, and so does one that comes up beside a new head (with GCS fault tolerance).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as ray_state

from ..proto.v1.errors import InvalidRequestError
from . import ray_kv

_DRAINED = "drained:"
_SHORTEST_ID = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that Ray takes for alive. name: as plans name it. by_ray: Ray itself is about to end it."""

    name: str
    node_id: str
    address: str
    hostname: str
    is_drained: bool
    by_ray: bool


def names(alive: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Id → name: a node's address; where several raylets share one, with the beginning of the id."""
    addresses = Counter(node["NodeManagerAddress"] for node in alive)
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        if addresses[node["NodeManagerAddress"]] == 1
        else f"{node['NodeManagerAddress']}-{node['NodeID'][:_SHORTEST_ID]}"
        for node in alive
    }


def order(node: Mapping[str, Any]) -> tuple[list[tuple[int, str]], str]:
    """By which nodes are sorted: addresses as numbers."""
    parts = node["NodeManagerAddress"].split(".")
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], node["NodeID"]


def nodes() -> list[Node]:
    """Those that Ray takes for alive, by address."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=order)
    named, marked, ending = names(alive), _marked(), ending_ids()
    return [
        Node(
            name=named[node["NodeID"]],
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            hostname=node["NodeManagerHostname"],
            is_drained=node["NodeID"] in marked | ending,
            by_ray=node["NodeID"] in ending,
        )
        for node in alive
    ]


def find(text: str, among: Sequence[Node]) -> Node:
    """The node that `text` means: its name, address, host name, or id (or the beginning of it).

    Raises InvalidRequestError where that is none, or several.
    """
    by_name = [node for node in among if text in (node.name, node.node_id)]
    others = [node for node in among if text in (node.address, node.hostname)]
    if len(text) >= _SHORTEST_ID:
        others += [node for node in among if node.node_id.startswith(text) and node not in others]
    found = by_name or others
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{node.name} ({node.node_id[:_SHORTEST_ID]})" for node in among[:16])
    more = f" and {len(among) - 16} more" if len(among) > 16 else ""
    problem = f"means {len(found)} nodes" if found else "is no node of this cluster"
    raise InvalidRequestError(f"{text[:80]!r} {problem}; nodes are {known}{more}")


def mark(node_id: str, *, drained: bool) -> None:
    """Keeps a node out of plans, or lets them use it again."""
    if drained:
        ray_kv.put(_DRAINED + node_id, b"1")
    else:
        ray_kv.delete(_DRAINED + node_id)


def drained_ids() -> set[str]:
    """Ids of the nodes that plans leave out."""
    return _marked() | ending_ids()


def ending_ids() -> set[str]:
    """Ids of the nodes that Ray itself is draining: their pod was told to end, or the autoscaler takes them."""
    return set(ray_state.get_draining_nodes())


def _marked() -> set[str]:
    return set(ray_kv.names(_DRAINED))
