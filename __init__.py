"""shardlift: `AutoModelForCausalLM.from_pretrained` for a whole cluster.

Importing this package takes neither ray nor torch: a client needs both only when it touches a tensor or starts
a local instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .client.aio import AsyncClient, connect_async
from .client.auto import AutoModelForCausalLM
from .client.connection import Client, connect
from .proto.v1.errors import ShardliftError
from .proto.v1.tls import TLS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

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


def __getattr__(name: str) -> Any:
    # transformers' own class, taken only when asked for: it imports torch.
    if name == "BitsAndBytesConfig":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
