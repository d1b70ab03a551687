"""Stop strings on real stages behind a gateway, against transformers in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GenerationConfig

from shardlift.client.cli.main import cli
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1 import errors, inference_pb2
from shardlift.worker.tensors import to_message
from tests.support import checkpoints
from tests.support.ring_gateway import NAME, Served, serving

PROMPT = "Hello there, how are"
NEW = 24


@dataclass
class Pair:
    """The stages, and the same in one process. chosen: what comes after PROMPT, greedily, unless it is stopped."""

    served: Served
    local: Any
    tokenizer: Any
    chosen: list[int]

    @property
    def remote(self) -> RemoteModel:
        return self.served.model

    @property
    def ids(self) -> torch.Tensor:
        return self.tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def text(self, first: int, end: int | None = None) -> str:
        return self.tokenizer.decode(self.chosen[first : first + 1 if end is None else end])

    def both(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if "generation_config" not in arguments:
            arguments = {"max_new_tokens": NEW, "do_sample": False, **arguments}
        expected = self.local.generate(tokenizer=self.tokenizer, **arguments)
        return expected, self.remote.generate(tokenizer=self.tokenizer, **arguments)


def ascii_ids(folder: Path) -> None:
    """Has greedy search choose letters: others are no characters by themselves."""
    config = GenerationConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config.suppress_tokens = [
        index for token, index in tokenizer.get_vocab().items() if len(token) != 1 or not token.isascii()
    ]
    config.eos_token_id, config.pad_token_id = tokenizer.convert_tokens_to_ids("q"), 0
    config.save_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"))
    tokenizer = checkpoints.byte_tokenizer(folder)
    ascii_ids(folder)
    local = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    chosen = local.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(chosen) == NEW
    with serving(folder, (1, 3)) as served:
        yield Pair(served, local, tokenizer, chosen)


@pytest.mark.parametrize("form", ["list", "string", "config", "several letters", "never"])
def test_one_row(form: str, pair: Pair) -> None:
    stops: Any = [pair.text(5)]
    if form == "several letters":
        stops = [pair.text(4, 7)]
    elif form == "never":
        stops = ["no such words"]
    arguments: dict[str, Any] = {"stop_strings": stops[0] if form == "string" else stops}
    if form == "config":
        arguments = {"generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=False, stop_strings=stops)}
    expected, actual = pair.both(inputs=pair.ids, **arguments)
    assert torch.equal(actual, expected)
    assert (actual.shape[1] == pair.ids.shape[1] + NEW) == (form == "never")


def test_no_tokenizer_is_needed(pair: Pair) -> None:
    """The workers have the checkpoint's own."""
    expected, _ = pair.both(inputs=pair.ids, stop_strings=[pair.text(5)])
    stopped = pair.remote.generate(pair.ids, max_new_tokens=NEW, do_sample=False, stop_strings=[pair.text(5)])
    assert torch.equal(stopped, expected)


def test_rows_end_by_themselves(pair: Pair) -> None:
    batch = pair.tokenizer(["Hi", PROMPT, "Who"], return_tensors="pt", padding=True)
    free = pair.local.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, batch["input_ids"].shape[1] :]
    stops = [pair.tokenizer.decode(free[0, 3]), pair.tokenizer.decode(free[1, 6:8])]
    expected, actual = pair.both(**batch, stop_strings=stops)
    assert torch.equal(actual, expected)
    assert len({row.tolist().count(0) for row in actual}) > 1, "every row was to end by itself"


def test_text_streams(pair: Pair) -> None:
    stop = pair.text(4, 6)
    running = pair.remote.stream(prompt=PROMPT, max_new_tokens=NEW, do_sample=False, stop_strings=[stop])
    ids = [step.token_ids[0] for step in running if step.token_ids]
    expected, _ = pair.both(inputs=pair.ids, stop_strings=[stop])
    assert ids == expected[0, pair.ids.shape[1] :].tolist()
    assert running.finish_reason == "stop"
    pieces = pair.remote.stream_text(PROMPT, max_new_tokens=NEW, do_sample=False, stop_strings=[stop])
    assert "".join(pieces) == pair.tokenizer.decode(ids)


