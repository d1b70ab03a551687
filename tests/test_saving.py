"""`save_pretrained` on the handle, against transformers' own of the same model in one process."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import shardlift
from shardlift.client import saving
from shardlift.proto.v1 import saving_pb2
from shardlift.proto.v1.errors import (
    InvalidRequestError,
    ModelUnavailableError,
    SaveError,
)
from shardlift.worker.save_call import SaveCall
from tests.support import adapters, checkpoints
from tests.support.ring_gateway import NAME, Served, serving

IDS = torch.arange(1, 13)[None]
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE: dict[str, Any] = {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "nf4": NF4,
    "nf4+double": DOUBLE,
    "fp4": {"load_in_4bit": True},
    "fp4+double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "bf16 storage": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
    "int8, outliers apart": {"load_in_8bit": True, "llm_int8_threshold": 3.0},
}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
# family, further arguments of the tiny checkpoint, quantization, first layers of all stages but the first
CASES: list[tuple[str, dict[str, Any], str, list[int]]] = [
    ("llama", BF16, "none", [1, 3]),
    ("llama", BF16, "nf4+double", [1, 3]),
    ("llama", BF16, "bf16 storage", [2]),
    ("llama", BF16, "int8", [1, 3]),
    ("llama", {}, "nf4", [2]),  # in float32, packing on a CPU rounds statistics
    ("llama", {**BF16, "tied": True}, "fp4", [2]),
    ("qwen2", {}, "nf4+double", []),  # and biases
    ("gpt2", {}, "nf4", [1, 3]),  # Conv1D, turned to be quantized
    ("mixtral", {}, "none", [1, 3]),  # experts are merged, under other names
    ("qwen3_moe", BF16, "nf4+double", [2]),
]
MORE: list[tuple[str, dict[str, Any], str, list[int]]] = [
    ("llama", BF16, "fp4+double", [1, 3]),
    ("llama", BF16, "int8, outliers apart", [1, 3]),
    ("llama", {**BF16, "tied": True}, "nf4+double", []),
    ("llama", {"tied": True}, "none", [1, 3]),
    ("qwen2", BF16, "int8", [2]),
    ("gpt2", {}, "none", [2]),
    ("gpt2", {}, "int8", [2]),
    ("mixtral", {}, "nf4", []),
    ("nemotron_h", {}, "none", [2]),  # renamed, experts without a gate
    *(
        (family, BF16, quantization, [1, 3])
        for family in checkpoints.FAMILIES
        for quantization in ("none", "nf4")
        # What transformers writes of this one in 4 bits, it can't load either.
        if (family, quantization) != ("llama4_text", "nf4")
    ),
]


def config_of(quantization: str, family: str) -> BitsAndBytesConfig | None:
    fields = QUANTIZATIONS[quantization]
    if fields is None:
        return None
    unquantized = checkpoints.FAMILIES[family].unquantized
    return BitsAndBytesConfig(**fields, llm_int8_skip_modules=["lm_head", *unquantized] if unquantized else None)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, which no two files may have."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not found.keys() & tensors.keys()
        tensors |= found
    return tensors


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        # By bytes: packed ones may be no numbers.
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def logits_of(folder: Path, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **arguments)(IDS).logits


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".shardlift*")]


@pytest.mark.parametrize(
    ("family", "arguments", "quantization", "ends"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE)],
    ids=[" ".join(map(str, case)) for case in CASES + MORE],
)
def test_saved_after_use_it_is_what_transformers_saves_and_loads(
    tmp_path: Path, family: str, arguments: dict[str, Any], quantization: str, ends: list[int]
) -> None:
    folder = checkpoints.tiny(family, tmp_path / "source", **arguments)
    config = config_of(quantization, family)
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    whole.save_pretrained(tmp_path / "theirs")  # before its first pass, after which it would save other statistics
    with serving(folder, ends, quantization=config.to_dict() if config else None) as served:
        logits = served.model(IDS).logits
        served.model.generate(IDS, max_new_tokens=2)
        served.model.save_pretrained(tmp_path / "ours")
        assert torch.equal(served.model(IDS).logits, logits)
    assert_same_tensors(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ours", "theirs"))
        assert ours == theirs
    assert (logits_of(tmp_path / "ours") - logits).abs().max() == 0.0
    assert temporary_files(tmp_path) == []
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    if ends:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert files == [f"model-{i + 1:05d}-of-{len(ends) + 1:05d}.safetensors" for i in range(len(ends) + 1)]
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_parameters"] == whole.num_parameters()
    else:
        assert files == ["model.safetensors"]


# -- experts that are quantized one by one ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_quantized_experts_get_their_16_bits_back_or_keep_their_4(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: a CPU's kernel for packed weights multiplies with rounded statistics, where others dequantize first.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    folder = checkpoints.tiny(family, tmp_path / "source", dtype="bfloat16")
    config = BitsAndBytesConfig(**DOUBLE)
    source = tensors_in(folder)
    with serving(folder, [2], quantization=config.to_dict(), quantize_experts=True) as served:
        logits = served.model(IDS).logits
        served.model.save_pretrained(tmp_path / "16")
        served.model.save_pretrained(tmp_path / "4", dequantize_experts=False)
    experts = [name for name in source if ".experts." in name]
    assert len(experts) == 4 * 4 * 3
    in_16, in_4 = tensors_in(tmp_path / "16"), tensors_in(tmp_path / "4")
    assert set(experts) <= in_16.keys()
    assert set(experts) <= in_4.keys()
    for name in experts:
        weight, state = bnb.functional.quantize_4bit(
            source[name].contiguous(), quant_type="nf4", compress_statistics=True, blocksize=64
        )
        assert torch.equal(in_4[name], weight), name
        statistics = {key: in_4[f"{name}.{key}"] for key in state.as_dict(packed=True)}
        restored = bnb.nn.Params4bit.from_prequantized(in_4[name], statistics, device="cpu")
        expected = bnb.functional.dequantize_4bit(weight, state)
        assert torch.equal(bnb.functional.dequantize_4bit(restored.data, restored.quant_state), expected), name
        assert torch.equal(in_16[name], expected), name
    # What isn't an expert is the same in both.
    others = {name: tensor for name, tensor in in_4.items() if ".experts." not in name}
    assert_same_tensors({name: in_16[name] for name in others}, others)
    assert (logits_of(tmp_path / "16", experts_implementation="eager") - logits).abs().max() == 0.0


# -- how it is written ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three stages of a tiny llama in NF4 with double quantization, with a tokenizer, behind a gateway."""
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("served") / "source", dtype="bfloat16")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.json").write_text("{}")
    with serving(folder, [1, 3], quantization=BitsAndBytesConfig(**DOUBLE).to_dict()) as running:
        yield running


