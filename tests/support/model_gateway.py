"""A gateway in this process in front of a real, tiny model of transformers: what clients make of answers, it settles.

Generations are transformers' own, whole; what a request says was given already is checked, and left out. Sessions keep
a DynamicCache. There is no pipeline here, and nothing of the worker's code.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import torch
import transformers
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health, health_pb2_grpc

from shardlift.proto.v1 import (
    errors,
    generator_state,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    status,
    wire,
)
from shardlift.proto.v1.tensor_pb2 import Tensor

NAME = "tiny"
_FLOATS = {"temperature", "top_p", "min_p", "repetition_penalty", "typical_p", "length_penalty"}


def tiny_llama(seed: int = 0, **config: Any) -> transformers.LlamaForCausalLM:
    """A model of random weights whose answers differ enough to tell right from wrong."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{
                **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
                **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5},
                **{"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, **config},
            }
        )
    )
    return model.eval()


class ModelGateway:
    """Serves `model` as "tiny". A context manager; `stop` and `start` are those of a gateway that is restarted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[tuple[str, Any]] = []  # with their first requests
        self.open_sessions = 0
        # Called before each step of a generation is sent.
        self.before_step: Callable[[int], None] = lambda index: None
        self._port = 0
        self._calls_ended = threading.Event()
        self._lock = threading.Lock()
        self._server: Any = None

    def __enter__(self) -> ModelGateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens, after a `stop` where it did before."""
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=wire.SERVER_OPTIONS)
        registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(_Registry(self), self._server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(self), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        assert self._port in (0, port)
        self._port = port
        self._server.start()

    def stop(self) -> None:
        """Ends every call at once."""
        stopped = self._server.stop(grace=None)
        self._calls_ended.set()
        stopped.wait()

    def restart_at(self, *steps: int, down_s: float = 0.0) -> set[int]:
        """Has the gateway go and come back before it sends each of `steps`. Gives those that are still to come."""
        due = set(steps)

        def restart() -> None:
            self.stop()
            threading.Event().wait(down_s)
            self.start()

        def before_step(index: int) -> None:
            if index not in due:
                return
            due.discard(index)
            threading.Event().wait(0.1)  # what was sent arrives, most of the time
            self._calls_ended.clear()
            threading.Thread(target=restart).start()
            self._calls_ended.wait(10)
            threading.Event().wait(0.2)

        self.before_step = before_step
        return due

    def called(self, method: str) -> list[Any]:
        """The first requests of the calls of `method`."""
        return [request for name, request in self.calls if name == method]

    def take(self, method: str, request: Any) -> None:
        with self._lock:
            self.calls.append((method, request))

    def info(self) -> registry_pb2.ModelInfo:
        config = self.model.generation_config.to_dict()
        return registry_pb2.ModelInfo(
            name=NAME,
            state=registry_pb2.MODEL_STATE_READY,
            path="org/tiny",
            config_json=json.dumps(self.model.config.to_dict()),
            generation_config_json=json.dumps({key: value for key, value in config.items() if value is not None}),
            plan=registry_pb2.Plan(
                model="org/tiny",
                dtype="float32",
                stages=[registry_pb2.StagePlan(node="here", device="cpu", last_layer=1, modules=["model"])],
            ),
        )


class _Registry(registry_pb2_grpc.ModelRegistryServiceServicer):
    def __init__(self, gateway: ModelGateway) -> None:
        self._gateway = gateway

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> registry_pb2.GetModelResponse:
        self._gateway.take("GetModel", request)
        if request.name != NAME:
            context.abort_with_status(status.to_status(errors.ModelNotFoundError(f"no model {request.name!r}")))
        return registry_pb2.GetModelResponse(model=self._gateway.info())

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> registry_pb2.ListModelsResponse:
        self._gateway.take("ListModels", request)
        return registry_pb2.ListModelsResponse(models=[self._gateway.info()])


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, gateway: ModelGateway) -> None:
        self._gateway = gateway

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        self._gateway.take("Generate", request)
        responses, _ = _generate(self._gateway.model, request)
        index = _columns(request.generated) if request.HasField("generated") else 0
        for response in responses:
            if response.WhichOneof("event") == "step":
                self._gateway.before_step(index)
                index += 1
            yield response

    def Forward(self, requests: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.ForwardResponse]:
        for request in requests:
            self._gateway.take("Forward", request)
            assert not request.use_cache, "sessions have a method of their own"
            yield from _forward(self._gateway.model, request, None, 0)

    def Session(self, requests: Any, context: grpc.ServicerContext) -> Iterator[inference_pb2.SessionResponse]:
        self._gateway.open_sessions += 1
        try:
            yield from self._session(requests)
        except errors.ShardliftError as error:
            context.abort_with_status(status.to_status(error))
        finally:
            self._gateway.open_sessions -= 1

    def _session(self, requests: Any) -> Iterator[inference_pb2.SessionResponse]:
        model = self._gateway.model
        past = _Past(transformers.DynamicCache(config=model.config))
        for number, request in enumerate(requests):
            self._gateway.take("Session", request)
            assert bool(request.model) == (number == 0)
            if request.HasField("keep"):
                assert request.keep <= past.length
                past.keep(request.keep)
            if request.rows:
                past.select(list(request.rows))
            match request.WhichOneof("action"):
                case "forward":
                    for part in _forward(model, request.forward, past.cache, past.length):
                        yield inference_pb2.SessionResponse(forward=part)
                    past.grow(_ids(request.forward.input_ids))
                case "generate":
                    responses, sequences = _generate(model, request.generate, past.ids)
                    for response in responses:
                        yield inference_pb2.SessionResponse(generate=response)
                    past.catch_up(model, sequences[:, :-1], _mask(request.generate))
            yield inference_pb2.SessionResponse(
                done=inference_pb2.SessionState(length=past.length, rows=0 if past.ids is None else len(past.ids))
            )


