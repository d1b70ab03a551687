"""Calls passed on between a client and a model's last stage, over the loss of stages.

When a stage is lost in the middle of a call, the call waits until the model is well again, and goes on under a new
epoch of its session: a generation after the tokens that were given, a session after everything it was fed has been
computed anew. The client sees a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError, ModelUnavailableError, SessionExpiredError
from ..proto.v1.status import from_refusal
from ..proto.v1.wire import Assembly
from ..worker import logs, tracing
from ..worker.service import EPOCH_HEADER, SESSION_HEADER
from ..worker.tensors import check_ids, from_message, ids_message
from .history import History
from .registry import Registry
from .route import Route

Request = TypeVar("Request")
# Losses in a row without a step between them: whatever it is that a request does to workers, it ends here.
_MOST_LOSSES = 3


class _Way:
    """A call's way to the model: the route, the session's name and epoch, and what happens when the route breaks."""

    def __init__(
        self, registry: Registry, model: str, context: grpc.aio.ServicerContext, span: tracing.Span = tracing.OFF
    ) -> None:
        self._registry = registry
        self._model = model
        self._context = context
        self._span = span
        self._session = uuid.uuid4().hex
        logs.note(model=model, session=self._session)
        span.note(model=model, session=self._session)
        self._epoch = 0
        self._losses = 0
        self._route: Route | None = None

    async def route(self) -> Route:
        if self._route is None:
            self._route = await self._registry.ready_route(self._model)
        return self._route

    def options(self, route: Route) -> dict[str, Any]:
        """What every call to the stage is made with: the session's name, and the client's own deadline."""
        names = [(SESSION_HEADER, self._session), (EPOCH_HEADER, str(self._epoch))]
        if traceparent := self._span.traceparent:
            names.append((tracing.TRACEPARENT, traceparent))
        return {"metadata": [*route.metadata, *names], "timeout": self._context.time_remaining()}

    def progress(self) -> None:
        self._losses = 0

    async def around(self, error: BaseException) -> None:
        """Returns once there is a new way around `error`; raises what it means where there is none."""
        assert self._route is not None
        if isinstance(error, asyncio.CancelledError):
            if self._context.cancelled() or not self._route.closed:
                raise error
            # The route was closed under the call, which the client knows nothing of.
            explained: Exception = ModelUnavailableError(f"model {self._model} has lost its way to the stages")
        elif isinstance(error, grpc.aio.AioRpcError):
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise error
            explained = self._route.explain(error)
        else:
            raise error
        if not isinstance(explained, ModelUnavailableError):
            raise explained from None
        self._losses += 1
        if self._losses > _MOST_LOSSES:
            raise ModelUnavailableError(
                f"model {self._model} lost a stage {self._losses} times at the same step of this request: {explained}"
            ) from None
        self._route = await self._registry.next_route(self._model, self._route)
        self._epoch += 1


async def generate(
    registry: Registry,
    request: inference_pb2.GenerateRequest,
    context: grpc.aio.ServicerContext,
    span: tracing.Span = tracing.OFF,
) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """The answers to `request`, each once, whatever happens to the stages."""
    _seed(request)
    adapters = registry.adapters(request.model, request.adapters if request.HasField("adapters") else None)
    _say(request, adapters)
    with registry.using(request.model, adapters):
        async for response in _generate(_Way(registry, request.model, context, span), request):
            yield response


async def _generate(way: _Way, request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.GenerateResponse]:
    steps = _given(request)
    is_accepted = False
    while True:
        route = await way.route()
        call = route.stub.Generate(request, **way.options(route))
        try:
            async for responses in _whole(call):
                first = responses[0]
                kind = first.WhichOneof("event")
                if kind == "accepted":
                    if is_accepted:
                        continue
                    is_accepted = True
                elif kind == "step":
                    steps.append(list(first.step.token_ids))
                    way.progress()
                for response in responses:
                    yield response
            return
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            failure: BaseException = error
        finally:
            call.cancel()
        await way.around(failure)
        if steps:
            request.generated.CopyFrom(ids_message(list(zip(*steps, strict=True))))


async def _whole(
    call: AsyncIterator[inference_pb2.GenerateResponse],
) -> AsyncIterator[list[inference_pb2.GenerateResponse]]:
    """Messages with all that belongs to them: a step whose tensors are not whole could not be gone on from."""
    together: list[inference_pb2.GenerateResponse] = []
    missing = 0
    async for response in call:
        together.append(response)
        missing += _owed(response)
        if not missing:
            yield together
            together = []


def _owed(response: inference_pb2.GenerateResponse) -> int:
    """How many bytes of its tensors a message leaves to later ones; less than 0 for one that brings them."""
    tensors = [tensor for tensor in (response.step.logits, response.step.scores) if tensor.dtype]
    return sum(Assembly(tensor).expected_bytes - len(tensor.data) for tensor in tensors) - len(response.more)


def _given(request: inference_pb2.GenerateRequest) -> list[list[int]]:
    """The steps that the request says it has had."""
    if not request.HasField("generated") or not request.generated.data:
        return []
    tokens: list[list[int]] = check_ids("generated", from_message(request.generated)).T.tolist()
    return tokens


def _seed(request: inference_pb2.GenerateRequest) -> None:
    """Whoever goes on with the request must draw the same numbers."""
    if not request.HasField("seed") and not request.generator_state:
        request.seed = secrets.randbits(63)


def _say(
    request: inference_pb2.GenerateRequest | inference_pb2.ForwardRequest | inference_pb2.SessionRequest,
    adapters: Sequence[str],
) -> None:
    """Has `request` name its adapters, be it none."""
    request.adapters.SetInParent()
    request.adapters.names[:] = adapters


class SessionRelay:
    """One session. Actions are taken one after another; `close` ends it."""

    def __init__(
        self,
        registry: Registry,
        model: str,
        context: grpc.aio.ServicerContext,
        idle_timeout_s: float = 0.0,
        span: tracing.Span = tracing.OFF,
    ) -> None:
        self._way = _Way(registry, model, context, span)
        self._registry = registry
        self._model = model
        self._idle_timeout_s = idle_timeout_s
        self._history = History()
        self._call: Any = None
        # What the session holds room for, beyond what it comes to.
        self._reserved_tokens = 0
        # What the session computes with; None before its first action.
        self._adapters: tuple[str, ...] | None = None
        self._uses = contextlib.ExitStack()

    @property
    def length(self) -> int:
        return self._history.length

    async def close(self) -> None:
        self._uses.close()
        if self._call is not None:
            self._call.cancel()

    async def next_of(self, requests: AsyncIterator[Request]) -> Request | None:
        """The client's next request, or None after its last. Raises SessionExpiredError as soon as the stage does."""
        coming = asyncio.ensure_future(anext(requests, None))
        call = self._call
        ended = asyncio.ensure_future(_failure(call)) if call is not None else None
        try:
            await asyncio.wait([coming, ended] if ended else [coming], return_when=asyncio.FIRST_COMPLETED)
            failure = ended.result() if ended is not None and not coming.done() else None
            if failure is not None:
                explained = (await self._way.route()).explain(failure)
                if isinstance(explained, SessionExpiredError):
                    raise explained
            return await coming
        finally:
            for task in (coming, ended):
                if task is not None:
                    task.cancel()

    async def act(self, request: inference_pb2.SessionRequest) -> AsyncIterator[inference_pb2.SessionResponse]:
        """The answers to one action, `done` the last; each once, whatever happens to the stages."""
        if request.HasField("generate"):
            _seed(request.generate)
        self._choose(request)
        steps = _given(request.generate)
        told, rows = 0, 0
        while True:
            try:
                call = await self._opened()
                await call.write(request)
                passed = 0
                async for responses in _answers(call):
                    first = responses[0]
                    kind = first.WhichOneof("event")
                    if kind == "done":
                        self._remember(request, rows, steps)
                    elif kind == "refused":
                        pass  # the session is what it was
                    elif kind == "generate":
                        if first.generate.WhichOneof("event") == "accepted":
                            rows = first.generate.accepted.batch
                            if told:
                                continue
                        elif first.generate.WhichOneof("event") == "step":
                            steps.append(list(first.generate.step.token_ids))
                    else:
                        # Logits come again as they came before.
                        passed += 1
                        if passed <= told:
                            continue
                    told += 1
                    self._way.progress()
                    for response in responses:
                        yield response
                    if kind in ("done", "refused"):
                        return
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                failure: BaseException = error
            if self._call is not None:
                self._call.cancel()
                self._call = None
            await self._way.around(failure)
            if steps:
                request.generate.generated.CopyFrom(ids_message(list(zip(*steps, strict=True))))

    async def _opened(self) -> Any:
        """The call to the stage; a new one has been fed everything that the session was."""
        if self._call is None:
            route = await self._way.route()
            self._call = route.stub.Session(**self._way.options(route))
            past = [inference_pb2.SessionRequest(forward=forward) for forward in self._history.replay()]
            if self._reserved_tokens:
                past.insert(0, inference_pb2.SessionRequest(reserve_tokens=self._reserved_tokens))
            for action in past:
                action.idle_timeout_s = self._idle_timeout_s
                _say(action, self._adapters or ())
                await self._call.write(action)
                async for answer, *_ in _answers(self._call):
                    if answer.HasField("refused"):
                        raise from_refusal(answer.refused)
        return self._call

    def _choose(self, request: inference_pb2.SessionRequest) -> None:
        """Makes `request` say which adapters it means; they are in use until the session ends."""
        action = getattr(request, request.WhichOneof("action") or "forward")
        choice = next((each.adapters for each in (action, request) if each.HasField("adapters")), None)
        names = self._adapters
        if names is None or choice is not None:
            names = self._registry.adapters(self._model, choice)
        if names != self._adapters:
            self._uses.enter_context(self._registry.using(self._model, names))
            self._adapters = names
        if request.WhichOneof("action") is not None:
            action.ClearField("adapters")
        _say(request, names)

    def _remember(self, request: inference_pb2.SessionRequest, rows: int, steps: list[list[int]]) -> None:
        if request.HasField("keep"):
            self._history.keep(request.keep)
        if request.rows:
            self._history.select(request.rows)
        if request.HasField("reserve_tokens"):
            self._reserved_tokens = request.reserve_tokens
        if request.HasField("forward"):
            self._history.add_forward(request.forward)
        elif request.HasField("generate"):
            self._history.add_generation(request.generate, rows, steps)


