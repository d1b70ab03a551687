"""Adapters on stages against peft on the whole model in one process: a difference of 0.0, or a refusal by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from shardlift.proto.v1 import errors, inference_pb2
from shardlift.proto.v1.status import from_refusal
from shardlift.worker.adapter_fetch import fetch_tensors
from shardlift.worker.adapters import KINDS, check_adapter_config, check_adapter_name
from shardlift.worker.stage import ResidentStage, StepInput
from shardlift.worker.tensors import to_message
from tests.support import adapters, checkpoints, ring
from tests.support.session import Session

IDS = torch.arange(5, 17)[None]
QV = ["q_proj", "v_proj"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": QV} | fields))


@dataclass(frozen=True, kw_only=True)
class Case:
    config: Callable[[], Any] = lora
    family: str = "llama"
    quantization: dict[str, Any] | None = None
    dtype: str = "auto"
    ends: tuple[int, ...] = (1, 3)
    base: dict[str, Any] = field(default_factory=dict)


CASES = {
    "lora": Case(),
    "all-linear": Case(config=lambda: lora(target_modules="all-linear", use_rslora=True)),
    "one stage": Case(config=lambda: lora(target_modules="all-linear"), ends=()),
    "dora": Case(config=lambda: lora(use_dora=True)),
    "regex, ranks": Case(
        config=lambda: lora(
            target_modules=r".*\.[12]\..*(q|o)_proj", rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 3}
        )
    ),
    "last layer": Case(config=lambda: lora(layers_to_transform=[3], exclude_modules=["v_proj"])),
    "own head": Case(config=lambda: lora(modules_to_save=["lm_head"])),
    "own embedding": Case(config=lambda: lora(modules_to_save=["embed_tokens", "norm"])),
    "embedding and head": Case(config=lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied embedding": Case(config=lambda: lora(target_modules=["embed_tokens", "q_proj"]), base={"tied": True}),
    "tokens": Case(config=lambda: lora(trainable_token_indices=[5, 6, 7])),
    "tokens of both": Case(config=lambda: lora(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [7]})),
    "tied tokens": Case(config=lambda: lora(trainable_token_indices=[5, 6, 7]), base={"tied": True}),
    "tied tokens, one stage": Case(
        config=lambda: lora(trainable_token_indices=[5, 6, 7]), base={"tied": True}, ends=()
    ),
    "tied tokens alone": Case(
        config=lambda: peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"]),
        base={"tied": True},
    ),
    "tied tokens, bfloat16": Case(
        config=lambda: lora(trainable_token_indices={"embed_tokens": [5, 6, 7]}), base={"tied": True}, dtype="bfloat16"
    ),
    "bfloat16": Case(dtype="bfloat16"),
    "nf4": Case(config=lambda: lora(target_modules="all-linear"), quantization=NF4, dtype="bfloat16"),
    "nf4, dora, own head": Case(config=lambda: lora(use_dora=True, modules_to_save=["lm_head"]), quantization=NF4),
    "int8": Case(quantization=INT8, dtype="float16"),
    "gpt2": Case(family="gpt2", config=lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2, biases": Case(
        family="gpt2", config=lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    ),
    "gpt2, nf4": Case(
        family="gpt2", config=lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True), quantization=NF4
    ),
    "qwen3": Case(family="qwen3", config=lambda: lora(target_modules="all-linear")),
    "mixtral": Case(family="mixtral"),
    "mixtral, experts": Case(family="mixtral", config=lambda: lora(target_modules="all-linear")),
    "mixtral, nf4": Case(family="mixtral", quantization=NF4),
    "mixtral, nf4, experts": Case(
        family="mixtral", config=lambda: lora(target_modules="all-linear"), quantization=NF4, dtype="bfloat16"
    ),
}


def load(case: Case, tmp_path: Path) -> tuple[Path, list[ResidentStage]]:
    base = checkpoints.tiny(case.family, tmp_path / "base", **case.base)
    return base, ring.load(base, case.ends, quantization=case.quantization, dtype=case.dtype)


def names_of(stages: list[ResidentStage]) -> list[list[str]]:
    return [[name for name, _ in stage.model.named_modules()] for stage in stages]


def check(case: Case, tmp_path: Path) -> list[ResidentStage]:
    """The adapter's logits are peft's, and the base's what they were before, with it and after it."""
    base, stages = load(case, tmp_path)
    path = adapters.make(base, tmp_path / "adapter", case.config())
    adapted = adapters.whole(base, {"x": path}, quantization=case.quantization, dtype=case.dtype)
    before, modules = adapters.through(stages, IDS, ()), names_of(stages)
    found = adapters.outlined(base, path, "x", dtype=str(stages[0].dtype).removeprefix("torch."))
    sizes = adapters.attach(stages, found.spec)
    assert sum(sizes) > 0
    expected = adapters.logits(adapted, IDS, ["x"])
    assert torch.equal(adapters.through(stages, IDS, ["x"]), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(adapters.through(stages, IDS, ()), before)
    for stage in stages:
        stage.adapters.remove("x")
        stage.adapters.remove("x")
    assert names_of(stages) == modules
    assert torch.equal(adapters.through(stages, IDS, ()), before)
    if case.quantization is None and case.dtype == "auto" and found.spec.kind == "LORA":
        assert sizes == [found.outline.bytes_of(stage.cut) for stage in stages]
    return stages


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_on_stages_equals_peft_in_one_process(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"oft_block_size": 8, "r": 0},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
}