def test_streamed_files_are_those_that_workers_write(served: Served, tmp_path: Path) -> None:
    told: list[saving.SaveProgress] = []
    served.model.save_pretrained(tmp_path / "shared", shared=True)
    served.model.save_pretrained(tmp_path / "streamed", shared=False, on_progress=told.append)
    files = {path.name: path.read_bytes() for path in (tmp_path / "streamed").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    written = [progress.written_bytes for progress in told]
    assert written == sorted(written)
    assert written[-1] == told[-1].total_bytes == sum(len(files[name]) for name in files if name.endswith("tensors"))


def test_max_shard_size_and_variant(served: Served, tmp_path: Path) -> None:
    served.model.save_pretrained(tmp_path / "whole")
    served.model.save_pretrained(tmp_path / "parts", max_shard_size="20KB", variant="nf4")
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 6
    assert files == [f"model.nf4-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert (tmp_path / "parts" / "model.safetensors.index.nf4.json").exists()
    for name in files:
        tensors = load_file(tmp_path / "parts" / name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
    assert_same_tensors(tensors_in(tmp_path / "parts"), tensors_in(tmp_path / "whole"))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", variant="nf4")
        assert torch.equal(model(IDS).logits, served.model(IDS).logits)


def test_an_older_save_is_replaced_and_what_is_not_ours_stays(served: Served, tmp_path: Path) -> None:
    served.model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").write_bytes(b"an older one")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokenizer.json").write_text("my own")
    (tmp_path / "tokenizer_config.json").unlink()
    served.model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "notes.txt",
        "tokenizer.json",
    ]
    assert (tmp_path / "tokenizer.json").read_text() == "my own"
    assert torch.equal(logits_of(tmp_path), served.model(IDS).logits)


def test_a_changed_generation_config_is_saved(served: Served, tmp_path: Path) -> None:
    model = served.client.model(NAME)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_weights_of_another_name_are_saved_by_the_usual_one(tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "base", layers=1, max_shard_size="1GB")
    (folder / "model.safetensors").rename(folder / "special.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "special.safetensors"}))
    with serving(folder, ()) as only:
        only.model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits_of(tmp_path / "saved"), only.model(IDS).logits)


def test_arguments_as_transformers_has_them(served: Served, tmp_path: Path) -> None:
    parameters = inspect.signature(PreTrainedModel.save_pretrained).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default not in (each.empty, None)}
    served.model.save_pretrained(tmp_path / "none", **usual | {"is_main_process": False})
    assert not (tmp_path / "none").exists()
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: served.model.save_pretrained(tmp_path / "no", state_dict={}), "state_dict is not supported"),
        (lambda: served.model.save_pretrained(tmp_path / "no", safe_serialization=False), "only safetensors"),
        (lambda: served.model.save_pretrained(tmp_path / "no", max_shard_size="much"), "is not a size"),
        (lambda: served.model.save_pretrained(tmp_path / "no", max_shard_size=1.5), "max_shard_size is 1.5"),
        (lambda: served.model.save_pretrained(tmp_path / "no", variant="a/b"), "no part of a file's name"),
        (lambda: served.model.save_pretrained(served.model.info().path), "was loaded from"),
        (lambda: served.model.save_pretrained(tmp_path / "no", distributed_checkpoint=True), "it is always False"),
        (lambda: served.model.save_pretrained(tmp_path / "no", save_original_format=False), "it is always True"),
        (lambda: served.model.push_to_hub("org/no", tags=["a"]), "tags=.*metadata_update"),
    ]
    for call, text in refused:
        with pytest.raises(InvalidRequestError, match=text):
            call()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="is a file"):
        served.model.save_pretrained(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    with pytest.raises(TypeError, match="unexpected keyword"):
        served.model.save_pretrained(tmp_path / "no", maximum=1)
    assert not (tmp_path / "no").exists()


def request_of(folder: Path, probe: bytes, way: Any = saving_pb2.SAVE_WAY_UNSPECIFIED) -> saving_pb2.SaveModelRequest:
    return saving_pb2.SaveModelRequest(name=NAME, folder=str(folder), save_id="ab" * 16, probe=probe, way=way)


def test_workers_write_only_where_they_see_what_the_client_has_put(served: Served, tmp_path: Path) -> None:
    (tmp_path / f".shardlift-{'ab' * 16}").write_bytes(b"x" * 32)
    gateway = served.client._gateway
    for folder, probe in ((tmp_path, b"y" * 32), (tmp_path / "missing", b"x" * 32), (tmp_path, b"x" * 31)):
        call = gateway.registry_stream("SaveModel", request_of(folder, probe))
        assert not next(call).planned.stages_write
        call.cancel()
        with pytest.raises(SaveError, match=r"the workers on 127\.0\.0\.1 don't see .*shared=False"), gateway.errors():
            list(gateway.registry_stream("SaveModel", request_of(folder, probe, saving_pb2.SAVE_WAY_FOLDER)))
    for wrong in ({"folder": "relative"}, {"save_id": "../up"}, {"probe": b""}):
        request = request_of(tmp_path, b"x" * 32)
        for name, value in wrong.items():
            setattr(request, name, value)
        with pytest.raises(InvalidRequestError), gateway.errors():
            list(gateway.registry_stream("SaveModel", request))
    assert [path.name for path in tmp_path.iterdir()] == [f".shardlift-{'ab' * 16}"]


@pytest.mark.parametrize("shared", [True, False], ids=["by the workers", "streamed"])
def test_a_save_that_is_given_up_leaves_nothing(served: Served, tmp_path: Path, shared: bool) -> None:
    def stop(progress: saving.SaveProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        served.model.save_pretrained(tmp_path / "a" / "b", shared=shared, on_progress=stop)
    wait_until(lambda: not any(tmp_path.iterdir()))
    assert served.model.generate(IDS, max_new_tokens=2).shape == (1, 14)


def test_a_folder_that_can_not_take_it(served: Served, tmp_path: Path) -> None:
    # A folder in the place of a file, so that renaming fails where everything else went well.
    (tmp_path / "model-00002-of-00003.safetensors").mkdir()
    for shared in (True, False):
        with pytest.raises(SaveError, match="can't be written"):
            served.model.save_pretrained(tmp_path, shared=shared)
        wait_until(lambda: temporary_files(tmp_path) == [])


def test_an_unload_ends_a_save(tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "source")
    with serving(folder, [2]) as running:
        began, go_on = threading.Event(), threading.Event()
        failures: list[BaseException] = []

        def wait(progress: saving.SaveProgress) -> None:
            began.set()
            go_on.wait(30)

        def save() -> None:
            try:
                running.model.save_pretrained(tmp_path / "out", on_progress=wait)
            except BaseException as error:
                failures.append(error)

        # The workers' side is held between `written` and `commit`, where the client doesn't read on.
        thread = threading.Thread(target=save)
        thread.start()
        assert began.wait(30)
        for server in running.ring.servers:
            running.call(server.stop)
        go_on.set()
        thread.join(30)
        wait_until(lambda: not temporary_files(tmp_path))
        assert not failures or isinstance(failures[0], ModelUnavailableError)
        assert (tmp_path / "out").exists() is not bool(failures)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraConfig(r=4, target_modules="all-linear", bias="all"),
        lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora, biases", "own head", "tokens", "norms", "ia3"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_adapters_leave_no_trace_in_a_save(make: Callable[[], Any], tied: bool, tmp_path: Path) -> None:
    """They were written with it, and what they are put around had lost its name."""
    folder = checkpoints.tiny("qwen2", tmp_path / "source", tie_word_embeddings=tied)
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if not tied else None
    with serving(folder, [2], quantization=quantization) as running:
        running.model.save_pretrained(tmp_path / "before")
        path = adapters.make(folder, tmp_path / "adapter", make())
        spec = adapters.outlined(folder, path, "x").spec

        async def attach(name: str) -> None:
            for server in running.ring.servers:
                stage = server.pipeline.stage

                def put(stage: Any = stage) -> None:
                    adapters.attach([stage], replace(spec, name=name))
                    stage.adapters.use((name,))

                await server.pipeline.run("", put)

        running.call(lambda: attach("x"))
        running.model.save_pretrained(tmp_path / "after")
        assert_same_tensors(tensors_in(tmp_path / "after"), tensors_in(tmp_path / "before"))
        index = "model.safetensors.index.json"
        assert (tmp_path / "after" / index).read_text() == (tmp_path / "before" / index).read_text()


def test_an_unload_between_two_words_of_a_save(served: Served) -> None:
    """Found where the stages of one model end one after the other: the client had been told of its own mistake."""
    call = SaveCall(served.ring.servers[0].pipeline)

    async def begin_and_write() -> None:
        await call.begin(saving_pb2.SaveBegin(save_id="ab" * 16, max_shard_bytes=1 << 30))
        await call.close()
        with pytest.raises(ModelUnavailableError, match="is being unloaded"):
            await anext(call.write(saving_pb2.SaveWrite(names=["model.safetensors"])))

    served.call(begin_and_write)


def test_sessions_go_on_while_it_is_saved(served: Served, tmp_path: Path) -> None:
    expected = served.model.generate(IDS, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
    answers: list[torch.Tensor] = []
    over = threading.Event()

    def generate() -> None:
        while not over.is_set() or len(answers) < 2:
            answers.append(served.model.generate(IDS, max_new_tokens=24, eos_token_id=None, pad_token_id=0))

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        served.model.save_pretrained(tmp_path / "busy")
        served.model.save_pretrained(tmp_path / "busy too", shared=False)
    finally:
        over.set()
        thread.join()
    assert all(torch.equal(answer, expected) for answer in answers)
    served.model.save_pretrained(tmp_path / "idle")
    idle = tensors_in(tmp_path / "idle")
    assert_same_tensors(tensors_in(tmp_path / "busy"), idle)
    assert_same_tensors(tensors_in(tmp_path / "busy too"), idle)


def test_from_asyncio(served: Served, tmp_path: Path) -> None:
    async def save() -> None:
        async with await shardlift.connect_async(served.address) as client:
            model = await client.model(NAME)
            await model.save_pretrained(tmp_path / "ours")
            began = threading.Event()
            saving_it = asyncio.ensure_future(
                model.save_pretrained(tmp_path / "cancelled", on_progress=lambda _: began.set() or began.wait())
            )
            await asyncio.to_thread(began.wait)
            saving_it.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving_it

    asyncio.run(save())
    assert torch.equal(logits_of(tmp_path / "ours"), served.model(IDS).logits)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        threading.Event().wait(0.02)
    assert holds()
