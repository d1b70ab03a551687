"""What a client does when its gateway goes away: wait, ask again what may be asked again, and tell nothing twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
import transformers

import shardlift
from shardlift.client.gateway import connect_limit_s
from shardlift.client.handle import RemoteModel
from shardlift.client.patience import Patience
from shardlift.proto.v1 import errors, inference_pb2, registry_pb2, status
from shardlift.proto.v1.tensor_pb2 import Tensor
from tests.support.model_gateway import ModelGateway, tiny_llama
from tests.support.scripted_gateway import ScriptedGateway

IDS = torch.tensor([[1, 5, 9, 7], [1, 11, 12, 13]])


@pytest.fixture(scope="module")
def local() -> Any:
    return tiny_llama(eos_token_id=None)


@pytest.fixture
def gateway(local: Any) -> Iterator[ModelGateway]:
    with ModelGateway(local) as gateway:
        yield gateway


def test_a_stream_goes_on_after_a_restart(gateway: ModelGateway, local: Any) -> None:
    expected = local.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8)
    with shardlift.connect(gateway.address) as client:
        model = client.model("tiny")
        due = gateway.restart_at(0, 3, 6)
        steps = [step.token_ids for step in model.stream(IDS, max_new_tokens=8, attention_mask=torch.ones_like(IDS))]
    assert not due
    assert torch.tensor(steps).T.tolist() == expected[:, 4:].tolist()
    given = [request.generated.shape[1] if request.generated.shape else 0 for request in gateway.called("Generate")]
    assert len(given) == 4
    assert all(count <= sent for count, sent in zip(given, (0, 0, 3, 6), strict=True))
    assert given[3] > 0
    first, *later = gateway.called("Generate")
    for request in later:
        request.ClearField("generated")
        assert request == first  # the seed included


def test_sampling_goes_on_with_the_same_tokens(gateway: ModelGateway, local: Any) -> None:
    class Recorder(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.puts: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.puts.append(value.tolist())

        def end(self) -> None:
            self.puts.append("end")

    arguments = {"do_sample": True, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    with shardlift.connect(gateway.address) as client:
        model = client.model("tiny")
        torch.manual_seed(4)
        whole = model.generate(IDS, **arguments)
        due = gateway.restart_at(2, down_s=1.0)
        recorder = Recorder()
        torch.manual_seed(4)
        broken = model.generate(IDS, streamer=recorder, **arguments)
    assert not due
    assert torch.equal(broken.sequences, whole.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(broken.logits, whole.logits, strict=True))
    assert recorder.puts == [IDS.tolist(), *whole.sequences[:, 4:].T.tolist(), "end"]


def test_patience_ends(gateway: ModelGateway) -> None:
    with shardlift.connect(gateway.address, retry_s=0.5) as client:
        model = client.model("tiny")

        def leave(index: int) -> None:
            threading.Event().wait(0.1)
            threading.Thread(target=gateway.stop).start()
            threading.Event().wait(0.5)

        gateway.before_step = leave
        started = time.monotonic()
        with pytest.raises(errors.GatewayUnavailableError):
            model.generate(IDS, max_new_tokens=3)
        assert 0.5 < time.monotonic() - started < 10
        gateway.start()  # for the end of the fixture


# Scripted losses

REPLY = inference_pb2.GenerateResponse
ACCEPTED = REPLY(accepted=inference_pb2.PromptAccepted(batch=1, prompt_tokens=2, prompt_ids=[1, 2]))


def step(token: int | None, text: str = "") -> inference_pb2.GenerateResponse:
    return REPLY(step=inference_pb2.GeneratedStep(token_ids=[] if token is None else [token], text=text))


def finished(count: int) -> inference_pb2.GenerateResponse:
    return REPLY(finished=inference_pb2.GenerationFinished(new_tokens=count, reason="stop"))


def lost(*replies: Any) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
    """Gives `replies`, and then goes away as a proxy says it."""

    def play(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from replies
        context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")

    return play


@pytest.fixture
def scripted(local: Any) -> Iterator[tuple[ScriptedGateway, RemoteModel]]:
    info = ModelGateway(local).info()
    with ScriptedGateway() as gateway, shardlift.connect(gateway.address, retry_s=5) as client:
        gateway.answer("GetModel", registry_pb2.GetModelResponse(model=info))
        yield gateway, client.model("tiny")


def test_text_is_told_once(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    gateway.expect("Generate", lost(ACCEPTED, step(3, "He"), step(4), step(5, "l")))
    gateway.expect("Generate", lost())
    gateway.expect("Generate", lost(ACCEPTED, step(6, "lo"), step(None, "…")))
    gateway.answer("Generate", ACCEPTED, step(None, "…"), finished(4))
    running = model.stream(prompt="Say it")
    assert "".join(step.text for step in running) == "Hello…"
    assert (running.prompt_ids, running.new_tokens, running.finish_reason) == ([1, 2], 4, "stop")
    shapes = [list(call.request.generated.shape) for call in gateway.calls if call.method == "Generate"]
    assert shapes == [[], [1, 3], [1, 3], [1, 4]]
    assert {call.request.prompt for call in gateway.calls[1:]} == {"Say it"}
    assert len({call.request.seed for call in gateway.calls[1:]}) == 1


def test_half_a_step_is_thrown_away(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    logits = torch.tensor([[1.0, 2.0]])
    data = logits.numpy().tobytes()
    head = inference_pb2.GeneratedStep(token_ids=[3])
    head.logits.shape.extend([1, 2])
    head.logits.dtype, head.logits.data = "float32", data[:4]
    gateway.expect("Generate", lost(ACCEPTED, REPLY(step=head)))
    gateway.answer("Generate", ACCEPTED, REPLY(step=head), REPLY(more=data[4:]), finished(1))
    output = model.generate([[1, 2]], return_dict_in_generate=True, output_logits=True)
    assert output.sequences.tolist() == [[1, 2, 3]]
    assert torch.equal(output.logits[0], logits)
    assert not gateway.calls[-1].request.HasField("generated")


def test_a_loss_after_the_end_is_none(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    gateway.expect("Generate", lost(ACCEPTED, step(3), finished(1)))
    assert model.generate([[1, 2]]).tolist() == [[1, 2, 3]]


def test_a_gateway_that_says_so_itself_is_asked_again(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    gateway.answer("Generate", ACCEPTED, step(3), error=errors.GatewayUnavailableError("on its way down"))
    gateway.answer("Generate", ACCEPTED, step(4), finished(2))
    assert model.generate([[1, 2]]).tolist() == [[1, 2, 3, 4]]


def test_other_rows_after_a_loss_are_a_defect(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    gateway.expect("Generate", lost(ACCEPTED, step(3)))
    gateway.answer("Generate", REPLY(accepted=inference_pb2.PromptAccepted(batch=2)))
    with pytest.raises(errors.InternalError, match="goes on with 2 rows"):
        model.generate([[1, 2]])


@pytest.mark.parametrize("error", [errors.ModelUnavailableError, errors.WorkerDiedError, errors.ModelBusyError])
def test_what_the_model_fails_with_is_not_asked_again(
    error: type[errors.ShardliftError], scripted: tuple[ScriptedGateway, RemoteModel]
) -> None:
    gateway, model = scripted
    gateway.answer("Generate", ACCEPTED, step(3), error=error("stage 1"))
    with pytest.raises(error):
        model.generate([[1, 2]])
    gateway.answer("GetModel", error=error("stage 1"))
    with pytest.raises(error):
        model.info()


def unavailable(request: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")


def test_questions_are_asked_again(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    for _ in range(2):
        gateway.expect("GetModel", unavailable)
    gateway.answer("GetModel", registry_pb2.GetModelResponse(model=registry_pb2.ModelInfo(name="tiny")))
    assert model.info().name == "tiny"


def test_a_pass_that_leaves_nothing_behind_is_asked_for_again(
    scripted: tuple[ScriptedGateway, RemoteModel],
) -> None:
    gateway, model = scripted
    logits = torch.tensor([[[1.0, 2.0]]])
    head = Tensor(shape=[1, 1, 2], dtype="float32", data=logits.numpy().tobytes())
    gateway.expect("Forward", lost())
    gateway.expect("Forward", lost(inference_pb2.ForwardResponse(logits=head)))
    gateway.answer("Forward", inference_pb2.ForwardResponse(logits=head))
    assert torch.equal(model([[1]]).logits, logits)


DOWN_S = 1.0


def gone(gateway: ModelGateway) -> threading.Timer:
    """Has the gateway go, and come back later than a first contact is waited for."""
    gateway.stop()
    timer = threading.Timer(DOWN_S, gateway.start)
    timer.start()
    return timer


def test_calls_after_one_that_has_seen_the_loss_are_as_patient(gateway: ModelGateway, local: Any) -> None:
    expected = local.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    with shardlift.connect(gateway.address, timeout_s=0.3) as client:
        model = client.model("tiny")
        calls: list[Callable[[], Any]] = [
            model.info,
            lambda: model.generate(IDS, max_new_tokens=4),
            lambda: model.stream(IDS, max_new_tokens=4).start(),
            lambda: model(IDS),
        ]
        for call in calls:
            coming = gone(gateway)
            with pytest.raises(errors.GatewayUnavailableError):  # what isn't asked again sees the loss
                model.unload()
            call()
            coming.join()
        assert torch.equal(model.generate(IDS, max_new_tokens=4), expected)


def test_so_are_those_of_the_client_for_asyncio(gateway: ModelGateway) -> None:
    async def run() -> None:
        async with await shardlift.connect_async(gateway.address, timeout_s=0.3) as client:
            model = await client.model("tiny")
            calls: list[Callable[[], Awaitable[Any]]] = [
                model.info,
                lambda: model.generate(IDS, max_new_tokens=4),
                lambda: model(IDS),
            ]
            for call in calls:
                coming = await asyncio.to_thread(gone, gateway)
                with pytest.raises(errors.GatewayUnavailableError):
                    await model.unload()
                await call()
                await asyncio.to_thread(coming.join)

    asyncio.run(run())


def test_patience_of_a_first_contact_is_short() -> None:
    """Nobody has ever answered there: there may be no gateway at all."""
    assert connect_limit_s(3.0, 30.0, None, False) == 3.0
    assert connect_limit_s(3.0, 30.0, None, True) == 30.0
    assert connect_limit_s(3.0, 0.0, None, True) == 3.0
    assert connect_limit_s(3.0, 30.0, 5.0, True) == 5.0


def test_what_changes_something_is_not(scripted: tuple[ScriptedGateway, RemoteModel]) -> None:
    gateway, model = scripted
    gateway.expect("UnloadModel", unavailable)
    with pytest.raises(errors.GatewayUnavailableError):
        model.unload()
    gateway.expect("LoadModel", lost())
    with shardlift.connect(gateway.address) as client, pytest.raises(errors.GatewayUnavailableError):
        client.load("org/tiny")
    gateway.expect("Session", lost())
    with pytest.raises(errors.GatewayUnavailableError):
        model([[1]], use_cache=True)


def test_patience() -> None:
    now = 100.0
    patience = Patience(4.0, clock=lambda: now)
    pauses = []
    while (pause_s := patience.pause_s()) is not None:
        pauses.append(pause_s)
        now += pause_s
    assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
    assert max(pauses) <= 2.0
    assert sum(pauses) == pytest.approx(4.0)
    patience.heard()
    assert patience.pause_s() == 0.05
    assert Patience(0.0, clock=lambda: now).pause_s() is None


def test_every_code_but_one_is_final() -> None:
    retried = [cls for cls in status._CODES if issubclass(cls, errors.GatewayUnavailableError)]
    assert retried == [errors.GatewayUnavailableError]