# Of each way to be computed one; the others take their time.
SOON = {"ADALORA", "FOURIERFT", "IA3", "LN_TUNING", "LOKR", "OFT", "TRAINABLE_TOKENS"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SOON else pytest.mark.soak) for kind in sorted(KINDS - {"LORA"})]
)
def test_peft_s_other_kinds_come_out_as_in_one_process(kind: str, tmp_path: Path) -> None:
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    with adapters.quiet():
        check(Case(config=lambda: config_class(**({"target_modules": QV} | FIELDS.get(kind, {})))), tmp_path)


# -- several -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapted:
    """A model on three stages with the adapters a (attention), b (all layers), c (its own head), and in one process."""

    base: Path
    paths: dict[str, Path]
    stages: list[ResidentStage]
    whole: Any


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    tmp_path = tmp_path_factory.mktemp("adapted")
    base = checkpoints.tiny("llama", tmp_path / "base", max_position_embeddings=4096)
    configs = {"a": lora(), "b": lora(target_modules="all-linear", r=2), "c": lora(modules_to_save=["lm_head"])}
    paths = {
        name: adapters.make(base, tmp_path / name, config, seed=number)
        for number, (name, config) in enumerate(configs.items())
    }
    stages = ring.load(base, (1, 3))
    for name, path in paths.items():
        adapters.attach(stages, adapters.outlined(base, path, name).spec)
    return Adapted(base, paths, stages, adapters.whole(base, paths))


@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"], ["b", "a"], ["c"], ["a", "c"], []], ids="+".join)
def test_several_adapters_are_there_at_once_and_add_up_as_in_peft(adapted: Adapted, names: list[str]) -> None:
    expected = adapters.logits(adapted.whole, IDS, names)
    assert torch.equal(adapters.through(adapted.stages, IDS, names), expected)


def test_whoever_computes_between_two_layers_leaves_the_adapters_as_they_were(adapted: Adapted) -> None:
    expected = adapters.logits(adapted.whole, IDS, ["a"])
    others = [("b",), (), ("c",)]
    for stage, other in zip(adapted.stages, others, strict=True):
        stage.on_layer(lambda stage=stage, other=other: stage.adapters.use(other))  # type: ignore[misc]
    try:
        assert torch.equal(adapters.through(adapted.stages, IDS, ["a"]), expected)
    finally:
        for stage in adapted.stages:
            stage.on_layer(lambda: None)


def test_stages_hold_what_peft_holds_under_the_names_of_the_whole_model(adapted: Adapted) -> None:
    ours = {
        name: parameter
        for stage in adapted.stages
        for name, parameter in stage.model.named_parameters()
        if ".lora_" in name or "modules_to_save" in name
    }
    theirs = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in adapted.whole.named_parameters()
        if ".lora_" in name or "modules_to_save" in name
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(parameter.requires_grad for parameter in ours.values())


Gradients = dict[str, torch.Tensor | None]


def trained(stages: list[ResidentStage], names: tuple[str, ...] = ("x",)) -> Gradients:
    """The gradients of what LoRA has, over the stages, as a pipeline has them: each takes its input's from the next."""
    own = {}
    for stage in stages:
        stage.adapters.use(names)
        stage.model.train()
        for name, parameter in stage.model.named_parameters():
            if ".lora_" in name:
                own[name] = parameter.requires_grad_(True)
    positions, inputs, outputs, hidden = torch.arange(IDS.shape[1])[None], [], [], IDS
    for stage in stages:
        fields: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        fields["input_ids" if stage.cut.is_first else "inputs_embeds"] = hidden
        if stage.cut.is_last:
            outputs.append(stage.model(**fields, labels=IDS).loss)
        else:
            outputs.append(stage.model.get_submodule(stage.anatomy.base)(**fields).last_hidden_state)
            hidden = outputs[-1].detach().requires_grad_(True)
            inputs.append(hidden)
    outputs.pop().backward()
    while outputs:
        outputs.pop().backward(inputs.pop().grad)
    gradients = {name: parameter.grad for name, parameter in own.items()}
    for stage in stages:
        stage.model.eval()
        for parameter in stage.model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
    return gradients


