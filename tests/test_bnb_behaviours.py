"""What transformers' own tests assert of models that bitsandbytes has quantized, asserted of the handle.

After tests/quantization/bnb/test_4bit.py and test_mixed_int8.py of transformers: footprint, number and dtypes of
parameters, which modules stay as they are, the config, what a quantized model can't be turned into, generation, and a
serialization round trip. Each over two stages, beside the same model in one process. What they assert of adapters, that
their modules are there and have gradients, is in tests/test_adapters.py and tests/test_adapters_cluster.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from shardlift.client import options
from shardlift.client.handle import RemoteModel
from shardlift.proto.v1.errors import InvalidDeviceMapError, InvalidRequestError, UnsupportedModelError
from tests.support import checkpoints, ring
from tests.support.ring_gateway import Served, serving

IDS = torch.arange(1, 13)[None]
GENERATE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "8bit": {"load_in_8bit": True},
}
# Stages of the tiny checkpoint: the second one holds the tied embedding, too.
ENDS = [2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny("llama", tmp_path_factory.mktemp("behaviours") / "tied", tied=True, dtype="bfloat16")


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Any, Served]]:
    """The model in one process, and the handle of the same one over two stages."""
    config = BitsAndBytesConfig(**CONFIGS[request.param])
    local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with serving(folder, ENDS, quantization=config.to_dict()) as served:
        yield local, served


def logits_of(model: Any) -> torch.Tensor:
    """Without gradients, for with them bitsandbytes takes another kernel on a CPU."""
    with torch.no_grad():
        return model(IDS).logits


def modules_of(model: RemoteModel) -> dict[str, str]:
    """Name → dtype of every module that holds something."""
    return {name: module.dtype for stage in model.residency() for name, module in stage.modules.items()}


# -- size --------------------------------------------------------------------------------------------------------------


def test_footprint_is_that_of_one_process_and_what_copies_cost(pair: tuple[Any, Served]) -> None:
    local, served = pair
    tied = local.lm_head.weight.numel() * local.lm_head.weight.element_size()
    buffers = local.get_memory_footprint() - local.get_memory_footprint(return_buffers=False)
    model = served.model
    assert model.get_memory_footprint(return_buffers=False) == local.get_memory_footprint(return_buffers=False) + tied
    # Each stage has the rotary frequencies.
    assert model.get_memory_footprint() == local.get_memory_footprint() + tied + buffers
    # In all it is more: the statistics of quantized weights, which that doesn't count.
    assert sum(stage.measured_bytes for stage in model.residency()) > model.get_memory_footprint()


def test_footprint_of_one_stage_and_of_16_bits(folder: Path, pair: tuple[Any, Served]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder, []) as served:
        assert served.model.get_memory_footprint() == whole.get_memory_footprint()
        # As transformers' tests: the ratio of the footprints, but for the embedding, is that of the dtypes.
        shrunk = served.model.get_memory_footprint() / pair[0].get_memory_footprint()
        assert shrunk == whole.get_memory_footprint() / pair[0].get_memory_footprint()


def test_number_of_parameters_is_that_before_quantization(folder: Path, pair: tuple[Any, Served]) -> None:
    local, served = pair
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert served.model.num_parameters() == whole.num_parameters() == local.num_parameters()
    without = served.model.num_parameters(exclude_embeddings=True)
    assert without == whole.num_parameters(exclude_embeddings=True)
    assert served.model.num_parameters(only_trainable=True) == 0


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_dtype_of_each_kind_of_module(pair: tuple[Any, Served]) -> None:
    local, served = pair
    found = modules_of(served.model)
    dtypes = {bnb.nn.Linear4bit: ("nf4", torch.uint8), bnb.nn.Linear8bitLt: ("int8", torch.int8)}
    kinds = set()
    for name, module in local.named_modules():
        if type(module) in dtypes:
            ours, theirs = dtypes[type(module)]
            assert module.weight.dtype is theirs
            assert found[name] == ours, name
        elif isinstance(module, (torch.nn.Embedding, torch.nn.Linear)) or name.endswith("norm"):
            assert module.weight.dtype is torch.bfloat16
            assert found.get(name, "bfloat16") == "bfloat16", name  # a tied head is counted as the embedding
        kinds.add(type(module))
    assert kinds & dtypes.keys()
    assert served.model.dtype is local.dtype is torch.bfloat16


def test_dtype_that_is_asked_for_is_that_of_what_stays(folder: Path) -> None:
    config = BitsAndBytesConfig(**CONFIGS["4bit"])
    for dtype in ("float32", "float16"):
        local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
        with serving(folder, ENDS, quantization=config.to_dict(), dtype=dtype) as served:
            found = modules_of(served.model)
            assert found["model.norm"] == found["model.embed_tokens"] == dtype
            assert found["model.layers.0.mlp.up_proj"] == "nf4"
            assert served.model.dtype is local.dtype is getattr(torch, dtype)
            assert served.model.config.dtype is local.config.dtype
            assert torch.equal(served.model(IDS).logits, logits_of(local))


def test_modules_that_a_family_keeps_in_float32(tmp_path: Path) -> None:
    """Of 16 bits, routers' corrections are float32: as `_keep_in_fp32_modules` of transformers says."""
    checkpoint = checkpoints.tiny("deepseek_v3", tmp_path, dtype="bfloat16")
    config = BitsAndBytesConfig(**CONFIGS["4bit"])
    local = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)
    kept = {
        name.rpartition(".")[0]
        for name, tensor in [*local.named_parameters(), *local.named_buffers()]
        if tensor.dtype is torch.float32 and "e_score_correction_bias" in name
    }
    assert kept
    with serving(checkpoint, ENDS, quantization=config.to_dict(), dtype="bfloat16") as served:
        assert torch.equal(served.model(IDS).logits, logits_of(local))
        served.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name in kept:
        assert again.get_submodule(name).e_score_correction_bias.dtype is torch.float32


