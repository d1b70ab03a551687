"""What both clients say of a checkpoint to plan or load, and what they make of the report of a load. No I/O."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import InternalError
from . import options
from .hub_token import hub_token
from .trace_file import TraceFile
from .values import LoadEvent, ModelInfo, load_event

_SOURCE = ("revision", "subfolder", "variant", "cache_dir", "trust_remote_code", "local_files_only")


def describe(
    request: registry_pb2.PlanModelRequest | registry_pb2.LoadModelRequest,
    path: str | os.PathLike[str],
    token: str | bool | None,
    address: str,
    arguments: Mapping[str, Any],
) -> None:
    """Puts source and options into `request`, from the arguments of `from_pretrained`."""
    where = {name: value for name, value in arguments.items() if name in _SOURCE}
    how = {name: value for name, value in arguments.items() if name not in _SOURCE}
    request.options.CopyFrom(options.load_options(**how))
    request.source.CopyFrom(options.source(path, token=hub_token(token, address), **where))


class LoadReport:
    """What a load tells: passed on to `on_event` and `trace_file` as it comes."""

    def __init__(self, on_event: Callable[[LoadEvent], None] | None, trace_file: TraceFile | None) -> None:
        self._on_event = on_event
        self._trace_file = trace_file
        self._ready: ModelInfo | None = None

    def take(self, response: registry_pb2.LoadModelResponse) -> None:
        if response.WhichOneof("event") == "trace":
            if self._trace_file is not None:
                self._trace_file.add(response.trace)
            return
        event = load_event(response)
        if isinstance(event, ModelInfo):
            self._ready = event
        if event is not None and self._on_event is not None:
            self._on_event(event)

    @property
    def ready(self) -> ModelInfo:
        """The model, once the report is over."""
        if self._ready is None:
            raise InternalError("the gateway's report of the load stopped before its end")
        return self._ready
