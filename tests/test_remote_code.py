"""Models that a checkpoint's own code defines, where it may run: slices equal the whole, and only planned bytes run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shardlift.cluster.checkpoint import CheckpointRequest
from shardlift.cluster.devices import parse_devices
from shardlift.cluster.plan import PlanOptions
from shardlift.cluster.planning import ModelOptions, PlannedModel, plan_model
from shardlift.proto.v1.errors import CorruptCheckpointError, UnsupportedModelError
from shardlift.worker import remote_code
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.spec import StageSpec
from tests.support import checkpoints, ring
from tests.support.quantization import nf4
from tests.test_families import CHUNKS, check_decoding, check_forward, check_generate, prompt

CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
    loudness: float = 1.0
"""
MODEL = """
import torch
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_own import OwnConfig
from .loud import louder


class OwnModel(LlamaModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp.act_fn = torch.nn.GELU()
            layer.register_forward_hook(lambda module, args, output: louder(output, config.loudness))


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""
LOUD = "def louder(hidden, by):\n    return hidden * by\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A llama with another activation, and hidden states made louder by each layer, by code beside its weights."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = checkpoints.tiny("llama", tmp_path / "own", layers=4, dtype="bfloat16")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "loudness": 1.25,
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    path.write_text(json.dumps(config))
    for name, text in (("configuration_own", CONFIG), ("modeling_own", MODEL), ("loud", LOUD)):
        (folder / f"{name}.py").write_text(text)
    yield folder
    for name in [
        name for name in sys.modules if name.startswith(("transformers_modules", "shardlift_checkpoint_code"))
    ]:
        del sys.modules[name]
    remote_code._imported.clear()


def whole(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16, **arguments)


def plan(folder: Path, *, trust: bool = True) -> PlannedModel:
    request = CheckpointRequest(path=str(folder), trust_remote_code=trust)
    return plan_model(request, None, ModelOptions(), PlanOptions(num_stages=2), parse_devices("2x1GiB"))


async def test_stages_equal_one_process(folder: Path) -> None:
    options: dict[str, Any] = {"quantization": nf4().to_dict(), "dtype": "bfloat16", "trust_remote_code": True}
    reference = whole(folder, quantization_config=nf4())
    stages = ring.load(folder, (1, 3), **options)
    assert type(stages[0].model).__name__ == "OwnForCausalLM"
    async with ring.serve(stages) as pipeline:
        for padded in (False, True):
            ids, mask = prompt(padded=padded)
            await check_forward(pipeline, reference, ids, mask)
            await check_decoding(pipeline, reference, ids, mask, CHUNKS, 4)
            await check_generate(pipeline, reference, ids, mask)
        await pipeline.idle()


def test_without_trust_nothing_runs_and_the_way_is_told(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UnsupportedModelError, match=r"'own_llama' is defined by the checkpoint's own.*--allow-remote"):
        plan(folder, trust=False)
    assert not [name for name in sys.modules if name.startswith("shardlift_checkpoint_code")]


def test_a_known_family_with_code_beside_it_needs_no_trust(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    assert plan(folder, trust=False).specs("model", "load", "secret")[0].code is None
    assert plan(folder).specs("model", "load", "secret")[0].code is not None


def test_a_worker_runs_what_was_planned_with_or_nothing(folder: Path) -> None:
    spec = plan(folder).specs("model", "load", "secret")[0]
    assert spec.code is not None
    assert set(spec.code.files) == {"configuration_own.py", "modeling_own.py", "loud.py"}
    assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    remote_code._imported.clear()  # as in a process of its own
    (folder / "loud.py").write_text(f"{LOUD}\nraise SystemExit('it ran')")
    with pytest.raises(CorruptCheckpointError, match=r"loud\.py is not the code that the model was planned with"):
        load_stage(spec, None, LoadProgress())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"AutoModelForCausalLM": "org/other--modeling.Model"}, UnsupportedModelError, "another repository"),
        ({"AutoModelForCausalLM": "../modeling.Model"}, CorruptCheckpointError, "no 'module.Class'"),
        ({"AutoModelForCausalLM": "modeling_own.Absent"}, UnsupportedModelError, "AttributeError"),
        ({"AutoModelForCausalLM": "configuration_own.OwnConfig"}, UnsupportedModelError, "no PreTrainedModel"),
    ],
)
def test_code_that_can_not_be_used(folder: Path, change: dict[str, str], error: type[Exception], text: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=text) as raised:
        plan(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(folder: Path) -> None:
    (folder / "loud.py").write_text("import no_such_package\n")
    with pytest.raises(UnsupportedModelError, match="ModuleNotFoundError: No module named 'no_such_package'"):
        plan(folder)
    assert not [name for name in sys.modules if name.startswith("shardlift_checkpoint_code")]


def test_code_whose_slices_differ_is_refused(folder: Path) -> None:
    """What multiplies the stream before the layers would do so again on every stage."""
    changed = MODEL.replace(
        "class OwnForCausalLM",
        "    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):\n"
        "        if inputs_embeds is None:\n"
        "            inputs_embeds = self.embed_tokens(input_ids)\n"
        "        return super().forward(inputs_embeds=inputs_embeds * 3, **kwargs)\n\n\nclass OwnForCausalLM",
    )
    (folder / "modeling_own.py").write_text(changed)
    with pytest.raises(UnsupportedModelError, match=r"'own_llama'.*logits differ by up to"):
        plan(folder)


def test_a_tokenizer_of_its_own(folder: Path, smollm2_folder: Path) -> None:
    from shardlift.cluster.tokenizer import Tokenizer
    from shardlift.proto.v1.errors import InvalidRequestError
    from shardlift.worker.records import SourceSpec

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((smollm2_folder / name).read_bytes())
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    path.write_text(json.dumps(config))
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    def _encode_plus(self, text, *args, **kwargs):\n"
        "        return super()._encode_plus(text.upper(), *args, **kwargs)\n"
    )
    spec = SourceSpec(kind="folder", location=str(folder))
    loud = Tokenizer(SourceSpec(kind="folder", location=str(smollm2_folder)), None).encode("HELLO")
    assert Tokenizer(spec, None, trust_remote_code=True).encode("hello") == loud
    with pytest.raises(InvalidRequestError, match="trust_remote_code"):
        Tokenizer(spec, None)
    assert os.environ["HF_MODULES_CACHE"]
