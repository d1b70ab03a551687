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
from ray.util import metrics as ray_metrics

from .. import __version__
from ..proto.v1 import inference_pb2, inference_pb2_grpc, limits, registry_pb2, registry_pb2_grpc, saving_pb2
from ..proto.v1.credentials import listen
from ..proto.v1.errors import InternalError, InvalidRequestError
from ..proto.v1.server import Checked, TolerantReading, abort, readable
from ..proto.v1.status import to_error
from ..proto.v1.wire import HEALTH_SERVER_OPTIONS, MAX_CALLS, SERVER_OPTIONS
from ..worker import metrics, tracing
from ..worker.tensors import from_message, ids_message
from . import node_caches, relay, saving
from .auth import OnlyHealthChecks, TokenInterceptor, is_token, read_token
from .calls import Call
from .doctor.cluster import diagnose
from .gateway_options import GRACE_S, GatewayOptions
from .lookout import Lookout
from .page import Page
from .registry import Registry
from .tokenizer import Detokenizer
from .underway import Underway, counted

logger = logging.getLogger(__name__)

_SERVICES = (
    registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"].full_name,
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
)
_EXPORT_S = 1.0
# After the grace that it has: for calls to say why they end.
_LAST_WORDS_S = 1.0


class Gateway:
    """Serves one registry, and the page that shows it, as `options` say, from `start` until `stop`."""

    def __init__(self, options: GatewayOptions) -> None:
        self._options = options
        self._underway = Underway()
        self.registry = Registry(self._changed, options)
        self.lookout = Lookout(self.registry)
        token = self._token = read_token(options.token_file)
        self.page = Page(self.lookout, token, options.tls)
        # What whoever starts it should know, one line each.
        self.warnings: list[str] = []
        self._exporting: asyncio.Task[None] | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in grpc-stubs
        self._health_tasks: set[Any] = set()
        self._server = grpc.aio.server(
            interceptors=[*([TokenInterceptor(token)] if token else []), TolerantReading()],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(
            _RegistryService(self.registry, self.lookout, self._underway), self._server
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            _InferenceService(self.registry, self._underway), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._plain_health = PlainHealth() if options.tls is not None else None

    async def start(self) -> str:
        """Finds the resident models, then listens; gives its address, "grpcs://host:port" where it speaks TLS.

        Raises InvalidRequestError when a port is taken, or a file of the TLS can't be used; nothing of it runs then.
        """
        try:
            return await self._start()
        except BaseException:
            # A server that is only forgotten would listen on, and keep gRPC's own threads from ending.
            await self.stop(unload=False, grace_s=0)
            raise

    async def _start(self) -> str:
        options = self._options
        host = _bracketed(options.host)
        bound = listen(self._server, f"{host}:{options.port}", options.tls)
        if not bound:
            raise InvalidRequestError(
                f"port {options.port} of {host} can't be listened on: another program has it; choose another with "
                "--port"
            )
        # Before anybody may ask: until then a resident model would be unknown, and its name free.
        await self.registry.recover()
        await self.registry.follow_nodes()
        await self._server.start()
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        if self._plain_health is not None:
            await self._plain_health.start(options.health_host, options.health_port)
        await self._start_page(bound)
        self._exporting = asyncio.create_task(self._export())
        self.registry.events.record("gateway-started", f"serving on {host}:{bound}")
        return f"{host}:{bound}" if options.tls is None else f"grpcs://{host}:{bound}"

    async def _start_page(self, gateway_port: int) -> None:
        host, port = self._options.host, self._options.page_port
        if port is None:
            try:
                await self.page.start(host, gateway_port + 1)
            except InvalidRequestError as error:
                self.warnings.append(f"there is no page: {error}")
                logger.warning("there is no page: %s", error)
        elif port >= 0:
            await self.page.start(host, port)

    def has_token(self, salt: bytes, print_: bytes) -> bool:
        """Whether it wants the token that `print_` is the fingerprint of."""
        return is_token(self._token, salt, print_)

    async def stop(self, *, unload: bool, grace_s: float = GRACE_S) -> None:
        """Takes no more work at once, lets what is under way end within `grace_s`, and then ends the rest of it with
        GatewayUnavailableError: a client goes on with a generation at whatever gateway comes next."""
        await self._health.enter_graceful_shutdown()
        if self._plain_health is not None:
            await self._plain_health.stop()
        # Closes the port, and asks clients to call elsewhere.
        closing = asyncio.ensure_future(self._server.stop(grace_s + _LAST_WORDS_S))
        ended = asyncio.ensure_future(self._underway.none())
        await asyncio.wait([ended], timeout=grace_s)
        ended.cancel()
        if self._exporting is not None:
            self._exporting.cancel()
        await self.page.stop()
        await self.registry.close(unload=unload)
        await self._server.stop(_LAST_WORDS_S)
        await closing
        await self.lookout.close()
        await asyncio.to_thread(tracing.flush)

    async def _export(self) -> None:
        """Tells Ray's metrics what was counted."""
        exporter = metrics.Exporter(ray_metrics, {})
        while True:
            try:
                states = {info.name: info.state for info in self.registry.models()}
                self.registry.numbers.export(exporter, states)
            except Exception:
                # The gateway serves, whatever becomes of its metrics.
                logger.exception("metrics could not be exported")
                return
            await asyncio.sleep(_EXPORT_S)

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
    def __init__(self, registry: Registry, lookout: Lookout, underway: Underway) -> None:
        self._registry = registry
        self._lookout = lookout
        self.underway = underway

    async def PlanModel(
        self, request: registry_pb2.PlanModelRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.PlanModelResponse:
        try:
            limits.check_load(request.source, request.options)
            return registry_pb2.PlanModelResponse(plan=await self._registry.plan(request.source, request.options))
        except Exception as error:
            return await _abort(context, error)

    @counted
    async def LoadModel(
        self, request: registry_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.LoadModelResponse]:
        try:
            limits.check_load(readable(request).source, request.options, request.name)
        except InvalidRequestError as error:
            await _abort(context, error, request.name)
        events = self._registry.load(request, tracing.given(context.invocation_metadata()))
        try:
            async for event in events:
                yield event
        except Exception as error:
            await _abort(context, error, request.name)
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
            limits.check_model(request.name)
            return registry_pb2.GetModelResponse(model=self._registry.model(request.name))
        except Exception as error:
            return await _abort(context, error, request.name)

    async def UnloadModel(
        self, request: registry_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.UnloadModelResponse:
        try:
            limits.check_model(request.name)
            await self._registry.unload(request.name)
        except Exception as error:
            return await _abort(context, error, request.name)
        return registry_pb2.UnloadModelResponse()

    async def LoadAdapter(
        self, request: registry_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.LoadAdapterResponse:
        try:
            limits.check_source(request.source)
            limits.check_model(request.model)
            return registry_pb2.LoadAdapterResponse(model=await self._registry.load_adapter(request))
        except Exception as error:
            return await _abort(context, error, request.model)

    async def DeleteAdapter(
        self, request: registry_pb2.DeleteAdapterRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.DeleteAdapterResponse:
        try:
            limits.check_model(request.model)
            return registry_pb2.DeleteAdapterResponse(
                model=await self._registry.delete_adapter(request.model, request.name)
            )
        except Exception as error:
            return await _abort(context, error, request.model)

    async def DescribeCluster(
        self, request: registry_pb2.DescribeClusterRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.DescribeClusterResponse:
        try:
            limits.check_model(request.model)
            return registry_pb2.DescribeClusterResponse(cluster=await self._lookout.view(request.model))
        except Exception as error:
            return await _abort(context, error, request.model)

    async def WatchCluster(
        self, request: registry_pb2.WatchClusterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.WatchClusterResponse]:
        try:
            limits.check_watch(readable(request))
            async for view in self._lookout.watch(request.model, request.interval_s):
                yield registry_pb2.WatchClusterResponse(cluster=view)
        except Exception as error:
            await _abort(context, error, request.model)

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

    @counted
    async def SaveModel(
        self, request: saving_pb2.SaveModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[saving_pb2.SaveModelResponse]:
        events = saving.save(self._registry, request)
        try:
            limits.check_save(readable(request))
            async for event in events:
                yield event
        except Exception as error:
            await _abort(context, error, request.name)
        finally:
            # Where the client has gone, what was written must go now, not when the generator is collected.
            await events.aclose()  # type: ignore[attr-defined]

    async def ListNodes(
        self, request: registry_pb2.ListNodesRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ListNodesResponse:
        try:
            return registry_pb2.ListNodesResponse(nodes=await self._registry.nodes())
        except Exception as error:
            return await _abort(context, error)

    @counted
    async def DrainNode(
        self, request: registry_pb2.DrainNodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.DrainNodeResponse]:
        try:
            limits.check_node(readable(request).node)
        except InvalidRequestError as error:
            await _abort(context, error)
        events = self._registry.drain(request.node)
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
            limits.check_node(request.node)
            return registry_pb2.UndrainNodeResponse(node=await self._registry.undrain(request.node))
        except Exception as error:
            return await _abort(context, error)

    async def DiagnoseCluster(
        self, request: registry_pb2.DiagnoseClusterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[registry_pb2.DiagnoseClusterResponse]:
        try:
            limits.check_diagnose(readable(request))
            yield registry_pb2.DiagnoseClusterResponse(version=__version__)
            async for findings in diagnose(request.timeout_s, self._registry.models()):
                yield registry_pb2.DiagnoseClusterResponse(findings=[finding.message() for finding in findings])
        except Exception as error:
            await _abort(context, error)


class _InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Passes messages on between a client and a model's last stage; turns text into ids and back on the way."""

    def __init__(self, registry: Registry, underway: Underway) -> None:
        self._registry = registry
        self.underway = underway

    @counted
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        call = Call(self._registry, "Generate", request.model, context)
        try:
            limits.check_generate(readable(request))
            text = await self._tokenize(request)
            async for response in relay.generate(self._registry, request, context, call.span):
                for out in [response] if text is None else text.follow(response):
                    yield out
            call.end()
        except Exception as error:
            call.end(error)
            await _abort(context, error, request.model)
        finally:
            call.left()

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

    @counted
    async def Forward(
        self, request_iterator: AsyncIterator[inference_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.ForwardResponse]:
        call: Call | None = None
        try:
            requests = Checked(request_iterator, limits.check_forward)
            first = await anext(requests, None)
            if first is not None:
                call = Call(self._registry, "Forward", first.model, context)
                async for response in relay.forward(self._registry, first, requests, context, call.span):
                    yield response
                call.end()
        except Exception as error:
            if call is not None:
                call.end(error)
            await _abort(context, error, "" if call is None else call.model)
        finally:
            if call is not None:
                call.left()

    @counted
    async def Session(
        self, request_iterator: AsyncIterator[inference_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.SessionResponse]:
        session: relay.SessionRelay | None = None
        call: Call | None = None
        try:
            requests = Checked(request_iterator, limits.check_session)
            request = await anext(requests, None)
            while request is not None:
                if session is None or call is None:
                    call = Call(self._registry, "Session", request.model, context)
                    session = relay.SessionRelay(
                        self._registry, request.model, context, request.idle_timeout_s, call.span
                    )
                async for response in session.act(request):
                    yield response
                request = await session.next_of(requests)
            if call is not None:
                call.end()
        except Exception as error:
            if call is not None:
                call.end(error)
            await _abort(context, error, "" if call is None else call.model)
        finally:
            if call is not None:
                call.left()
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


class PlainHealth:
    """A server that says whether the gateway serves, and nothing else: Kubernetes' probes speak no TLS."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(
            interceptors=[OnlyHealthChecks(), TolerantReading()],
            options=HEALTH_SERVER_OPTIONS,
            maximum_concurrent_rpcs=64,
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # missing in grpc-stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, host: str, port: int) -> None:
        """Listens, and says that the gateway serves. Raises InvalidRequestError when the port is taken."""
        host = _bracketed(host)
        if not listen(self._server, f"{host}:{port}", None):
            raise InvalidRequestError(
                f"port {port} of {host}, for health in plain text, can't be listened on: another program has it; "
                "choose another with --health-port"
            )
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(None)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _abort(context: grpc.aio.ServicerContext, error: Exception, model: str = "") -> Any:
    if isinstance(error, grpc.aio.AioRpcError):
        # The client's own deadline, which it has seen pass too.
        await context.abort(error.code(), error.details() or "")
    ours = to_error(error)
    if isinstance(ours, InternalError):
        logger.error("request failed", exc_info=error)
    await abort(context, ours, model)
