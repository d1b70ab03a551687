"""`connect_async`, and the client that it returns: everything that a gateway can be asked, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from ..proto.v1 import registry_pb2
from ..proto.v1.errors import GatewayUnavailableError, LoadCancelledError, ModelNotFoundError
from ..proto.v1.tls import TLS
from . import gateway
from .async_gateway import AsyncGateway, at_end, receive
from .async_handle import AsyncRemoteModel
from .channel import CONNECT_TIMEOUT_S
from .connection import CACHE_TIMEOUT_S, PLAN_TIMEOUT_S
from .describe import LoadReport, describe
from .nodes import DrainReport, Finding, NodeInfo, StageMove, findings_of
from .patience import RETRY_S, Patience
from .trace_file import TraceFile
from .values import CachedPart, LoadEvent, ModelInfo, Plan
from .views import ClusterView


class AsyncClient:
    """A connection to one gateway, made by `connect_async`. An async context manager, for one event loop."""

    def __init__(self, gateway: AsyncGateway) -> None:
        self._gateway = gateway

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.address!r})"

    @property
    def address(self) -> str:
        """The gateway's "host:port"."""
        return self._gateway.address

    async def close(self) -> None:
        """Ends the connection. Handles that came from this client are closed with it."""
        await self._gateway.close()

    async def models(self) -> list[AsyncRemoteModel]:
        """The handle for every model in the registry, loading ones too."""
        return [AsyncRemoteModel(self._gateway, info.name, info) for info in await self.infos()]

    async def infos(self) -> list[ModelInfo]:
        """What the registry knows of every model."""
        answer = await self._gateway.ask("ListModels", registry_pb2.ListModelsRequest())
        return [ModelInfo.from_proto(info) for info in answer.models]

    async def model(self, name: str) -> AsyncRemoteModel:
        """The handle for the model called `name`. Raises ModelNotFoundError."""
        model = AsyncRemoteModel(self._gateway, name)
        await model.info()
        return model

    async def unload(self, name: str) -> None:
        """Takes the model called `name` out of the cluster; a load that still runs is cancelled."""
        await AsyncRemoteModel(self._gateway, name).unload()

    async def plan(self, path: str | os.PathLike[str], *, token: str | bool | None = None, **arguments: Any) -> Plan:
        """Which layers would go where, and how many bytes that takes: as `Client.plan`."""
        request = registry_pb2.PlanModelRequest()
        describe(request, path, token, self.address, arguments)
        return Plan.from_proto((await self._gateway.ask("PlanModel", request, timeout_s=PLAN_TIMEOUT_S)).plan)

    async def load(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        token: str | bool | None = None,
        trace: str | os.PathLike[str] | None = None,
        on_event: Callable[[LoadEvent], None] | None = None,
        **arguments: Any,
    ) -> AsyncRemoteModel:
        """Loads a model and returns its handle once it is resident: as `Client.load`.

        Cancelling the task, or an exception of `on_event`, cancels the load.
        """
        request = registry_pb2.LoadModelRequest(name=name or "")
        describe(request, path, token, self.address, {**arguments, "trace": trace is not None})
        with TraceFile(trace) if trace is not None else contextlib.nullcontext() as trace_file:
            report = LoadReport(on_event, trace_file)
            call = await self._gateway.registry_stream("LoadModel", request)
            try:
                while (response := await self._next(call)) is not None:
                    report.take(response)
            finally:
                call.cancel()
        return AsyncRemoteModel(self._gateway, report.ready.name, report.ready)

    async def _next(self, call: Any) -> registry_pb2.LoadModelResponse | None:
        with self._gateway.errors():
            try:
                return at_end(await call.read())
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise LoadCancelledError("the load was cancelled") from None
                raise

    async def cluster(self, model: str | None = None) -> ClusterView:
        """The cluster as it is now: as `Client.cluster`."""
        request = registry_pb2.DescribeClusterRequest(model=model or "")
        return ClusterView.from_proto((await self._gateway.ask("DescribeCluster", request)).cluster)

    async def watch(self, model: str | None = None, *, interval_s: float = 1.0) -> AsyncIterator[ClusterView]:
        """As `cluster`, at once and whenever it has changed; with `model`, until that is unloaded."""
        request = registry_pb2.WatchClusterRequest(model=model or "", interval_s=interval_s)
        is_known = False
        patience = Patience(self._gateway.retry_s)
        while True:
            try:
                call = await self._gateway.registry_stream("WatchCluster", request)
                try:
                    while (response := await receive(self._gateway, call)) is not None:
                        is_known, patience = True, Patience(self._gateway.retry_s)
                        yield ClusterView.from_proto(response.cluster)
                finally:
                    call.cancel()
                return
            except ModelNotFoundError:
                if not is_known:
                    raise
                return
            except GatewayUnavailableError as error:
                await self._gateway.wait_for_return(patience, error)

    async def cached_parts(self) -> list[CachedPart]:
        """The quantized parts that the cluster's nodes keep for later loads."""
        request = registry_pb2.ListCachedPartsRequest()
        answer = await self._gateway.ask("ListCachedParts", request, timeout_s=CACHE_TIMEOUT_S)
        return [CachedPart.from_proto(part) for part in answer.parts]

    async def clear_cached_parts(self) -> int:
        """Removes them from every node; resident models stay. Returns the bytes freed."""
        request = registry_pb2.ClearCachedPartsRequest()
        return int((await self._gateway.ask("ClearCachedParts", request, timeout_s=CACHE_TIMEOUT_S)).bytes)

    async def nodes(self) -> list[NodeInfo]:
        """The cluster's nodes, with the stages on each, and which of them are drained."""
        answer = await self._gateway.ask("ListNodes", registry_pb2.ListNodesRequest())
        return [NodeInfo.from_proto(node) for node in answer.nodes]

    async def drain(
        self, node: str, *, timeout_s: float | None = None, on_move: Callable[[StageMove], None] | None = None
    ) -> tuple[NodeInfo, list[StageMove]]:
        """Keeps `node` out of new plans, and moves its stages elsewhere: as `Client.drain`."""
        report = DrainReport(on_move)
        request = registry_pb2.DrainNodeRequest(node=node)
        call = await self._gateway.registry_stream("DrainNode", request, timeout_s=timeout_s)
        try:
            while (response := await receive(self._gateway, call)) is not None:
                report.take(response)
        finally:
            call.cancel()
        return report.result()

    async def undrain(self, node: str) -> NodeInfo:
        """Lets plans use `node` again. What was moved stays where it is."""
        answer = await self._gateway.ask("UndrainNode", registry_pb2.UndrainNodeRequest(node=node))
        return NodeInfo.from_proto(answer.node)

    async def diagnose(self, *, timeout_s: float = 0.0) -> AsyncIterator[Finding]:
        """Findings about every node and what lies between them: as `Client.diagnose`."""
        request = registry_pb2.DiagnoseClusterRequest(timeout_s=timeout_s)
        call = await self._gateway.registry_stream("DiagnoseCluster", request)
        try:
            while (response := await receive(self._gateway, call)) is not None:
                for finding in findings_of(response):
                    yield finding
        finally:
            call.cancel()


async def connect_async(
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    retry_s: float = RETRY_S,
    tls: TLS | None = None,
) -> AsyncClient:
    """As `connect`, for asyncio: a client of the gateway at `address`, else at $SHARDLIFT_ADDRESS, else here.

    Raises GatewayUnavailableError when nobody answers within `timeout_s` seconds.
    """
    # In a thread, for it may read files and ask whether a local instance answers.
    found = await asyncio.to_thread(gateway.target, address, token, start=False, tls=tls)
    opened = AsyncGateway(*found, timeout_s, retry_s, tls)
    try:
        await opened.connect()
    except BaseException:
        await opened.close()
        raise
    return AsyncClient(opened)