def trained_by_peft(base: Path, path: Path, case: Case) -> Gradients:
    whole = adapters.whole(base, {"x": path}, quantization=case.quantization, dtype=case.dtype)
    whole.train()
    own = {
        name.removeprefix("base_model.model."): parameter.requires_grad_(True)
        for name, parameter in whole.named_parameters()
        if ".lora_" in name
    }
    with adapters.quiet():
        whole(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in own.items()}


TRAINED = {
    "float32": Case(ends=()),
    "nf4": Case(config=lambda: lora(target_modules="all-linear"), quantization=NF4, dtype="bfloat16", ends=()),
    "nf4, two stages": Case(
        config=lambda: lora(target_modules="all-linear"), quantization=NF4, dtype="bfloat16", ends=(2,)
    ),
    "single quantization, float32": Case(
        config=lambda: lora(target_modules="all-linear"),
        quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
        ends=(1,),
    ),
    "int8, two stages": Case(quantization=INT8, dtype="float16", ends=(2,)),
    "gpt2, nf4": Case(
        family="gpt2",
        config=lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True),
        quantization=NF4,
        dtype="bfloat16",
        ends=(2,),
        base={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_adapters_on_stages_can_be_trained_before_they_serve_and_after(name: str, tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes packs what has computed; the kernel for that has no gradient."""
    case = TRAINED[name]
    base, stages = load(case, tmp_path)
    path = adapters.make(base, tmp_path / "adapter", case.config())
    adapters.attach(stages, adapters.outlined(base, path, "x", dtype=str(stages[0].dtype).removeprefix("torch.")).spec)
    expected = trained_by_peft(base, path, case)
    assert expected
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in expected.values())
    answers = []
    for _ in range(2):  # fresh, and after the first has served
        ours = trained(stages)
        assert ours.keys() == expected.keys()
        differ = [each for each in expected if ours[each] is None or not torch.equal(ours[each], expected[each])]
        assert not differ
        answers.append([adapters.through(stages, IDS, names) for names in (["x"], [])])
    for before, after in zip(*answers, strict=True):
        assert torch.equal(before, after)


def test_a_pass_that_is_still_to_go_back_keeps_its_weights_while_others_are_served(tmp_path: Path) -> None:
    case = TRAINED["nf4"]
    base, stages = load(case, tmp_path)
    path = adapters.make(base, tmp_path / "adapter", case.config())
    adapters.attach(stages, adapters.outlined(base, path, "x", dtype="bfloat16").spec)
    (stage,) = stages
    served = adapters.through(stages, IDS, ["x"])
    expected = trained(stages)
    own = {name: each.requires_grad_(True) for name, each in stage.model.named_parameters() if ".lora_" in name}
    stage.model.train()
    loss = stage.model(IDS, labels=IDS).loss
    stage.model.eval()
    assert torch.equal(adapters.through(stages, IDS, ["x"]), served)
    loss.backward()
    for name, parameter in own.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name


# -- in a ring ---------------------------------------------------------------------------------------------------------


def generate_request(ids: torch.Tensor, names: list[str] | None, **fields: Any) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(input_ids=to_message(ids))
    if names is not None:
        request.adapters.SetInParent()
        request.adapters.names.extend(names)
    request.generation.update(fields)
    return request


async def generated(pipeline: ring.Ring, ids: torch.Tensor, names: list[str] | None, **fields: Any) -> list[list[int]]:
    call = pipeline.stub.Generate(generate_request(ids, names, **fields), metadata=pipeline.metadata)
    return [list(answer.step.token_ids) async for answer in call if answer.HasField("step")]


def expected_tokens(adapted: Adapted, ids: torch.Tensor, names: list[str], count: int) -> list[list[int]]:
    with torch.inference_mode():
        if names:
            adapted.whole.base_model.set_adapter(names)
            tokens = adapted.whole.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
        else:
            with adapted.whole.disable_adapter():
                tokens = adapted.whole.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
    return [column.tolist() for column in tokens[:, ids.shape[1] :].T]


async def test_requests_with_different_adapters_run_at_once_and_get_peft_s_tokens(adapted: Adapted) -> None:
    choices: list[list[str]] = [["a"], [], ["b"], ["a", "b"], ["a"], ["c"], []]
    prompts = [IDS[:, : 5 + index] for index in range(len(choices))]
    expected = [expected_tokens(adapted, ids, names, 24) for ids, names in zip(prompts, choices, strict=True)]
    async with ring.serve(adapted.stages) as pipeline:
        assert all(stage.can_batch for stage in adapted.stages)
        got = await asyncio.gather(
            *(generated(pipeline, ids, names, max_new_tokens=24) for ids, names in zip(prompts, choices, strict=True))
        )
        assert got == expected
        assert max(pipeline.servers[0].pipeline.compute.batches) > 1
        await pipeline.idle()


async def test_prefill_and_cached_passes_equal_peft_and_a_session_keeps_its_adapters(adapted: Adapted) -> None:
    names = ["a", "b"]
    choice = inference_pb2.AdapterChoice(names=names)
    adapted.whole.base_model.set_adapter(names)
    with torch.inference_mode():
        first = adapted.whole(IDS[:, :8], use_cache=True)
        second = adapted.whole(IDS[:, 8:9], past_key_values=first.past_key_values)
    async with ring.serve(adapted.stages, batches=False) as pipeline:
        session = Session(pipeline)
        assert torch.equal(await session.forward(IDS[:, :8], adapters=choice), first.logits)
        assert torch.equal(await session.forward(IDS[:, 8:9]), second.logits)
        await session.forward(IDS, keep=0, adapters=inference_pb2.AdapterChoice(names=["c"]))
        await session.call.write(
            inference_pb2.SessionRequest(
                forward=inference_pb2.ForwardRequest(input_ids=to_message(IDS[:, :1])), adapters=choice
            )
        )
        error = from_refusal((await session.call.read()).refused)
        assert isinstance(error, errors.InvalidRequestError)
        assert "made with adapters ['c'], and can't go on with ['a', 'b']" in str(error)
        session.call.cancel()
        await pipeline.idle()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [(["nobody"], "no adapter 'nobody'; loaded: a, b, c"), (["a", "a"], "each once")],
)
def test_a_choice_that_cannot_be_met_is_refused(adapted: Adapted, names: list[str], said: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=said):
        adapted.stages[0].adapters.check(names)


def test_two_adapters_with_a_head_of_their_own_are_not_used_together(adapted: Adapted, tmp_path: Path) -> None:
    path = adapters.make(adapted.base, tmp_path / "d", lora(modules_to_save=["lm_head"]))
    adapters.attach(adapted.stages, adapters.outlined(adapted.base, path, "d").spec)
    with pytest.raises(errors.InvalidRequestError, match="lm_head"):
        adapted.stages[-1].adapters.check(["c", "d"])
    for stage in adapted.stages:
        stage.adapters.remove("d")


@pytest.mark.parametrize("name", ["", "a.b", "pop", "weig", "x" * 70, "-a"])
def test_names_that_peft_or_torch_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match="can't be an adapter's name"):
        check_adapter_name(name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": "VERA"}, "VERA"),
        ({}, "None"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"peft_type": "LORA", "layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ],
)
def test_kinds_that_stages_cannot_have_are_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=said.replace("[", r"\[")):
        check_adapter_config(config, "org/adapter")


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _other_rank(tensors: dict[str, torch.Tensor]) -> None:
    key = min(tensors)
    tensors[key] = torch.cat([tensors[key], tensors[key]])


BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "another base": (
        lambda path: adapters.edit(path, target_modules=["qkv"]),
        errors.InvalidRequestError,
        "qkv.*not found in the base model",
    ),
    "missing": (lambda path: _rewrite(path, lambda t: t.__delitem__(min(t))), errors.TensorMismatchError, "no tensor"),
    "too many": (
        lambda path: _rewrite(path, lambda t: t.update({"base_model.model.model.ghost.lora_A.weight": torch.ones(2)})),
        errors.TensorMismatchError,
        "ghost.*no place",
    ),
    "misshapen": (lambda path: _rewrite(path, _other_rank), errors.TensorMismatchError, "size mismatch"),
    "no field of it": (
        lambda path: adapters.edit(path, r="four"),
        errors.InvalidRequestError,
        "doesn't go with this model",
    ),
    "pickled": (
        lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin") and None,
        errors.UnsupportedModelError,
        "adapter_model.bin",
    ),
    "no config": (
        lambda path: (path / "adapter_config.json").unlink(),
        errors.CheckpointNotFoundError,
        "is no adapter",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_go_with_the_model_is_refused_before_anything_is_fetched(
    name: str, adapted: Adapted, tmp_path: Path
) -> None:
    path = adapters.make(adapted.base, tmp_path / "broken", lora())
    damage, kind, said = BROKEN[name]
    damage(path)
    with pytest.raises(kind, match=said) as caught:
        adapters.outlined(adapted.base, path, "x")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_experts_in_4_bits_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base = checkpoints.tiny("mixtral", tmp_path / "base")
    path = adapters.make(base, tmp_path / "adapter", lora(target_modules="all-linear"))
    with pytest.raises(errors.UnsupportedModelError, match=r"quantize_experts=False \(--no-quantize-experts\)"):
        adapters.outlined(base, path, "x", quantize_experts=True)
    assert adapters.outlined(base, path, "x").outline.parameters


def test_an_adapter_that_would_change_the_base_for_everybody_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    path = adapters.make(adapted.base, tmp_path / "e", lora(target_modules=["embed_tokens", "q_proj"]))
    before = names_of(adapted.stages)

    def other_embedding(tensors: dict[str, torch.Tensor]) -> None:
        (key,) = (key for key in tensors if "base_layer" in key)
        tensors[key] += 1

    _rewrite(path, other_embedding)
    spec = adapters.outlined(adapted.base, path, "e").spec
    with pytest.raises(errors.TensorMismatchError, match="embed_tokens"):
        adapters.attach(adapted.stages, spec)
    assert names_of(adapted.stages) == before


def test_a_file_that_has_changed_since_is_refused_and_leaves_nothing(adapted: Adapted, tmp_path: Path) -> None:
    path = adapters.make(adapted.base, tmp_path / "f", lora())
    spec = adapters.outlined(adapted.base, path, "f").spec
    _rewrite(path, lambda tensors: tensors.update({key: 2 * value for key, value in tensors.items()}))
    before = names_of(adapted.stages)
    with pytest.raises(errors.CorruptCheckpointError):
        adapters.attach(adapted.stages, spec)
    assert names_of(adapted.stages) == before


def test_a_stage_that_fails_half_way_is_as_it_was(adapted: Adapted, tmp_path: Path) -> None:
    path = adapters.make(adapted.base, tmp_path / "g", lora(target_modules="all-linear"))
    spec = adapters.outlined(adapted.base, path, "g").spec
    stage = adapted.stages[1]
    tensors = dict(fetch_tensors(spec, stage.adapters.records(spec), None))
    before, logits = names_of([stage]), adapters.through(adapted.stages, IDS, ["a", "b"])
    del tensors[max(tensors)]
    with pytest.raises(errors.TensorMismatchError, match="no tensor"):
        stage.adapters.load(spec, tensors)
    assert names_of([stage]) == before
    assert stage.adapters.names == ("a", "b", "c")
    assert torch.equal(adapters.through(adapted.stages, IDS, ["a", "b"]), logits)


def test_a_stage_reads_its_own_layers_alone(adapted: Adapted) -> None:
    spec = adapters.outlined(adapted.base, adapted.paths["a"], "a").spec
    parts = [stage.adapters.records(spec) for stage in adapted.stages]
    assert sorted(record.key for part in parts for record in part) == sorted(record.key for record in spec.records)
    assert all(".layers.0." in record.key for record in parts[0])
    assert json.loads(json.dumps(spec.to_json())) is not None


def test_tokens_that_are_made_again_are_those_of_then_with_an_adapter(adapted: Adapted) -> None:
    (stage,) = ring.load(adapted.base, ())
    adapters.attach([stage], adapters.outlined(adapted.base, adapted.paths["b"], "b").spec)
    stage.can_batch = stage.is_row_blind = True  # as if the base's kernels were
    found = []
    for together in (False, True):
        cache, outputs = stage.new_cache(), []
        pieces = [IDS[:, :4], IDS[:, 4:]] if together else [IDS[:, :4], *IDS[:, 4:].split(1, dim=1)]
        for piece in pieces:
            positions = torch.arange(cache.length, cache.length + piece.shape[1])[None]
            step = StepInput(
                input=piece,
                attention_mask=None,
                position_ids=positions,
                one_by_one=together and cache.length > 0,
                adapters=("b",),
            )
            outputs.append(stage.forward(step, cache, 0))
        found.append(torch.cat([each[:, -1:] for each in outputs], dim=1)[:, -1])
    assert torch.equal(*found)
