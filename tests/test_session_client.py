"""A conversation over one session, against transformers' generate on the whole sequence each time."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import shardlift
from shardlift.client.handle import RemoteModel
from shardlift.client.session import RemoteSession
from shardlift.proto.v1 import errors, inference_pb2, registry_pb2
from tests.support.model_gateway import ModelGateway, tiny_llama
from tests.support.scripted_gateway import ScriptedGateway

FIRST = torch.tensor([[1, 5, 9, 7], [1, 11, 12, 13]])
SECOND = torch.tensor([[21, 22, 23], [24, 25, 26]])
PADDED = torch.tensor([[0, 0, 1, 5], [1, 11, 12, 13]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def gateway() -> Iterator[ModelGateway]:
    # No end of a sequence, unless a test names one: lengths are then those that are asked for.
    with ModelGateway(tiny_llama(eos_token_id=None)) as gateway:
        yield gateway


@pytest.fixture
def model(gateway: ModelGateway) -> Iterator[RemoteModel]:
    gateway.calls.clear()
    with shardlift.connect(gateway.address) as client:
        yield client.model("tiny")


def expected(gateway: ModelGateway, ids: torch.Tensor, mask: torch.Tensor | None = None, **arguments: Any) -> Any:
    # A mask always: without, transformers takes every pad token for padding, be it one that was generated.
    return gateway.model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **arguments)


def ended(gateway: ModelGateway) -> bool:
    waiting = threading.Event()
    return any(not gateway.open_sessions or waiting.wait(0.05) for _ in range(200))


def test_turns_cost_what_is_new_in_them(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session(idle_timeout_s=30) as session:
        first = session.generate(FIRST, max_new_tokens=5)
        assert torch.equal(first, expected(gateway, FIRST, max_new_tokens=5))
        assert torch.equal(session.tokens, first)
        assert session.length == 9
        whole = torch.cat([first, SECOND], dim=1)
        second = session.generate(SECOND, max_new_tokens=4)
        assert torch.equal(second, expected(gateway, whole, max_new_tokens=4))
        alone = session.generate(max_new_tokens=2)
        assert torch.equal(alone, expected(gateway, second, max_new_tokens=2))
        third = session.generate(None, {"max_new_tokens": 2})
        assert third.shape == (2, 20)
    requests = gateway.called("Session")
    assert (requests[0].model, requests[0].idle_timeout_s) == ("tiny", 30)
    # The last token of a turn was chosen and not passed: it goes with the next ids.
    assert [request.generate.input_ids.shape[1] for request in requests] == [4, 4, 1, 1]
    assert session.closed
    assert ended(gateway)
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        session.generate(SECOND)


def test_sampling_is_seeded(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        torch.manual_seed(3)
        first = session.generate(FIRST, do_sample=True, max_new_tokens=4)
    with model.session() as session:
        torch.manual_seed(3)
        assert torch.equal(session.generate(FIRST, do_sample=True, max_new_tokens=4), first)
    torch.manual_seed(8)
    by_hand = gateway.model.generate(FIRST, do_sample=True, max_new_tokens=4)
    with model.session() as session:
        assert torch.equal(session.generate(FIRST, do_sample=True, max_new_tokens=4, seed=8), by_hand)


@pytest.mark.parametrize("whole", [False, True])
def test_padding_stays_masked(whole: bool, gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        first = session.generate(PADDED, attention_mask=MASK, max_new_tokens=4)
        assert torch.equal(first, expected(gateway, PADDED, MASK, max_new_tokens=4))
        ids = torch.cat([first, SECOND], dim=1)
        mask = torch.cat([MASK, torch.ones(2, 7, dtype=torch.long)], dim=1)
        mask[1, -3] = 0
        second = session.generate(SECOND, attention_mask=mask if whole else mask[:, -3:], max_new_tokens=4)
        assert torch.equal(second, expected(gateway, ids, mask, max_new_tokens=4))
        with pytest.raises(errors.InvalidRequestError, match=r"\[2, 1\]"):
            session.generate([[1], [2]], attention_mask=[[1, 1], [1, 1]])
        assert not session.closed  # nothing had been sent


def test_what_follows_a_rows_end_is_masked(gateway: ModelGateway, model: RemoteModel) -> None:
    free = expected(gateway, FIRST, max_new_tokens=6)
    end = int(free[0, 5])  # of the first row, after two tokens
    assert end not in free[1].tolist()
    with model.session() as session:
        first = session.generate(FIRST, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
        assert first[0, 6:].tolist() == [0, 0, 0, 0]
        mask = torch.ones_like(torch.cat([first, SECOND], dim=1))
        mask[0, 6:10] = 0
        second = session.generate(SECOND, max_new_tokens=3)
        assert torch.equal(second, expected(gateway, torch.cat([first, SECOND], dim=1), mask, max_new_tokens=3))


def test_rollback(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        first = session.generate(FIRST, max_new_tokens=5)
        session.rollback(9)  # nothing
        session.generate(SECOND, max_new_tokens=4)
        session.rollback(9)
        assert torch.equal(session.tokens, first)
        again = session.generate(SECOND, max_new_tokens=4)
        assert torch.equal(again, expected(gateway, torch.cat([first, SECOND], dim=1), max_new_tokens=4))
        session.rollback(6)
        # Without new ids: the last token that is kept is passed once more.
        retold = session.generate(max_new_tokens=3)
        assert torch.equal(retold, expected(gateway, first[:, :6], max_new_tokens=3))
        session.rollback(0)
        assert session.length == 0
        other = session.generate(FIRST[:1], max_new_tokens=2)  # another number of rows, too
        assert torch.equal(other, expected(gateway, FIRST[:1], max_new_tokens=2))
        with pytest.raises(errors.InvalidRequestError, match="go back to 7"):
            session.rollback(7)
    kept = [request.keep if request.HasField("keep") else None for request in gateway.called("Session")]
    assert kept == [None, None, 9, 5, 0]


def test_forward_goes_on_too(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        logits = session.forward(FIRST)
        assert torch.equal(logits, gateway.model(FIRST).logits)
        first = session.generate(max_new_tokens=3)
        assert torch.equal(first, expected(gateway, FIRST, max_new_tokens=3))
        logits = session.forward(SECOND)
        assert logits.shape == (2, 3, 64)
        whole = gateway.model(torch.cat([first, SECOND], dim=1)).logits
        assert torch.allclose(logits, whole[:, -3:], atol=1e-4)
        assert session.length == 10


def test_forward_counts_positions_as_generate_does(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        first = session.generate(PADDED, attention_mask=MASK, max_new_tokens=3)
        logits = session.forward(SECOND)
        mask = torch.cat([MASK, torch.ones(2, 6, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        whole = torch.cat([first, SECOND], dim=1)
        expected = gateway.model(whole, attention_mask=mask, position_ids=positions).logits[:, -3:]
        assert torch.allclose(logits, expected, atol=1e-4)
        session.rollback(7)
        again = session.forward(SECOND, position_ids=positions[:, -3:])
        assert torch.allclose(again, expected, atol=1e-4)
        with pytest.raises(errors.InvalidRequestError, match="position_ids"):
            session.forward(SECOND, position_ids=[[1]])


def test_closing_ends_a_turn(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        running = session.stream(FIRST, max_new_tokens=20)
        next(running)
        session.close()
        with pytest.raises(errors.InvalidRequestError, match="closed in the middle"):
            list(running)


def test_stream(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        steps = [step.token_ids for step in session.stream(FIRST, max_new_tokens=3)]
        first = expected(gateway, FIRST, max_new_tokens=3)
        assert torch.tensor(steps).T.tolist() == first[:, 4:].tolist()
        assert torch.equal(session.tokens, first)
        running = session.stream(SECOND, max_new_tokens=3)
        next(running)
        with pytest.raises(errors.InvalidRequestError, match="still being streamed"):
            session.generate(SECOND)
        for _ in running:
            pass
        assert session.length == 13
        running = session.stream(SECOND, max_new_tokens=3)
        next(running)
        del running
        gc.collect()
        assert session.closed
    assert ended(gateway)


def test_turns_of_several_threads_take_turns(gateway: ModelGateway, model: RemoteModel) -> None:
    with model.session() as session:
        session.generate(FIRST, max_new_tokens=1)
        threads = [
            threading.Thread(target=session.generate, args=(SECOND,), kwargs={"max_new_tokens": 2}) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.length == 5 + 4 * 5
        assert not session.closed


def test_output_and_streamer(gateway: ModelGateway, model: RemoteModel) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.puts: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.puts.append(value.tolist())

        def end(self) -> None:
            self.puts.append("end")

    with model.session() as session:
        session.generate(FIRST, max_new_tokens=2)
        recorder = Recorder()
        arguments = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
        whole = torch.cat([session.tokens, SECOND], dim=1)
        output = session.generate(SECOND, streamer=recorder, **arguments)  # type: ignore[arg-type]
        theirs = expected(gateway, whole, **arguments)
        assert isinstance(output, transformers.generation.utils.GenerateDecoderOnlyOutput)
        assert torch.equal(output.sequences, theirs.sequences)
        assert all(torch.equal(ours, other) for ours, other in zip(output.logits, theirs.logits, strict=True))
        steps = output.sequences[:, -2:].T.tolist()
        assert recorder.puts == [SECOND.tolist(), *steps, "end"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "model.generate"),
        ({"logits_processor": [print]}, "model.generate"),
        ({"num_return_sequences": 2, "do_sample": True}, "one sequence per row"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_a_session_refuses(arguments: dict[str, Any], message: str, model: RemoteModel) -> None:
    with model.session() as session:
        with pytest.raises(errors.InvalidRequestError, match="no tokens yet"):
            session.generate()
        with pytest.raises(errors.InvalidRequestError, match=message):
            session.generate(FIRST, **arguments)
        assert repr(session) == "RemoteSession('tiny': 0 rows of 0 tokens)"
        session.generate(FIRST, max_new_tokens=1)
        with pytest.raises(errors.InvalidRequestError, match="1 rows"):
            session.generate(FIRST[:1])
        assert repr(session) == "RemoteSession('tiny': 2 rows of 5 tokens)"
    assert repr(session) == "RemoteSession('tiny': closed)"


def test_a_session_is_nothing_to_copy(model: RemoteModel) -> None:
    with model.session() as session:
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="open call"):
                copied(session)


def test_a_forgotten_session_is_freed(gateway: ModelGateway, model: RemoteModel) -> None:
    session = model.session()
    session.generate(FIRST, max_new_tokens=1)
    del session
    gc.collect()
    assert ended(gateway)


# What a server may answer


@pytest.fixture
def scripted() -> Iterator[tuple[ScriptedGateway, RemoteSession]]:
    with ModelGateway(tiny_llama()) as real:
        info = real.info()
    with ScriptedGateway() as gateway, shardlift.connect(gateway.address, retry_s=0) as client:
        gateway.answer("GetModel", registry_pb2.GetModelResponse(model=info))
        with client.model("tiny").session() as session:
            yield gateway, session


def said(*events: inference_pb2.GenerateResponse | inference_pb2.SessionState) -> list[inference_pb2.SessionResponse]:
    reply = inference_pb2.SessionResponse
    return [
        reply(done=event) if isinstance(event, inference_pb2.SessionState) else reply(generate=event)
        for event in events
    ]


ACCEPTED = inference_pb2.GenerateResponse(accepted=inference_pb2.PromptAccepted(batch=1, prompt_tokens=2))
STEP = inference_pb2.GenerateResponse(step=inference_pb2.GeneratedStep(token_ids=[3]))
FINISHED = inference_pb2.GenerateResponse(
    finished=inference_pb2.GenerationFinished(new_tokens=1, reason="stop", row_tokens=[1])
)


@pytest.mark.parametrize(
    "replies",
    [
        [],
        said(ACCEPTED, STEP),
        said(STEP),
        said(ACCEPTED, STEP, inference_pb2.SessionState(length=2, rows=1)),
        said(ACCEPTED, STEP, FINISHED, STEP),
        said(ACCEPTED, STEP, FINISHED, inference_pb2.SessionState(length=1, rows=1)),
        said(ACCEPTED, STEP, FINISHED, inference_pb2.SessionState(length=2, rows=2)),
        [inference_pb2.SessionResponse(forward=inference_pb2.ForwardResponse(more=b"1"))],
    ],
    ids=["nothing", "no end", "no start", "unfinished", "after the end", "length", "rows", "a pass"],
)
def test_answers_that_break_the_protocol(
    replies: list[inference_pb2.SessionResponse], scripted: tuple[ScriptedGateway, RemoteSession]
) -> None:
    gateway, session = scripted
    gateway.answer("Session", *replies)
    with pytest.raises(errors.InternalError, match=r"the (gateway|session)"):
        session.generate([[1, 2]])
    assert session.closed


@pytest.mark.parametrize("error", [errors.SessionExpiredError, errors.ModelBusyError, errors.GatewayUnavailableError])
def test_a_session_that_ends_is_never_begun_again(
    error: type[errors.ShardliftError], scripted: tuple[ScriptedGateway, RemoteSession]
) -> None:
    gateway, session = scripted
    state = inference_pb2.SessionState(length=2, rows=1)
    gateway.answer("Session", *said(ACCEPTED, STEP, FINISHED, state), error=error("it is over"))
    session.generate([[1, 2]])
    with pytest.raises(error, match="it is over"):
        session.generate([[4]])
    assert session.closed
    assert session.tokens.tolist() == [[1, 2, 3]]  # to start another one with
