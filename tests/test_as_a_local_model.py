"""What code written for a local model does with one, done with a handle: real stages, against transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from shardlift.client.handle import RemoteModel
from shardlift.proto.v1.errors import InvalidRequestError
from tests.support import checkpoints
from tests.support.ring_gateway import serving

IDS = torch.cat([torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11]]), torch.arange(5, 13)[None]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, RemoteModel]]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"))
    checkpoints.byte_tokenizer(folder)
    with serving(folder, (1, 3)) as served:
        # Copied: mapped from the file its weights lie at odd addresses, where MKL rounds otherwise.
        yield copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder)), served.model


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 5, "do_sample": False},
        {"max_new_tokens": 5, "num_return_sequences": 2, "return_full_text": False},
        {"max_new_tokens": 4, "num_beams": 2, "return_tensors": True},
    ],
)
def test_a_pipeline(arguments: dict[str, Any], pair: tuple[Any, RemoteModel]) -> None:
    tokenizer = checkpoints.byte_tokenizer()
    given = []
    for model in pair:
        run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
        assert run.device == torch.device("cpu")
        assert "'input_modalities': 'text'" in repr(run)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            given.append([run("Hello", **arguments), run(["Hello", "Hi you", "abcdefg"], **arguments)])
    assert given[1] == given[0]


def test_a_device_map_is_of_strings(pair: tuple[Any, RemoteModel]) -> None:
    places = pair[1].hf_device_map
    assert places["model"] == "127.0.0.1/cpu"
    assert places["model"] not in ("127.0.0.1/cuda:0", 0, None)
    assert {"127.0.0.1/cpu"} == set(places.values())
    assert json.loads(json.dumps(places)) == places


def test_a_loss(pair: tuple[Any, RemoteModel]) -> None:
    labels = IDS.masked_fill(MASK == 0, -100)
    local, model = pair
    expected = local(IDS, attention_mask=MASK, labels=labels)
    actual = model(IDS, attention_mask=MASK, labels=labels)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(model(IDS, attention_mask=MASK, labels=labels, return_dict=False)[0], expected.loss)


def test_scores_of_transitions(pair: tuple[Any, RemoteModel]) -> None:
    for arguments in ({"do_sample": False}, {"num_beams": 3}):
        found = []
        for model in pair:
            output = model.generate(
                IDS,
                attention_mask=MASK,
                max_new_tokens=4,
                return_dict_in_generate=True,
                output_scores=True,
                **arguments,
            )
            beams = getattr(output, "beam_indices", None)
            found.append(model.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=True))
        assert torch.equal(found[1], found[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"bos_token_id": 7},
        {"generation_config": GenerationConfig(bos_token_id=7, max_new_tokens=3)},
        {"inputs": IDS, "attention_mask": MASK.float()},
        {"inputs": IDS, "attention_mask": MASK.float(), "num_beams": 2},
        {
            "inputs": IDS,
            "attention_mask": MASK,
            "eos_token_id": torch.tensor([89, 4, 36]),
            "pad_token_id": torch.tensor(0),
        },
        {"inputs": IDS, "attention_mask": MASK, "output_hidden_states": True, "output_attentions": True},
    ],
    ids=["bos", "bos of a config", "float mask", "float mask, stepwise", "ids as tensors", "without a dict to be in"],
)
def test_arguments_in_other_forms(arguments: dict[str, Any], pair: tuple[Any, RemoteModel]) -> None:
    given = {**({} if "generation_config" in arguments else {"max_new_tokens": 6}), **arguments}
    assert torch.equal(pair[1].generate(**given), pair[0].generate(**given))


def test_a_stopping_rule_that_makes_no_sense_is_the_callers_fault(pair: tuple[Any, RemoteModel]) -> None:
    for arguments in ({"max_time": "soon"}, {"is_assistant": True}):
        with pytest.raises(InvalidRequestError, match="can't do as asked"):
            pair[1].generate(IDS, max_new_tokens=3, **arguments)