def test_modules_that_are_to_be_skipped(folder: Path) -> None:
    for fields in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        config = BitsAndBytesConfig(**fields, llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.1"])
        local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        quantized = {
            name
            for name, module in local.named_modules()
            if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        }
        assert quantized
        with serving(folder, ENDS, quantization=config.to_dict()) as served:
            found = modules_of(served.model)
            assert {name for name, dtype in found.items() if dtype in ("fp4", "int8")} == quantized
            assert torch.equal(served.model(IDS).logits, logits_of(local))


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_a_tied_head_is_to_be_skipped(kind: str, tmp_path: Path) -> None:
    """A list replaces the default one, which has the head; transformers loads that, and fails at the first pass."""
    folder = checkpoints.tiny("llama", tmp_path, layers=1, tied=True)
    config = BitsAndBytesConfig(**{kind: True}, llm_int8_skip_modules=["o_proj"])
    with pytest.raises((AssertionError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)(IDS)
    with pytest.raises(InvalidRequestError, match="llm_int8_skip_modules has to name 'lm_head', too"):
        ring.specs(folder, (), quantization=config.to_dict())
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config.to_dict()}))
    with pytest.raises(UnsupportedModelError, match="quantization_config of the checkpoint, llm_int8_skip_modules has"):
        ring.specs(folder, ())


def test_outliers_apart(folder: Path) -> None:
    answers = []
    for threshold in (0.5, 6.0):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        with serving(folder, ENDS, quantization=config.to_dict()) as served:
            answers.append(served.model(IDS).logits)
            assert torch.equal(answers[-1], logits_of(local))
    assert not torch.equal(*answers)


# -- the config --------------------------------------------------------------------------------------------------------


def test_config_has_the_quantization_and_can_be_written(pair: tuple[Any, Served]) -> None:
    local, served = pair
    config = served.model.config
    assert isinstance(config.quantization_config, BitsAndBytesConfig)
    assert config.quantization_config.to_dict() == local.config.quantization_config.to_dict()
    assert config.to_dict()["quantization_config"] == local.config.to_dict()["quantization_config"]
    assert "quantization_config" in config.to_diff_dict()
    written = json.loads(config.to_json_string())
    assert AutoConfig.for_model(**written).quantization_config == written["quantization_config"]
    assert served.model.is_quantized
    assert served.model.is_loaded_in_4bit is bool(getattr(local, "is_loaded_in_4bit", False))
    assert served.model.is_loaded_in_8bit is bool(getattr(local, "is_loaded_in_8bit", False))


def test_config_of_16_bits_has_none(folder: Path) -> None:
    with serving(folder, []) as served:
        assert not hasattr(served.model.config, "quantization_config")
        assert not served.model.is_quantized
        assert not served.model.is_loaded_in_4bit
        assert not served.model.is_loaded_in_8bit


@pytest.mark.parametrize(
    "arguments",
    [
        {"quantization_config": BitsAndBytesConfig(**CONFIGS["4bit"])},
        {"quantization_config": BitsAndBytesConfig(**CONFIGS["4bit"]).to_dict()},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    ],
    ids=["an object", "a dict", "as arguments, as it was before"],
)
def test_ways_to_ask_for_it_come_to_the_same(arguments: dict[str, Any], folder: Path) -> None:
    asked = json.loads(options.load_options(**arguments).quantization_config_json)
    expected = BitsAndBytesConfig(**CONFIGS["4bit"])
    assert BitsAndBytesConfig.from_dict(asked).to_dict() == expected.to_dict()
    local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=expected)
    with serving(folder, ENDS, quantization=asked) as served:
        assert torch.equal(served.model.generate(IDS, **GENERATE), local.generate(IDS, **GENERATE))


