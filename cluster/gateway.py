"""The gRPC server in front of the registry and of the models' last stages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .. import __version__
from ..proto.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.server import abort
from ..proto.v1.status import to_error
from ..proto.v1.wire import CHANNEL_OPTIONS
from ..worker.tensors import from_message, ids_message
from . import node_caches, relay
from .auth import TokenInterceptor
from .calls import Calls
from .doctor.cluster import diagnose
from .registry import Registry
from .tokenizer import Detokenizer

logger = logging.getLogger(__name__)

# For calls under way when the gateway is told to stop. Kubernetes ends a pod within terminationGracePeriodSeconds.
GRACE_S = 30.0
# After it: for calls to say why they end.
_LAST_WORDS_S = 1.0


class Gateway:
    """Serves one registry on one address until `stop`."""

    def __init__(self, token: str | None) -> None:
        self._calls = Calls()
        self.registry = Registry(self._changed)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in grpc-stubs
        self._health_tasks: set[Any] = set()
        self._server = grpc.aio.server(
            interceptors=[TokenInterceptor(token)] if token else [],
            options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)],
        )
        registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(
            _RegistryService(self.registry, self._calls), self._server
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            _InferenceService(self.registry, self._calls), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = (
            registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"].full_name,
            inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(services, self._server)

    async def start(self, host: str, port: int) -> str:
        """Finds the resident models, then listens; gives "host:port". `port` 0 takes a free one.

        Raises InvalidRequestError when the port is taken.
        """
        host = f"[{host}]" if ":" in host else host
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise InvalidRequestError(
                f"port {port} of {host} can't be listened on: another program has it; choose another with --port"
            )
        # Before anybody may ask: until then a resident model would be unknown, and its name free.
        await self.registry.recover()
        await self.registry.follow_nodes()
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{bound}"

    async def stop(self, *, unload: bool, grace_s: float = GRACE_S) -> None:
        """Takes no more work at once, lets what is under way end within `grace_s`, and then ends the rest of it with
        GatewayUnavailableError: a client goes on with a generation at whatever gateway comes next."""
        await self._health.enter_graceful_shutdown()
        # Closes the port, and asks clients to call elsewhere.
        closing = asyncio.ensure_future(self._server.stop(grace_s + _LAST_WORDS_S))
        ended = asyncio.ensure_future(self._calls.none())
        await asyncio.wait([ended], timeout=grace_s)
        ended.cancel()
        await self.registry.close(unload=unload)
        await self._server.stop(_LAST_WORDS_S)
        await closing

    def _changed(self, name: str, state: int) -> None:
        statuses: dict[int, Any] = {
            registry_pb2.MODEL_STATE_READY: health_pb2.HealthCheckResponse.SERVING,
            # Gone. The service has no way to forget a name.
            registry_pb2.MODEL_STATE_UNSPECIFIED: health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
        }
        status = statuses.get(state, health_pb2.HealthCheckResponse.NOT_SERVING)
        task = asyncio.ensure_future(self._health.set(name, status))
        self._health_tasks.add(task)
        task.add_done_callback(self._health_tasks.discard)


class _RegistryService(registry_pb2_grpc.ModelRegistryServiceServicer):
    def __init__(self, registry: Registry, calls: Calls) -> None:
        self._registry = registry
        self._calls = calls

    async def PlanModel(
        self, request: registry_pb2.PlanModelRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.PlanModelResponse:
        try:
            return registry_pb2.PlanModelResponse(plan=await self._registry.plan(request.source, request.options))
        except Exception as error:
            return await _abort(context, error)

    async def LoadModel(
        self, request: registry_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.LoadModelResponse]:
        events = self._registry.load(request)
        with self._calls.one():
            try:
                async for event in events:
                    yield event
            except Exception as error:
                await _abort(context, error)
            finally:
                # Where the client has gone, the load must end now, not when the generator is collected.
                await events.aclose()  # type: ignore[attr-defined]

    async def ListModels(
        self, request: registry_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ListModelsResponse:
        return registry_pb2.ListModelsResponse(models=self._registry.models())

    async def GetModel(
        self, request: registry_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.GetModelResponse:
        try:
            return registry_pb2.GetModelResponse(model=self._registry.model(request.name))
        except Exception as error:
            return await _abort(context, error)

    async def UnloadModel(
        self, request: registry_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.UnloadModelResponse:
        try:
            await self._registry.unload(request.name)
        except Exception as error:
            return await _abort(context, error)
        return registry_pb2.UnloadModelResponse()

    async def ListCachedParts(
        self, request: registry_pb2.ListCachedPartsRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ListCachedPartsResponse:
        try:
            return registry_pb2.ListCachedPartsResponse(parts=await asyncio.to_thread(node_caches.list_parts))
        except Exception as error:
            return await _abort(context, error)

    async def ClearCachedParts(
        self, request: registry_pb2.ClearCachedPartsRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ClearCachedPartsResponse:
        try:
            return registry_pb2.ClearCachedPartsResponse(bytes=await asyncio.to_thread(node_caches.clear))
        except Exception as error:
            return await _abort(context, error)

    async def ListNodes(
        self, request: registry_pb2.ListNodesRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ListNodesResponse:
        try:
            return registry_pb2.ListNodesResponse(nodes=await self._registry.nodes())
        except Exception as error:
            return await _abort(context, error)

    async def DrainNode(
        self, request: registry_pb2.DrainNodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.DrainNodeResponse]:
        events = self._registry.drain(request.node)
        with self._calls.one():
            try:
                async for event in events:
                    yield event
            except Exception as error:
                await _abort(context, error)
            finally:
                await events.aclose()  # type: ignore[attr-defined]

    async def UndrainNode(
        self, request: registry_pb2.UndrainNodeRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.UndrainNodeResponse:
        try:
            return registry_pb2.UndrainNodeResponse(node=await self._registry.undrain(request.node))
        except Exception as error:
            return await _abort(context, error)

    async def DiagnoseCluster(
        self, request: registry_pb2.DiagnoseClusterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.DiagnoseClusterResponse]:
        try:
            yield registry_pb2.DiagnoseClusterResponse(version=__version__)
            async for findings in diagnose(request.timeout_s, self._registry.models()):
                yield registry_pb2.DiagnoseClusterResponse(findings=[finding.message() for finding in findings])
        except Exception as error:
            await _abort(context, error)


class _InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Passes messages on between a client and a model's last stage; turns text into ids and back on the way."""

    def __init__(self, registry: Registry, calls: Calls) -> None:
        self._registry = registry
        self._calls = calls

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        with self._calls.one():
            try:
                text = await self._tokenize(request)
                async for response in relay.generate(self._registry, request, context):
                    for out in [response] if text is None else text.follow(response):
                        yield out
            except Exception as error:
                await _abort(context, error)

    async def _tokenize(self, request: inference_pb2.GenerateRequest) -> _TextStream | None:
        """Puts token ids in the place of text; gives what turns the answer back, or None where ids were sent."""
        kind = request.WhichOneof("input")
        if kind == "input_ids":
            return None
        if kind is None:
            raise InvalidRequestError("the request has no input: send input_ids, a prompt or a conversation")
        tokenizer = await self._registry.tokenizer(request.model)
        if kind == "prompt":
            ids = await asyncio.to_thread(tokenizer.encode, request.prompt)
        else:
            messages = [{"role": message.role, "content": message.content} for message in request.conversation.messages]
            ids = await asyncio.to_thread(tokenizer.encode_chat, messages)
        if not ids:
            raise InvalidRequestError("the prompt has no tokens: write something")
        request.input_ids.CopyFrom(ids_message([ids]))
        request.ClearField("attention_mask")
        given = from_message(request.generated).flatten().tolist() if request.generated.data else []
        return _TextStream(ids, tokenizer.decoder(), given)

    async def Forward(
        self, request_iterator: AsyncIterator[inference_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.ForwardResponse]:
        with self._calls.one():
            try:
                requests = aiter(request_iterator)
                first = await anext(requests, None)
                if first is not None:
                    async for response in relay.forward(self._registry, first, requests, context):
                        yield response
            except Exception as error:
                await _abort(context, error)

    async def Session(
        self, request_iterator: AsyncIterator[inference_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.SessionResponse]:
        session: relay.SessionRelay | None = None
        with self._calls.one():
            try:
                requests = aiter(request_iterator)
                request = await anext(requests, None)
                while request is not None:
                    if session is None:
                        session = relay.SessionRelay(self._registry, request.model, context, request.idle_timeout_s)
                    async for response in session.act(request):
                        yield response
                    request = await session.next_of(requests)
            except Exception as error:
                await _abort(context, error)
            finally:
                if session is not None:
                    await session.close()


class _TextStream:
    """Adds text to the steps of a one-row generation."""

    def __init__(self, prompt_ids: list[int], decoder: Detokenizer, given: list[int]) -> None:
        self._prompt_ids = prompt_ids
        self._decoder = decoder
        for token in given:
            decoder.add(token)

    def follow(self, response: inference_pb2.GenerateResponse) -> list[inference_pb2.GenerateResponse]:
        kind = response.WhichOneof("event")
        if kind == "accepted":
            if response.accepted.batch != 1:
                raise InvalidRequestError("text is generated one row at a time: num_return_sequences must be 1")
            response.accepted.prompt_ids.extend(self._prompt_ids)
        elif kind == "step" and response.step.token_ids:
            response.step.text = self._decoder.add(response.step.token_ids[0])
        elif kind == "finished" and (rest := self._decoder.finish()):
            return [inference_pb2.GenerateResponse(step=inference_pb2.GeneratedStep(text=rest)), response]
        return [response]


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> Any:
    if isinstance(error, grpc.aio.AioRpcError):
        # The client's own deadline, which it has seen pass too.
        await context.abort(error.code(), error.details() or "")
    ours = to_error(error)
    if isinstance(ours, InternalError):
        logger.error("request failed", exc_info=error)
    await abort(context, ours)
