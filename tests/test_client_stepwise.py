"""What a handle drives step by step, against transformers' own generate on the very model that answers the passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import dynamic_module_utils
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

import shardlift
from shardlift.client.forward import RemoteCache
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1 import errors
from tests.support import checkpoints
from tests.support.model_gateway import ModelGateway, tiny_llama

IDS = torch.tensor([[1, 5, 9, 7, 5, 9], [1, 11, 12, 13, 14, 15]])
PADDED = torch.tensor([[0, 0, 1, 5, 9, 7], [1, 11, 12, 13, 14, 15]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def gateway() -> Iterator[ModelGateway]:
    with ModelGateway(tiny_llama()) as gateway:
        yield gateway


@pytest.fixture
def model(gateway: ModelGateway) -> Iterator[RemoteModel]:
    gateway.calls.clear()
    with shardlift.connect(gateway.address) as client:
        yield client.model("tiny")


def both(gateway: ModelGateway, model: RemoteModel, ids: torch.Tensor, **arguments: Any) -> tuple[Any, Any]:
    """What the local and the remote model generate."""
    torch.manual_seed(7)
    expected = gateway.model.generate(ids, **arguments)
    torch.manual_seed(7)
    actual = model.generate(ids, **arguments)
    assert not gateway.called("Generate"), "the workers were to be asked for passes"
    return expected, actual


@pytest.mark.parametrize("own", [None, "handle", "off"])
@pytest.mark.parametrize("said", [..., None, "request", ["one", "two"]], ids=str)
def test_each_request_says_its_adapters(own: str | None, said: Any, gateway: ModelGateway, model: RemoteModel) -> None:
    """Its own; else the handle's; else nothing, which leaves it to the model."""
    if own is not None:
        model._adapters = ("handle",)
    if own == "off":
        model.disable_adapters()
    expected = {None: None, "handle": ["handle"], "off": []}[own] if said is ... else asked(said)
    model(IDS, adapter=said)
    model.generate(IDS, max_new_tokens=2, adapter=said)
    model.generate(IDS, max_new_tokens=2, num_beams=2, adapter=said)
    with model.session(adapter=said) as session:
        session.forward(IDS)
    sent = [
        *gateway.called("Forward"),
        *gateway.called("Generate"),
        *(request.forward for request in gateway.called("Session")),
    ]
    assert len(sent) >= 4
    assert all((list(each.adapters.names) if each.HasField("adapters") else None) == expected for each in sent)


def asked(said: str | list[str] | None) -> list[str]:
    return [] if said is None else [said] if isinstance(said, str) else said