def test_a_config_and_its_arguments_at_once_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"quantization_config": BitsAndBytesConfig(), "load_in_8bit": True},
        {"quantization_config": BitsAndBytesConfig(), "load_in_4bit": True},
        {"quantization_config": BitsAndBytesConfig(), "llm_int8_threshold": 5.0},
        {"load_in_4bit": True, "load_in_8bit": True},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"say the same thing|not both"):
            options.load_options(**arguments)
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="add")
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both True"):
        BitsAndBytesConfig(load_in_4bit=True).load_in_8bit = True


def test_layers_can_not_be_offloaded(folder: Path) -> None:
    """transformers would put them into memory or on a disk of one process; here a device map names devices."""
    from shardlift.cluster.checkpoint import CheckpointRequest
    from shardlift.cluster.devices import parse_devices
    from shardlift.cluster.plan import PlanOptions
    from shardlift.cluster.planning import ModelOptions, plan_model

    for target in ("disk", "nowhere"):
        spread = PlanOptions(by_module={"": "0", "model.layers.1": target})
        with pytest.raises(InvalidDeviceMapError, match=target):
            plan_model(CheckpointRequest(path=str(folder)), None, ModelOptions(), spread, parse_devices("2x1GiB"))


# -- what it can't be turned into --------------------------------------------------------------------------------------


def test_a_quantized_model_is_neither_cast_nor_moved(pair: tuple[Any, Served]) -> None:
    local, served = pair
    model = served.model
    casts: list[Callable[[Any], Any]] = [
        lambda model: model.to(torch.float16),
        lambda model: model.to("cpu", dtype=torch.float16),
        lambda model: model.half(),
        lambda model: model.float(),
    ]
    for cast in casts:
        for each in (local, model):
            with pytest.raises(ValueError, match="dtype"):
                cast(each)
    with pytest.raises(InvalidRequestError, match=r"can't be moved to cuda.*device_map"):
        model.to("cuda")
    with pytest.raises(InvalidRequestError, match=r"can't be moved to cuda:1"):
        model.cuda(1)
    with pytest.raises(InvalidRequestError, match="without a quantization_config"):
        model.dequantize()
    before = model.get_memory_footprint()
    assert model.to("cpu") is model.cpu() is model.to(torch.device("cpu")) is model.eval() is model
    assert model.device == torch.device("cpu")
    assert model.get_memory_footprint() == before
    assert not model.training
    assert model.can_generate()
    # Nothing was broken.
    assert torch.equal(model.generate(IDS, **GENERATE), local.generate(IDS, **GENERATE))


def test_a_model_of_16_bits_stays_as_it_was_loaded(folder: Path) -> None:
    with serving(folder, []) as served:
        with pytest.raises(ValueError, match="a resident model keeps the dtype it was loaded with"):
            served.model.half()
        with pytest.raises(ValueError, match="You need to first quantize your model"):
            served.model.dequantize()


# -- what it answers ---------------------------------------------------------------------------------------------------


def test_generation_and_logits_are_equal(pair: tuple[Any, Served]) -> None:
    local, served = pair
    assert torch.equal(served.model.generate(IDS, **GENERATE), local.generate(IDS, **GENERATE))
    assert (served.model(IDS).logits - logits_of(local)).abs().max() == 0.0


def test_compute_dtype_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU's kernel for packed weights computes in bf16 whatever is asked for.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        with serving(folder, ENDS, quantization=config.to_dict(), dtype="float32") as served:
            answers.append(served.model(IDS).logits)
            assert torch.equal(answers[-1], logits_of(local))
    assert not torch.equal(*answers)


# -- there and back ----------------------------------------------------------------------------------------------------


def test_serialization_round_trip(pair: tuple[Any, Served], tmp_path: Path) -> None:
    """Saved after use, and loaded by transformers: the same class, parameters, statistics, footprint, answers."""
    local, served = pair
    served.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(
        served.model.info().path, quantization_config=local.config.quantization_config
    )
    assert again.get_memory_footprint() == fresh.get_memory_footprint()
    assert again.num_parameters() == fresh.num_parameters()
    ours, theirs = dict(again.named_parameters()), dict(fresh.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert type(ours[name]) is type(parameter), name
        assert ours[name].dtype == parameter.dtype
        assert torch.equal(ours[name], parameter), name
        if isinstance(parameter, bnb.nn.Params4bit):
            pairs = zip(ours[name].quant_state.as_dict().items(), parameter.quant_state.as_dict().items(), strict=True)
            for (key, found), (_, expected) in pairs:
                same = torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
                assert same, f"{name} {key}"
        if isinstance(parameter, bnb.nn.Int8Params):
            assert torch.equal(ours[name].SCB, parameter.SCB)
    assert (logits_of(again) - served.model(IDS).logits).abs().max() == 0.0
    assert torch.equal(again.generate(IDS, **GENERATE), served.model.generate(IDS, **GENERATE))