def test_the_command(pair: Pair) -> None:
    stop = pair.text(4, 6)
    flags = ["--greedy", "--max-new-tokens", str(NEW), "--stop", stop, "--stop", "no such words"]
    done = CliRunner().invoke(cli, ["generate", NAME, "--prompt", PROMPT, "--address", pair.served.address, *flags])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.removesuffix("\n").endswith(stop)
    assert len(done.stdout) < NEW


def test_a_session_stops_and_goes_on(pair: Pair) -> None:
    """What a row is filled up with after its stop is masked in later turns, as it is after an end of the sequence."""
    batch = pair.tokenizer([PROMPT, "Who"], return_tensors="pt", padding=True)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    new = torch.full((2, 3), 40)
    with pair.remote.session() as session:
        expected, _ = pair.both(**batch, stop_strings=[pair.text(4, 6)])
        first = session.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], stop_strings=[pair.text(4, 6)], **arguments
        )
        assert torch.equal(first, expected)
        filled = first.shape[1] - batch["input_ids"].shape[1] - 6
        assert filled > 0
        assert first[0, -filled:].tolist() == [0] * filled
        mask = torch.cat([batch["attention_mask"], torch.ones(2, filled + 6 + 3, dtype=torch.long)], dim=1)
        mask[0, -filled - 3 : -3] = 0
        second = pair.local.generate(torch.cat([first, new], dim=1), attention_mask=mask, **arguments)
        assert torch.equal(session.generate(new, **arguments), second)


def test_an_interrupted_generation_is_gone_on_with(pair: Pair) -> None:
    """As after the loss of a stage, or of the gateway: the stop that began before it is found."""
    ring = pair.served.ring
    stop = pair.text(4, 8)
    expected, _ = pair.both(inputs=pair.ids, stop_strings=[stop])
    tokens = expected[:, pair.ids.shape[1] :]
    assert tokens.shape[1] == 8
    request = inference_pb2.GenerateRequest(input_ids=to_message(pair.ids))
    request.generation.update({"max_new_tokens": NEW, "do_sample": False, "stop_strings": [stop]})

    async def rest(had: int) -> list[int]:
        request.generated.CopyFrom(to_message(tokens[:, :had].contiguous()))
        call = ring.stub.Generate(request, metadata=ring.metadata)
        return [response.step.token_ids[0] async for response in call if response.HasField("step")]

    for had in (2, 5, 7, 8):
        assert pair.served.call(lambda had=had: rest(had)) == tokens[0, had:].tolist(), had


@pytest.mark.parametrize("stops", [[3], [""], [["a"]], {"a": 1}])
def test_what_is_no_stop_string(stops: Any, pair: Pair) -> None:
    with pytest.raises(errors.InvalidRequestError, match="stop_strings"):
        pair.remote.generate(pair.ids, max_new_tokens=2, stop_strings=stops)


def test_a_models_own(pair: Pair, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path)
    checkpoints.byte_tokenizer(folder)
    ascii_ids(folder)
    config = GenerationConfig.from_pretrained(folder)
    config.stop_strings = [pair.text(5)]
    config.save_pretrained(folder)
    local = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder, (2,)) as served:
        for arguments in ({}, {"stop_strings": [pair.text(2)]}, {"stop_strings": None}):
            given = {"max_new_tokens": NEW, "do_sample": False, **arguments}
            expected = local.generate(pair.ids, tokenizer=pair.tokenizer, **given)
            assert torch.equal(served.model.generate(pair.ids, **given), expected), arguments
            assert (expected.shape[1] < pair.ids.shape[1] + NEW) == (arguments != {"stop_strings": None})


def test_without_a_tokenizer_they_are_refused(tmp_path: Path) -> None:
    with serving(checkpoints.tiny("llama", tmp_path), ()) as served:
        with pytest.raises(errors.InvalidRequestError, match="no tokenizer"):
            served.model.generate([[5, 6]], max_new_tokens=2, stop_strings=["a"])
        assert served.model.generate([[5, 6]], max_new_tokens=2).shape == (1, 4)