class Louder(transformers.LogitsProcessor):
    """Prefers one token over the others, the more, the longer the sequence is."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 17] += input_ids.shape[1] / 4
        return scores


class UntilLength(transformers.StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def only_even(batch: int, ids: torch.Tensor) -> list[int]:
    return list(range(4 + 2 * batch, 64, 2))


def two_greedy_tokens(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    past = kwargs["past_key_values"]
    for _ in range(2):
        logits = model(input_ids[:, past.get_seq_length() :], past_key_values=past, use_cache=True).logits
        input_ids = torch.cat([input_ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return input_ids


TOKENIZER = checkpoints.byte_tokenizer(size=64)

CASES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "many beams": {"num_beams": 7, "num_return_sequences": 4},
    "beams, longer": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "beams, shorter": {"num_beams": 4, "length_penalty": -1.0, "no_repeat_ngram_size": 2},
    "beams, drawn": {"num_beams": 3, "do_sample": True, "temperature": 0.8},
    "beams, without a cache": {"num_beams": 2, "use_cache": False},
    "beams, in chunks": {"num_beams": 2, "prefill_chunk_size": 4},
    "a processor": {"logits_processor": transformers.LogitsProcessorList([Louder()])},
    "a processor, drawn": {"logits_processor": transformers.LogitsProcessorList([Louder()]), "do_sample": True},
    "a processor, several": {
        **{"logits_processor": transformers.LogitsProcessorList([Louder()]), "do_sample": True},
        "num_return_sequences": 3,
    },
    "a criterion": {"stopping_criteria": transformers.StoppingCriteriaList([UntilLength(9)])},
    "allowed tokens": {"prefix_allowed_tokens_fn": only_even},
    "allowed tokens, beams": {"prefix_allowed_tokens_fn": only_even, "num_beams": 3},
    "guidance": {"guidance_scale": 1.7},
    "a negative prompt": {"guidance_scale": 2.5, "negative_prompt_ids": torch.tensor([[1, 3, 4], [1, 6, 8]])},
    "beams, stopped": {"num_beams": 2, "stop_strings": ["1", "Z#"], "tokenizer": TOKENIZER},
    "a watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=4.0), "do_sample": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_tokens(name: str, padded: bool, gateway: ModelGateway, model: RemoteModel) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 8, **CASES[name]}
    if padded:
        arguments["attention_mask"] = MASK
    expected, actual = both(gateway, model, PADDED if padded else IDS, **arguments)
    assert torch.equal(actual, expected)
    assert expected.shape[1] > 6


def test_a_loop_of_the_users_own(gateway: ModelGateway, model: RemoteModel) -> None:
    expected, actual = both(gateway, model, IDS, max_new_tokens=8, custom_generate=two_greedy_tokens)
    assert torch.equal(actual, expected)
    assert expected.shape[1] == IDS.shape[1] + 2


def test_a_repositorys_own_loop(
    gateway: ModelGateway, model: RemoteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as transformers-community/group-beam-search: it is called by the names that a caller uses."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, input_ids, generation_config=None, **kwargs):\n"
        "    return model(input_ids).logits[:, -1:].argmax(-1)\n"
    )
    arguments = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    expected = gateway.model.generate(input_ids=IDS, **arguments)
    assert torch.equal(model.generate(input_ids=IDS, **arguments), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(input_ids=IDS, custom_generate=str(tmp_path), trust_remote_code=False)


ONE_ROW: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, drawn": {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 5},
    # transformers pads the healed prompts otherwise than their mask was: rows of one batch are healed wrongly there.
    "a healed prompt": {"token_healing": True, "tokenizer": TOKENIZER},
    "a healed prompt, beams": {"token_healing": True, "num_beams": 2, "tokenizer": TOKENIZER},
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_the_same_tokens_of_one_row(name: str, gateway: ModelGateway, model: RemoteModel) -> None:
    expected, actual = both(gateway, model, IDS[:1], max_new_tokens=20, **ONE_ROW[name])
    assert torch.equal(actual, expected)


def test_prompt_lookup_goes_back(gateway: ModelGateway, model: RemoteModel) -> None:
    """Guesses that are wrong have to be forgotten by the workers."""
    both(gateway, model, torch.tensor([[1, 5, 9, 7, 5, 9, 7, 5, 9]]), max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert any(request.HasField("keep") for request in gateway.called("Session"))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_a_local_assistant(sampled: bool, twin: bool, gateway: ModelGateway, model: RemoteModel) -> None:
    assistant = tiny_llama(0 if twin else 3, **({} if twin else {"hidden_size": 16}))
    arguments = {"max_new_tokens": 16, "do_sample": sampled, "assistant_model": assistant}
    torch.manual_seed(7)
    expected = gateway.model.generate(IDS[:1], **arguments)
    passes = len(gateway.calls)
    torch.manual_seed(7)
    assert torch.equal(model.generate(IDS[:1], **arguments), expected)
    if twin and not sampled:  # whose guesses are right: fewer passes than tokens
        assert len(gateway.calls) - passes < expected.shape[1] - IDS.shape[1]


def test_a_remote_assistant(gateway: ModelGateway, model: RemoteModel) -> None:
    small = tiny_llama(3, hidden_size=16)
    expected = gateway.model.generate(IDS[:1], max_new_tokens=16, assistant_model=small)
    with ModelGateway(small) as other, shardlift.connect(other.address) as client:
        assistant = client.model("tiny")
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=16, assistant_model=assistant), expected)
        assert len(other.called("Session")) > 1
        closed(other)


def closed(gateway: ModelGateway) -> None:
    """Waits for the gateway to see that every session is over."""
    deadline = threading.Event()
    for _ in range(200):
        if not gateway.open_sessions:
            return
        deadline.wait(0.05)
    raise AssertionError(f"{gateway.open_sessions} sessions are open still")


def test_a_seed_stands_for_manual_seed(gateway: ModelGateway, model: RemoteModel) -> None:
    torch.manual_seed(11)
    expected = gateway.model.generate(IDS, num_beams=3, do_sample=True, max_new_tokens=8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    actual = model.generate(IDS, num_beams=3, do_sample=True, max_new_tokens=8, seed=11)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_tokenizer_gives_can_be_passed_on(gateway: ModelGateway, model: RemoteModel) -> None:
    encoded = {"input_ids": PADDED, "attention_mask": MASK, "token_type_ids": torch.zeros_like(MASK)}
    expected = gateway.model.generate(PADDED, attention_mask=MASK, num_beams=2, max_new_tokens=4)
    assert torch.equal(model.generate(**transformers.BatchEncoding(encoded), num_beams=2, max_new_tokens=4), expected)


def test_beam_output_has_what_transformers_has(gateway: ModelGateway, model: RemoteModel) -> None:
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "return_dict_in_generate": True}
    expected, actual = both(gateway, model, IDS, **arguments, output_scores=True, output_logits=True)
    assert isinstance(actual, GenerateBeamDecoderOnlyOutput)
    for name in ("sequences", "sequences_scores", "beam_indices"):
        assert torch.equal(actual[name], expected[name])
    for name in ("scores", "logits"):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[name], expected[name], strict=True))
    assert isinstance(actual.past_key_values, RemoteCache)
    assert not actual.past_key_values.closed  # it is the caller's now
    actual.past_key_values.close()
    closed(gateway)


def test_a_generation_leaves_no_session(gateway: ModelGateway, model: RemoteModel) -> None:
    model.generate(IDS, num_beams=2, max_new_tokens=3)
    model.generate(IDS, guidance_scale=2.0, max_new_tokens=3)
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS, max_new_tokens=3, prefix_allowed_tokens_fn=lambda batch, ids: [1 // 0])
    closed(gateway)


def test_a_cache_of_an_earlier_pass(gateway: ModelGateway, model: RemoteModel) -> None:
    local = gateway.model
    cache = transformers.DynamicCache(config=local.config)
    local(IDS[:, :4], past_key_values=cache, use_cache=True)
    expected = local.generate(IDS, past_key_values=cache, max_new_tokens=4)
    remote = model(IDS[:, :4], use_cache=True).past_key_values
    assert isinstance(remote, RemoteCache)
    first = model.generate(IDS, past_key_values=remote, max_new_tokens=4)
    assert torch.equal(first, expected)
    assert remote.get_seq_length() == cache.get_seq_length() == first.shape[1] - 1
    # And on from there, with another turn's ids behind.
    following = torch.cat([first, torch.tensor([[21, 22], [23, 24]])], dim=1)
    assert torch.equal(
        model.generate(following, past_key_values=remote, max_new_tokens=4),
        local.generate(following, past_key_values=cache, max_new_tokens=4),
    )
    remote.close()


def test_defaults_of_the_handle_choose_the_mode(gateway: ModelGateway, model: RemoteModel) -> None:
    expected = gateway.model.generate(IDS, num_beams=3, max_new_tokens=4)
    model.generation_config.num_beams = 3
    assert torch.equal(model.generate(IDS, max_new_tokens=4), expected)
    given = transformers.GenerationConfig(num_beams=1, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, given), gateway.model.generate(IDS, max_new_tokens=4))
    given = transformers.GenerationConfig(num_beams=3, max_new_tokens=4)
    assert torch.equal(model.generate(IDS, given), expected)
    assert torch.equal(model.generate(IDS, {"num_beams": 3, "max_new_tokens": 4}), expected)


class Recorder:
    def __init__(self) -> None:
        self.puts: list[list[Any]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize(
    "arguments", [{"prompt_lookup_num_tokens": 3}, {"logits_processor": transformers.LogitsProcessorList([Louder()])}]
)
def test_streamers(arguments: dict[str, Any], gateway: ModelGateway, model: RemoteModel) -> None:
    theirs, ours = Recorder(), Recorder()
    gateway.model.generate(IDS[:1], max_new_tokens=6, streamer=theirs, **arguments)
    model.generate(IDS[:1], max_new_tokens=6, streamer=ours, **arguments)
    assert (ours.puts, ours.ended) == (theirs.puts, 1)


def test_a_failure_ends_the_streamer(model: RemoteModel) -> None:
    streamer = Recorder()
    with pytest.raises(ValueError, match="beam search"):  # transformers' own words
        model.generate(IDS, num_beams=2, streamer=streamer)
    assert streamer.ended == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, ValueError, "trust_remote_code"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "trust_remote_code"),
        ({"dola_layers": "high"}, ValueError, "trust_remote_code"),
        ({"num_beams": 2, "nonsense": 1}, ValueError, "nonsense"),
        ({"num_beams": 2, "cache_implementation": "static"}, errors.InvalidRequestError, "static"),
        (
            {"num_beams": 2, "return_dict_in_generate": True, "output_hidden_states": True},
            *(errors.InvalidRequestError, "output_hidden_states"),
        ),
        ({"num_beams": 2, "inputs_embeds": torch.zeros(2, 6, 32)}, errors.InvalidRequestError, "inputs_embeds"),
        ({"past_key_values": transformers.DynamicCache()}, errors.InvalidRequestError, "DynamicCache"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], message: str, model: RemoteModel) -> None:
    with pytest.raises(error, match=message):
        model.generate(IDS, max_new_tokens=2, **arguments)


def test_what_the_workers_can_do_they_do(gateway: ModelGateway, model: RemoteModel) -> None:
    plain: list[dict[str, Any]] = [
        *({}, {"num_beams": 1}, {"logits_processor": []}, {"guidance_scale": 1.0}, {"top_k": 3}),
        *({"logits_processor": transformers.LogitsProcessorList()}, {"do_sample": True, "seed": 1}),
    ]
    for arguments in plain:
        model.generate(IDS, max_new_tokens=2, **arguments)
    assert len(gateway.called("Generate")) == len(plain)
    assert not gateway.called("Session")


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64),
        lambda: transformers.Phi3Config(
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 64},
            original_max_position_embeddings=8,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
        ),
        lambda: transformers.Qwen2Config(
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "vocab_size": 64},
        ),
    ],
    ids=["gpt2", "phi3 across its switch to long factors", "qwen2"],
)
def test_other_families(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    local = transformers.AutoModelForCausalLM.from_config(build()).eval()
    local.generation_config.pad_token_id = 0
    local.generation_config.eos_token_id = 2
    with ModelGateway(local) as gateway, shardlift.connect(gateway.address) as client:
        model = client.model("tiny")
        for arguments in ({"num_beams": 3}, {"num_beams": 2, "attention_mask": MASK}):
            expected = local.generate(PADDED, max_new_tokens=6, **arguments)
            assert torch.equal(model.generate(PADDED, max_new_tokens=6, **arguments), expected)


def test_output_of_an_assisted_generation(gateway: ModelGateway, model: RemoteModel) -> None:
    arguments = {"prompt_lookup_num_tokens": 2, "return_dict_in_generate": True, "output_scores": True}
    expected, actual = both(gateway, model, IDS[:1], max_new_tokens=6, **arguments)
    assert isinstance(actual, GenerateDecoderOnlyOutput)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual.scores, expected.scores, strict=True))
    actual.past_key_values.close()
