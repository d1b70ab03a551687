"""Arguments that name attributes of a config: transformers' outcome with the same ones, or a refusal of the name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import shardlift
from shardlift.client import options
from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.overrides import ARGUMENTS, override
from shardlift.cluster.planning import OutlinedModel, outline_model
from shardlift.cluster.requests import model_options
from shardlift.proto.v1.errors import InvalidRequestError, UnknownArgumentError
from shardlift.worker.skeleton import parse_config
from tests.support import adapters, checkpoints, ring

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("overrides")
    return {family: checkpoints.tiny(family, home / family) for family in ("llama", "gpt2", "mixtral")}


def outlined(folder: Path, **arguments: Any) -> OutlinedModel:
    """As the gateway outlines what `from_pretrained` was called with."""
    return outline_model(CheckpointRequest(path=str(folder)), None, model_options(options.load_options(**arguments)))


def logits(folder: Path, **arguments: Any) -> torch.Tensor:
    """Through two stages."""
    return adapters.through(ring.load(folder, (2,), model=model_options(options.load_options(**arguments))), IDS, ())


def local(folder: Path, **arguments: Any) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
        return result


# -- what a config has -------------------------------------------------------------------------------------------------

CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rms_norm_eps": 0.1}),
    ("llama", {"num_hidden_layers": 2}),
    ("llama", {"hidden_act": "gelu", "use_cache": False}),
    ("gpt2", {"layer_norm_epsilon": 0.1}),
    ("gpt2", {"n_head": 2}),
    ("gpt2", {"num_attention_heads": 2}),
    ("gpt2", {"num_hidden_layers": 3}),
    ("mixtral", {"num_experts_per_tok": 1, "experts_implementation": "eager"}),
]


@pytest.mark.filterwarnings("ignore:.*")  # transformers tells of layers that are left over
@pytest.mark.parametrize(("family", "changes"), CHANGED, ids=str)
def test_attributes_are_overridden_as_by_transformers(
    family: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    if "num_hidden_layers" in changes:
        # Tensors of other layers are too many here; transformers only tells of them.
        values = json.loads((folders[family] / "config.json").read_text())
        config = parse_config(override(values, changes))
        expected = transformers.AutoConfig.from_pretrained(folders[family], **changes)
        assert config.to_dict() == {**expected.to_dict(), "_name_or_path": ""}
        return
    ours = logits(folders[family], **changes)
    assert torch.equal(ours, local(folders[family], **changes))
    assert not torch.equal(ours, local(folders[family]))


def test_a_part_of_a_config_is_overridden_as_by_transformers() -> None:
    plain = transformers.Gemma3Config(text_config={"num_hidden_layers": 4, "hidden_size": 64})
    values, changes = json.loads(plain.to_json_string(use_diff=False)), {"text_config": {"rms_norm_eps": 0.25}}
    expected = transformers.Gemma3Config.from_dict(values, **changes)
    found = transformers.Gemma3Config.from_dict(override(values, changes))
    assert found.to_dict() == expected.to_dict()
    assert found.text_config.rms_norm_eps == 0.25
    assert found.text_config.hidden_size == 64
    with pytest.raises(UnknownArgumentError, match="Gemma3Config"):
        override(values, {"rms_norm_eps": 0.25})  # the text's alone


def test_what_is_not_overridden_stays_to_the_letter(folders: dict[str, Path]) -> None:
    values = json.loads((folders["llama"] / "config.json").read_text())
    assert override(values, {}) == values


# -- what it has not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("load_in_4bits", "load_in_4bit"),
        ("nun_stages", "num_stages"),
        ("torch_dtypes", "torch_dtype"),
        ("quantisation_config", "quantization_config"),
        ("hidden_sizes", "hidden_size"),
        ("rms_norm_epsilon", "rms_norm_eps"),
        ("max_new_tokens", None),
        ("num_experts", None),
        ("text_config", None),
        ("to_dict", None),
        ("_attn_implementation", "attn_implementation"),
        ("xyzzy", ""),
    ],
)
def test_a_name_that_nothing_has_is_refused_as_by_transformers(
    name: str, meant: str | None, folders: dict[str, Path]
) -> None:
    with pytest.raises(UnknownArgumentError, match=f"unexpected keyword argument '{name}'") as caught:
        outlined(folders["llama"], **{name: True})
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert "LlamaConfig" in str(caught.value)
    if meant is not None:
        assert (f"did you mean '{meant}'" if meant else "did you mean") in str(caught.value) or not meant
    if not name.startswith("_") and name != "to_dict":
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            AutoModelForCausalLM.from_pretrained(folders["llama"], **{name: True})


def test_other_names_of_an_attribute_are_known(folders: dict[str, Path]) -> None:
    with pytest.raises(UnknownArgumentError, match="did you mean 'n_layer'"):
        outlined(folders["gpt2"], n_layers=2)


def test_a_value_that_a_config_can_not_have_is_told(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequestError, match="config") as caught:
        outlined(folders["llama"], num_hidden_layers="two")
    assert "\n" not in str(caught.value)


def test_the_names_that_are_suggested_are_those_of_from_pretrained() -> None:
    parameters = set(inspect.signature(shardlift.AutoModelForCausalLM.from_pretrained).parameters) - {"kwargs"}
    assert parameters <= set(ARGUMENTS)


# -- how experts are computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementation_counts(implementation: str, folders: dict[str, Path]) -> None:
    assert torch.equal(
        logits(folders["mixtral"], experts_implementation=implementation),
        local(folders["mixtral"], experts_implementation=implementation),
    )


def test_experts_implementations_differ(folders: dict[str, Path]) -> None:
    """Else the test before would show nothing."""
    eager, grouped = (
        logits(folders["mixtral"], dtype="bfloat16", experts_implementation=name) for name in ("eager", "grouped_mm")
    )
    assert not torch.equal(eager, grouped)


def test_an_experts_implementation_that_is_none_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequestError, match='experts_implementation="bogus"'):
        outlined(folders["mixtral"], experts_implementation="bogus")
    with pytest.raises(InvalidRequestError, match=r"one by one: leave it out, or pass quantize_experts=False"):
        outlined(folders["mixtral"], load_in_4bit=True, experts_implementation="grouped_mm")
    for arguments in ({"experts_implementation": "eager"}, {"quantize_experts": False}):
        assert outlined(folders["mixtral"], load_in_4bit=True, **arguments).options.quantization
