"""`connect`, and the client that it returns: everything that a gateway can be asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import GatewayUnavailableError, LoadCancelledError, ModelNotFoundError
from ..proto.v1.tls import TLS
from . import gateway
from .channel import CONNECT_TIMEOUT_S
from .describe import LoadReport, describe
from .gateway import Gateway
from .handle import RemoteModel
from .nodes import DrainReport, Finding, NodeInfo, StageMove, findings_of
from .patience import RETRY_S, Patience
from .trace_file import TraceFile
from .values import CachedPart, LoadEvent, ModelInfo, Plan
from .views import ClusterView

# Planning reads every header of the checkpoint, from wherever it is.
PLAN_TIMEOUT_S = 600.0
# Every node is asked, by a process that may have to start first.
CACHE_TIMEOUT_S = 120.0


class Client:
    """A connection to one gateway, made by `connect`. A context manager; thread-safe."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    @property
    def address(self) -> str:
        """The gateway's "host:port"."""
        return self._gateway.address

    def close(self) -> None:
        """Ends the connection. Handles that came from this client are closed with it."""
        self._gateway.close()

    def models(self) -> list[RemoteModel]:
        """The handle for every model in the registry, loading ones too."""
        return [RemoteModel(self._gateway, info.name, info) for info in self.infos()]

    def infos(self) -> list[ModelInfo]:
        """What the registry knows of every model."""
        answer = self._gateway.ask("ListModels", registry_pb2.ListModelsRequest())
        return [ModelInfo.from_proto(info) for info in answer.models]

    def model(self, name: str) -> RemoteModel:
        """The handle for the model called `name`. Raises ModelNotFoundError."""
        model = RemoteModel(self._gateway, name)
        model.info()
        return model

    def unload(self, name: str) -> None:
        """Takes the model called `name` out of the cluster; a load that still runs is cancelled."""
        RemoteModel(self._gateway, name).unload()

    def plan(self, path: str | os.PathLike[str], *, token: str | bool | None = None, **arguments: Any) -> Plan:
        """Which layers would go where, and how many bytes that takes. Moves nothing.

        Takes the arguments of `from_pretrained`. Raises CheckpointError, or OutOfMemoryError when it doesn't fit.
        """
        request = registry_pb2.PlanModelRequest()
        describe(request, path, token, self.address, arguments)
        return Plan.from_proto(self._gateway.ask("PlanModel", request, timeout_s=PLAN_TIMEOUT_S).plan)

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        token: str | bool | None = None,
        trace: str | os.PathLike[str] | None = None,
        on_event: Callable[[LoadEvent], None] | None = None,
        **arguments: Any,
    ) -> RemoteModel:
        """Loads a model and returns its handle once it is resident.

        Takes the arguments of `from_pretrained`. `on_event` is told what happens: LoadStarted, Plan, StagePlaced,
        StageProgress, LoadWarning, and in the end ModelInfo. Ctrl-C, or an exception of `on_event`, cancels the load.
        `trace` names a file for the timeline of all workers, in Chrome's trace format.
        """
        request = registry_pb2.LoadModelRequest(name=name or "")
        describe(request, path, token, self.address, {**arguments, "trace": trace is not None})
        with TraceFile(trace) if trace is not None else contextlib.nullcontext() as trace_file:
            ready = self._follow(self._gateway.registry_stream("LoadModel", request), on_event, trace_file)
        return RemoteModel(self._gateway, ready.name, ready)

    def _follow(
        self, call: Any, on_event: Callable[[LoadEvent], None] | None, trace_file: TraceFile | None
    ) -> ModelInfo:
        """Passes on what the load tells, to its end."""
        report = LoadReport(on_event, trace_file)
        try:
            while (response := self._next(call)) is not None:
                report.take(response)
        finally:
            call.cancel()
        return report.ready

    def cluster(self, model: str | None = None) -> ClusterView:
        """The cluster as it is now: nodes and devices, models laid over them, what has happened lately. With `model`,
        what concerns that one; raises ModelNotFoundError where there is none."""
        request = registry_pb2.DescribeClusterRequest(model=model or "")
        return ClusterView.from_proto(self._gateway.ask("DescribeCluster", request).cluster)

    def watch(self, model: str | None = None, *, interval_s: float = 1.0) -> Iterator[ClusterView]:
        """As `cluster`, at once and whenever it has changed; with `model`, until that is unloaded.

        A gateway that goes is waited for, as by every question. Raises ModelNotFoundError where there is no `model` to
        begin with.
        """
        request = registry_pb2.WatchClusterRequest(model=model or "", interval_s=interval_s)
        is_known = False
        patience = Patience(self._gateway.retry_s)
        while True:
            try:
                call = self._gateway.registry_stream("WatchCluster", request)
                try:
                    while True:
                        with self._gateway.errors():
                            response = next(call, None)
                        if response is None:
                            return
                        is_known, patience = True, Patience(self._gateway.retry_s)
                        yield ClusterView.from_proto(response.cluster)
                finally:
                    call.cancel()
            except ModelNotFoundError:
                if not is_known:
                    raise
                return
            except GatewayUnavailableError as error:
                self._gateway.wait_for_return(patience, error)

    def cached_parts(self) -> list[CachedPart]:
        """The quantized parts that the cluster's nodes keep for later loads."""
        answer = self._gateway.ask("ListCachedParts", registry_pb2.ListCachedPartsRequest(), timeout_s=CACHE_TIMEOUT_S)
        return [CachedPart.from_proto(part) for part in answer.parts]

    def clear_cached_parts(self) -> int:
        """Removes them from every node; resident models stay. Returns the bytes freed."""
        request = registry_pb2.ClearCachedPartsRequest()
        return int(self._gateway.ask("ClearCachedParts", request, timeout_s=CACHE_TIMEOUT_S).bytes)

    def nodes(self) -> list[NodeInfo]:
        """The cluster's nodes, with the stages on each, and which of them are drained."""
        return [
            NodeInfo.from_proto(node) for node in self._gateway.ask("ListNodes", registry_pb2.ListNodesRequest()).nodes
        ]

    def drain(
        self, node: str, *, timeout_s: float | None = None, on_move: Callable[[StageMove], None] | None = None
    ) -> tuple[NodeInfo, list[StageMove]]:
        """Keeps `node` (its name, address, host name or Ray id) out of new plans, and moves its stages elsewhere.

        Each is loaded there before it is taken into use; calls pause for that, and go on. Returns once nothing is on
        the node: the node, and the moves. `on_move` is told of each move as it begins, and as it is done. Raises
        OutOfMemoryError where there is no room, with nothing touched. Given up, or after `timeout_s`, moves that are
        not done are taken back; the node stays out of plans.
        """
        report = DrainReport(on_move)
        call = self._gateway.registry_stream("DrainNode", registry_pb2.DrainNodeRequest(node=node), timeout_s=timeout_s)
        try:
            with self._gateway.errors():
                for response in call:
                    report.take(response)
        finally:
            call.cancel()
        return report.result()

    def undrain(self, node: str) -> NodeInfo:
        """Lets plans use `node` again. What was moved stays where it is."""
        answer = self._gateway.ask("UndrainNode", registry_pb2.UndrainNodeRequest(node=node))
        return NodeInfo.from_proto(answer.node)

    def diagnose(self, *, timeout_s: float = 0.0) -> Iterator[Finding]:
        """Findings about every node and what lies between them, as they come. timeout_s: for each node's answers; by
        default 60. The first is the gateway's version."""
        request = registry_pb2.DiagnoseClusterRequest(timeout_s=timeout_s)
        call = self._gateway.registry_stream("DiagnoseCluster", request)
        try:
            with self._gateway.errors():
                for response in call:
                    yield from findings_of(response)
        finally:
            call.cancel()

    def _next(self, call: Any) -> registry_pb2.LoadModelResponse | None:
        with self._gateway.errors():
            try:
                return next(call)
            except StopIteration:
                return None
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise LoadCancelledError("the load was cancelled") from None
                raise


def connect(
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    retry_s: float = RETRY_S,
    tls: TLS | None = None,
) -> Client:
    """A client of the gateway at `address` ("host:port"), else at $SHARDLIFT_ADDRESS, else of the local instance.

    "grpcs://host:port" asks for TLS, "grpc://host:port" for plain text. `tls` names files for it; by default
    $SHARDLIFT_TLS_CA, $SHARDLIFT_TLS_CLIENT_CERT and $SHARDLIFT_TLS_CLIENT_KEY do, each of which asks for TLS, too.

    `token` defaults to $SHARDLIFT_TOKEN, and for the local instance to the one it was started with. Raises
    GatewayUnavailableError when nobody answers within `timeout_s` seconds, AuthenticationError when TLS fails. A
    gateway that is lost later is waited for up to `retry_s` seconds: a generation then goes on where it was, a question
    is asked again.
    """
    return Client(gateway.resolve(address, token, start=False, timeout_s=timeout_s, retry_s=retry_s, tls=tls))


def connect_or_start(address: str | None = None, token: str | None = None) -> Client:
    """As `connect`, but where no gateway is named and none runs here, starts the local instance."""
    return Client(gateway.resolve(address, token, start=True, timeout_s=CONNECT_TIMEOUT_S))