class _Past:
    """The ids and the cache of a session."""

    def __init__(self, cache: transformers.DynamicCache) -> None:
        self.cache = cache
        self.ids: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def keep(self, length: int) -> None:
        assert self.ids is not None
        self.cache.crop(length - self.length)
        self.ids = self.ids[:, :length]
        if not length:  # nor are there rows any more
            self.cache.reset()
            self.ids = None

    def select(self, rows: list[int]) -> None:
        assert self.ids is not None
        self.cache.batch_select_indices(torch.tensor(rows))
        self.ids = self.ids[rows]

    def grow(self, ids: torch.Tensor) -> None:
        self.ids = ids if not self.length else torch.cat([self.ids, ids], dim=1)
        assert self.cache.get_seq_length() == self.length

    def catch_up(self, model: Any, sequences: torch.Tensor, mask: torch.Tensor | None) -> None:
        new = sequences[:, self.length :]
        if not new.shape[1]:
            return
        whole = torch.ones_like(sequences)
        if mask is not None:
            whole[:, : mask.shape[1]] = mask
        positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, self.length :]
        with torch.no_grad():
            model(new, attention_mask=whole, position_ids=positions, past_key_values=self.cache)
        self.grow(new)


def _forward(
    model: Any, request: inference_pb2.ForwardRequest, cache: Any, past: int
) -> Iterator[inference_pb2.ForwardResponse]:
    ids = _ids(request.input_ids)
    mask = _ids(request.attention_mask) if request.HasField("attention_mask") else None
    assert mask is None or tuple(mask.shape) == (len(ids), past + ids.shape[1])
    positions = _ids(request.position_ids) if request.HasField("position_ids") else None
    with torch.no_grad():
        logits = model(
            ids,
            attention_mask=mask,
            position_ids=torch.arange(past, past + ids.shape[1])[None] if positions is None else positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=request.logits_to_keep,
        ).logits
    head, rest = _frames(logits)
    yield inference_pb2.ForwardResponse(logits=head)
    for more in rest:
        yield inference_pb2.ForwardResponse(more=more)


def _generate(
    model: Any, request: inference_pb2.GenerateRequest, past: torch.Tensor | None = None
) -> tuple[list[inference_pb2.GenerateResponse], torch.Tensor]:
    """The whole answer, and the sequences."""
    ids = _ids(request.input_ids)
    if past is not None and past.shape[1]:
        ids = torch.cat([past, ids], dim=1)
    fields = {
        name: int(value) if isinstance(value, float) and value.is_integer() and name not in _FLOATS else value
        for name, value in MessageToDict(request.generation).items()
    }
    with torch.random.fork_rng():
        if request.generator_state:
            generator_state.put_into(torch.default_generator, request.generator_state)
        else:
            torch.manual_seed(request.seed)
        output = model.generate(
            ids,
            attention_mask=_mask(request),
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **fields,
        )
        left = generator_state.taken_from(torch.default_generator)
    rows, length = output.sequences.shape
    new = output.sequences[:, ids.shape[1] :]
    given = 0
    if request.HasField("generated"):
        known = _ids(request.generated)
        given = known.shape[1]
        assert torch.equal(known, new[:, :given]), "these tokens were not given"
    reply = inference_pb2.GenerateResponse
    responses = [reply(accepted=inference_pb2.PromptAccepted(batch=rows, prompt_tokens=ids.shape[1]))]
    for index in range(given, length - ids.shape[1]):
        step = inference_pb2.GeneratedStep(token_ids=new[:, index].tolist())
        later: list[bytes] = []
        for wanted, tensors, field in (
            (request.output_logits, output.logits, step.logits),
            (request.output_scores, output.scores, step.scores),
        ):
            if wanted:
                head, rest = _frames(tensors[index])
                field.CopyFrom(head)
                later += rest
        responses += [reply(step=step), *(reply(more=more) for more in later)]
    ends = fields.get("eos_token_id", model.generation_config.eos_token_id)
    is_end = torch.isin(new, torch.tensor([] if ends is None else ends, dtype=torch.long))
    finished = inference_pb2.GenerationFinished(
        new_tokens=new.shape[1],
        reason="length",
        generator_state=left if left != request.generator_state and request.generator_state else b"",
        row_tokens=((is_end.cumsum(dim=1) - is_end.long()) == 0).sum(dim=1).tolist(),
    )
    responses.append(reply(finished=finished))
    return responses, output.sequences


def _mask(request: inference_pb2.GenerateRequest) -> torch.Tensor | None:
    return _ids(request.attention_mask) if request.HasField("attention_mask") else None


def _ids(tensor: Tensor) -> torch.Tensor:
    dtype = getattr(torch, tensor.dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).view(list(tensor.shape)).long()


def _columns(tensor: Tensor) -> int:
    return int(tensor.shape[1])


def _frames(tensor: torch.Tensor) -> tuple[Tensor, list[bytes]]:
    data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    head = wire.first_frame(list(tensor.shape), str(tensor.dtype).removeprefix("torch."), data)
    return head, list(map(bytes, wire.later_frames(data)))