async def _failure(call: Any) -> grpc.aio.AioRpcError | None:
    """What a call ends with, when it ends; None where it was cancelled here."""
    code, details = await call.code(), await call.details()
    if code is grpc.StatusCode.CANCELLED:
        return None
    metadata = await call.initial_metadata(), await call.trailing_metadata()
    return grpc.aio.AioRpcError(code, *metadata, details, await call.debug_error_string())


async def _answers(call: Any) -> AsyncIterator[list[inference_pb2.SessionResponse]]:
    """An action's messages up to `done`; a generation's steps with all that belongs to them."""
    together: list[inference_pb2.SessionResponse] = []
    missing = 0
    while True:
        response = await call.read()
        if response is grpc.aio.EOF:  # type: ignore[attr-defined] # missing in grpc-stubs
            raise InternalError("the last stage ended a session in the middle of an action")
        together.append(response)
        missing += _owed(response.generate)
        if missing:
            continue
        yield together
        if response.WhichOneof("event") in ("done", "refused"):
            return
        together = []


async def forward(
    registry: Registry,
    first: inference_pb2.ForwardRequest,
    later: AsyncIterator[inference_pb2.ForwardRequest],
    context: grpc.aio.ServicerContext,
    span: tracing.Span = tracing.OFF,
) -> AsyncIterator[inference_pb2.ForwardResponse]:
    """The answers to passes that come one by one; those that are cached make a session."""
    session = SessionRelay(registry, first.model, context, span=span)
    way = _Way(registry, first.model, context, span)
    request: inference_pb2.ForwardRequest | None = first
    try:
        while request is not None:
            if request.use_cache:
                async for answer in session.act(inference_pb2.SessionRequest(forward=request)):
                    if answer.HasField("refused"):
                        raise from_refusal(answer.refused)
                    if answer.WhichOneof("event") == "forward":
                        yield answer.forward
            elif session.length:
                raise InvalidRequestError(
                    f"this session keeps {session.length} tokens: its passes need use_cache, too; open another call"
                )
            else:
                adapters = registry.adapters(first.model, request.adapters if request.HasField("adapters") else None)
                _say(request, adapters)
                with registry.using(first.model, adapters):
                    async for response in _once(way, request):
                        yield response
            request = await session.next_of(later)
    finally:
        await session.close()


async def _once(way: _Way, request: inference_pb2.ForwardRequest) -> AsyncIterator[inference_pb2.ForwardResponse]:
    told = 0
    while True:
        route = await way.route()

        async def only() -> AsyncIterator[inference_pb2.ForwardRequest]:
            yield request

        call = route.stub.Forward(only(), **way.options(route))
        passed = 0
        try:
            async for response in call:
                passed += 1
                if passed > told:
                    told += 1
                    yield response
            way.progress()
            return
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            failure: BaseException = error
        finally:
            call.cancel()
        await way.around(failure)
