"""shardlift: `AutoModelForCausalLM.from_pretrained` for a whole cluster.

Importing this package takes neither ray nor torch: a client needs both only when it touches a tensor or starts
a local instance.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from .client.aio import AsyncClient, connect_async
    from .client.auto import AutoModelForCausalLM
    from .client.connection import Client, connect
    from .proto.v1.errors import ShardliftError
    from .proto.v1.tls import TLS

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "AsyncClient",
    "AutoModelForCausalLM",
    "BitsAndBytesConfig",
    "Client",
    "ShardliftError",
    "__version__",
    "connect",
    "connect_async",
]

# Where each is, taken when it is asked for: transformers' own class imports torch, ours import gRPC, about which the
# command line has something to say before (client/cli), and which the gateway's process takes by itself.
_HOMES = {
    "TLS": ".proto.v1.tls",
    "AsyncClient": ".client.aio",
    "AutoModelForCausalLM": ".client.auto",
    "BitsAndBytesConfig": "transformers",
    "Client": ".client.connection",
    "ShardliftError": ".proto.v1.errors",
    "connect": ".client.connection",
    "connect_async": ".client.aio",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
