"""Options of `generate` that the workers apply: real stages behind a gateway, against transformers in one process.

Each for one row and for a left-padded batch, both after the same torch.manual_seed: whatever is drawn is equal, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MaxTimeCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from shardlift.proto.v1.errors import CorruptCheckpointError, InvalidRequestError
from tests.support import checkpoints, ring
from tests.support.ring_gateway import Served, serving

IDS = torch.arange(5, 17)[None]
PADDED = torch.cat([torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11, 12, 13, 14, 15]]), IDS])
MASK = (PADDED != 0).long()
PROMPTS: dict[str, dict[str, Any]] = {
    "one row": {"input_ids": IDS},
    "padded": {"input_ids": PADDED, "attention_mask": MASK},
}
NEW = 8
# What the model says greedily after IDS: options that name tokens name these, or nothing would come of them.
GREEDY = (89, 96, 110, 4, 219, 89, 181, 215)
FIRST, SECOND, THIRD, FOURTH, FIFTH = GREEDY[:5]

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "top_h": {"do_sample": True, "top_h": 0.4},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.01},
    "temperature": {"do_sample": True, "temperature": 0.3},
    "a whole temperature": {"do_sample": True, "temperature": 2.0},
    "renormalize_logits": {"do_sample": True, "renormalize_logits": True, "top_k": 5},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[FIRST], [SECOND, THIRD], [FOURTH]]},
    "sequence_bias": {"sequence_bias": {(FIRST,): -10.0, (5, 6): 3.0}},
    "sequence_bias, listed": {"sequence_bias": [[[FIRST], -10.0], [[SECOND], -2.5]]},
    "suppress_tokens": {"suppress_tokens": list(GREEDY[:4])},
    "begin_suppress_tokens": {"begin_suppress_tokens": [FIRST]},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "eos_token_id": {"eos_token_id": FOURTH},
    "several ends": {"eos_token_id": [FIFTH, THIRD], "pad_token_id": 9},
    "min_new_tokens": {"eos_token_id": FIRST, "min_new_tokens": 5},
    "min_length": {"eos_token_id": FIRST, "min_length": IDS.shape[1] + 4},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 2},
    "a whole factor of decay": {"exponential_decay_length_penalty": (1, 2), "eos_token_id": 2},
    "max_length": {"max_new_tokens": None, "max_length": IDS.shape[1] + 5},
    "max_time": {"max_time": 600.0},
    "stop_strings": {"stop_strings": ["!", "zz"]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "use_cache": {"use_cache": False},
    "prefill_chunk_size": {"prefill_chunk_size": 5},
    "logits_to_keep": {"logits_to_keep": 3},
    "watermarking_config": {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=3.0)},
    "generation_config": {
        "max_new_tokens": None,
        "generation_config": GenerationConfig(max_new_tokens=6, do_sample=True, top_k=5, repetition_penalty=1.1),
    },
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(600)])},
}
WITH_A_DICT: dict[str, dict[str, Any]] = {
    "both": {"output_scores": True, "output_logits": True},
    "sampled": {"output_scores": True, "output_logits": True, "do_sample": True, "top_k": 9},
    "scores": {"output_scores": True, "suppress_tokens": [FIRST]},
    "neither": {},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Served, Path]]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"))
    checkpoints.byte_tokenizer(folder)
    with serving(folder, (1, 3)) as served:
        # Copied: mapped from the file its weights lie at odd addresses, where MKL rounds otherwise.
        yield copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder)), served, folder


def both(pair: tuple[Any, Served, Path], prompt: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    arguments = {"max_new_tokens": NEW, **PROMPTS[prompt], **arguments}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if "stop_strings" in arguments:
        arguments["tokenizer"] = checkpoints.byte_tokenizer()
    results = []
    with torch.random.fork_rng(devices=[]):
        for model in (pair[0], pair[1].model):
            torch.manual_seed(11)
            results.append(model.generate(**arguments))
    return results[0], results[1]


def test_the_tokens_that_options_name(pair: tuple[Any, Served, Path]) -> None:
    assert both(pair, "one row", {})[0][0, IDS.shape[1] :].tolist() == list(GREEDY)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_tokens(name: str, prompt: str, pair: tuple[Any, Served, Path]) -> None:
    expected, actual = both(pair, prompt, OPTIONS[name])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", WITH_A_DICT)
def test_the_same_output(name: str, prompt: str, pair: tuple[Any, Served, Path]) -> None:
    expected, actual = both(pair, prompt, {"return_dict_in_generate": True, **WITH_A_DICT[name]})
    assert type(actual) is type(expected)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in ((actual.scores, expected.scores), (actual.logits, expected.logits)):
        assert (ours is None) == (theirs is None)
        for each in zip(ours or (), theirs or (), strict=True):
            assert torch.equal(*each)
    # The keys and values are the workers', and gone by now: what goes on from them is a session.
    assert actual.past_key_values is None


IMPLIED: dict[str, dict[str, Any]] = {
    "ends": {"eos_token_id": list(range(3, 100))},
    "sampling": {"eos_token_id": list(range(3, 30)), "do_sample": True, "top_k": 7},
    "beams": {"eos_token_id": list(range(3, 60)), "num_beams": 2},
}


@pytest.mark.parametrize("name", IMPLIED)
def test_without_a_generation_config_the_models_own_says_it(name: str, tmp_path: Path) -> None:
    """In the ring, and driven from the client; and what is saved is what transformers saves."""
    folder = checkpoints.tiny("llama", tmp_path / "model", layers=2)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | IMPLIED[name] | {"max_length": IDS.shape[1] + 6}))
    local = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder, (1,)) as served:
        assert served.model.generation_config == local.generation_config
        for more in ({}, {"num_beams": 3, "max_new_tokens": NEW}):
            results = []
            for model in (local, served.model):
                torch.manual_seed(11)
                results.append(model.generate(PADDED, attention_mask=MASK, **more))
            assert torch.equal(*results)
        served.model.save_pretrained(tmp_path / "ours")
    local.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / each / "generation_config.json").read_text() for each in ("ours", "theirs"))
    assert ours == theirs


def test_a_session_keeps_what_a_config_would_not(tmp_path: Path) -> None:
    """Training leaves use_cache=False in many a config.json."""
    folder = checkpoints.tiny("llama", tmp_path, layers=2)
    (folder / "generation_config.json").write_text('{"use_cache": false}')
    local = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder, (1,)) as served, served.model.session() as session:
        found = torch.empty(1, 0, dtype=torch.long)
        for new in (IDS, IDS + 1):
            with pytest.raises(InvalidRequestError, match="use_cache=False, but a session keeps its keys and values"):
                session.generate(new, max_new_tokens=NEW, use_cache=False)
            whole = torch.cat([found, new], dim=1)
            found = session.generate(new, max_new_tokens=NEW)
            assert torch.equal(found, local.generate(whole, max_new_tokens=NEW))


def test_a_generation_config_that_can_not_be_is_refused_by_the_plan(tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path, layers=1)
    (folder / "generation_config.json").write_text('{"cache_implementation": "none such"}')
    with pytest.raises(CorruptCheckpointError, match=r"^generation_config.json says .*none such"):
        ring.specs(folder, ())
