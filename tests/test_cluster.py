"""The whole way through: a real model from a Hub onto three Ray nodes, used by its handle, equal to one process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TextStreamer

import shardlift
from shardlift.client.handle import RemoteModel
from tests.support import checkpoints
from tests.support.cluster import ADDRESSES, RunningCluster, eventually
from tests.support.hub import HubServer
from tests.support.quantization import nf4

DECODED = 32


@pytest.fixture(scope="module")
def whole(smollm2_folder: Path) -> Any:
    """What transformers makes of the checkpoint in one process."""
    return AutoModelForCausalLM.from_pretrained(smollm2_folder, quantization_config=nf4())


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_folder, padding_side="left")


@pytest.fixture(scope="module")
def model(cluster: RunningCluster, hub: HubServer) -> Iterator[RemoteModel]:
    """The model on the cluster: three stages, loaded by its name on the Hub."""
    hub.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        handle = shardlift.AutoModelForCausalLM.from_pretrained(
            "org/smollm2", quantization_config=nf4(), name="smol", address=cluster.gateway, part_cache=False
        )
    yield handle
    handle.unload()
    cluster.assert_nothing_left()


def run_cli(cluster: RunningCluster, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardlift.client.cli.main", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"SHARDLIFT_ADDRESS": cluster.gateway},
    )


# -- loading ----------------------------------------------------------------------------------------------------------


def test_each_worker_fetched_its_own_bytes_and_kept_no_file(
    model: RemoteModel, hub: HubServer, cluster: RunningCluster, smollm2_folder: Path
) -> None:
    plan = model.plan
    needed = sum(stage.fetch_bytes for stage in plan.stages)
    headers = 0
    for file in smollm2_folder.glob("*.safetensors"):
        # The driver reads the first 64 KiB of each file for its header.
        headers += min(64 << 10, file.stat().st_size)
    assert needed + headers <= hub.bytes_sent() + 1
    assert hub.bytes_sent() <= 1.01 * needed + headers
    fetched = [stage.fetched_bytes for stage in model.residency()]
    for stage, size in zip(plan.stages, fetched, strict=True):
        assert stage.fetch_bytes <= size <= 1.01 * stage.fetch_bytes
    tied = 2 * 49152 * 576
    files = sum(file.stat().st_size for file in smollm2_folder.glob("*.safetensors"))
    # The checkpoint once, and the tied embedding once more.
    assert files + tied - needed < 1 << 20
    assert all(request.status == 206 for request in hub.requests if request.origin == "cdn")
    kept = [*cluster.hf_home.rglob("*"), *cluster.session_dir.rglob("*.safetensors")]
    assert [path for path in kept if path.is_file()] == []


def test_predicted_bytes_are_the_measured_ones(model: RemoteModel) -> None:
    for stage, residency in zip(model.plan.stages, model.residency(), strict=True):
        assert residency.measured_bytes == pytest.approx(stage.resident_bytes, rel=0.01)


def test_footprint_is_that_of_one_process_and_what_the_tied_embedding_costs_again(
    model: RemoteModel, whole: Any
) -> None:
    tied = whole.lm_head.weight.numel() * whole.lm_head.weight.element_size()
    parameters = whole.get_memory_footprint(return_buffers=False)
    assert model.get_memory_footprint(return_buffers=False) == parameters + tied
    # Each stage has the rotary frequencies.
    assert model.get_memory_footprint() - parameters - tied == 3 * (whole.get_memory_footprint() - parameters)


def test_stages_stand_on_different_nodes_and_the_map_names_every_module(model: RemoteModel, whole: Any) -> None:
    assert [stage.node for stage in model.plan.stages] == ADDRESSES
    layers = [(stage.first_layer, stage.last_layer) for stage in model.plan.stages]
    assert layers[0][0] == 0
    assert layers[-1][1] == 29
    assert all(left[1] + 1 == right[0] for left, right in itertools.pairwise(layers))
    device_map = model.hf_device_map
    assert device_map["model.embed_tokens"] == f"{ADDRESSES[0]}/cpu"
    assert device_map["lm_head"] == f"{ADDRESSES[-1]}/cpu"
    named = [name for name, _ in whole.named_modules() if name.startswith("model.layers.") and name.count(".") == 2]
    assert set(named) <= set(device_map)


def test_linear_layers_are_resident_in_four_bits(model: RemoteModel) -> None:
    modules = {name: module for stage in model.residency() for name, module in stage.modules.items()}
    assert modules["model.layers.7.mlp.down_proj"].dtype == "nf4"
    assert modules["model.layers.7.input_layernorm"].dtype == "bfloat16"
    assert modules["model.embed_tokens"].dtype == "bfloat16"
    assert {module.device for module in modules.values()} == {"cpu"}


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "left-padded batch"])
def test_prefill_and_cached_decoding_equal_one_process(
    model: RemoteModel, whole: Any, tokenizer: Any, padded: bool
) -> None:
    texts = ["The capital of France is"] + (["In a distant galaxy, there was once a very small robot that"] * padded)
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert (mask == 0).any() == padded
    position = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    ours, theirs = None, None
    for _ in range(1 + DECODED):
        new = ids[:, -position.shape[1] :]
        with torch.inference_mode():
            expected = whole(new, attention_mask=mask, position_ids=position, past_key_values=theirs, use_cache=True)
        got = model(new, attention_mask=mask, position_ids=position, past_key_values=ours, use_cache=True)
        assert (got.logits - expected.logits).abs().max() == 0.0
        assert got.logits.dtype == expected.logits.dtype
        ours, theirs = got.past_key_values, expected.past_key_values
        ids = torch.cat([ids, expected.logits[:, -1:].argmax(-1)], dim=-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        position = position[:, -1:] + 1
    ours.close()


def test_forward_without_a_cache_equals_one_process(model: RemoteModel, whole: Any, tokenizer: Any) -> None:
    encoded = tokenizer("Two plus two is", return_tensors="pt")
    with torch.inference_mode():
        expected = whole(**encoded).logits
    assert torch.equal(model(**encoded).logits, expected)
    assert torch.equal(model(encoded["input_ids"], logits_to_keep=2).logits, expected[:, -2:])


def test_greedy_generation_equals_one_process(model: RemoteModel, whole: Any, tokenizer: Any) -> None:
    encoded = tokenizer(
        ["Once upon a time", "The three largest cities of Japan are"], return_tensors="pt", padding=True
    )
    expected = whole.generate(**encoded, max_new_tokens=DECODED, do_sample=False)
    assert torch.equal(model.generate(**encoded, max_new_tokens=DECODED, do_sample=False), expected)


def test_sampled_generation_equals_one_process_with_the_same_seed(
    model: RemoteModel, whole: Any, tokenizer: Any
) -> None:
    encoded = tokenizer("My favourite colour", return_tensors="pt")
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_new_tokens": 12}
    torch.manual_seed(5)
    expected = whole.generate(**encoded, **options)
    assert torch.equal(model.generate(**encoded, **options, seed=5), expected)


def test_streamer_and_text_say_what_one_process_says(
    model: RemoteModel, whole: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = whole.generate(**encoded, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(expected[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    model.generate(
        **encoded,
        max_new_tokens=24,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    assert capsys.readouterr().out.strip() == text.strip()
    pieces = list(model.stream_text(messages, max_new_tokens=24, do_sample=False))
    assert len(pieces) > 3
    assert "".join(pieces) == text


# -- the command line -------------------------------------------------------------------------------------------------


def test_commands_see_the_model(model: RemoteModel, cluster: RunningCluster) -> None:
    listed = run_cli(cluster, "list", "--json")
    assert [entry["name"] for entry in json.loads(listed.stdout)] == ["smol"]
    shown = json.loads(run_cli(cluster, "show", "smol", "--json").stdout)
    assert shown["quantization"] == "nf4+double"
    for stage in shown["stages"]:
        assert stage["measured_bytes"] == pytest.approx(stage["resident_bytes"], rel=0.01)
    answer = run_cli(cluster, "generate", "smol", "--prompt", "The capital of France is", "--max-new-tokens", "6")
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout
    chat = run_cli(cluster, "chat", "smol", "--max-new-tokens", "16", stdin="What is the capital of France?\n/exit\n")
    assert chat.returncode == 0, chat.stderr
    assert "Paris" in chat.stdout


def test_a_second_model_loads_and_runs_beside_the_first(
    model: RemoteModel, whole: Any, cluster: RunningCluster, tmp_path: Path
) -> None:
    folder = checkpoints.tiny("mixtral", tmp_path / "mixtral", dtype="bfloat16")
    local = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 17)[None]
    with shardlift.connect(cluster.gateway) as client:
        second = client.load(str(folder), name="mixtral", num_stages=2)
        try:
            with torch.inference_mode():
                assert torch.equal(second(ids).logits, local(ids).logits)
                assert torch.equal(model(ids).logits, whole(ids).logits)
            assert {info.name for info in client.infos()} == {"smol", "mixtral"}
        finally:
            second.unload()
    eventually(lambda: len(cluster.stage_workers()) == 3, "the second model's workers are left")


def test_eight_bits_equal_one_process(cluster: RunningCluster, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", dtype="bfloat16")
    config = BitsAndBytesConfig(load_in_8bit=True)
    local = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    ids = torch.arange(5, 17)[None]
    remote = shardlift.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, name="int8", num_stages=2, address=cluster.gateway
    )
    try:
        with torch.inference_mode():
            assert torch.equal(remote(ids).logits, local(ids).logits)
        for stage, residency in zip(remote.plan.stages, remote.residency(), strict=True):
            assert residency.measured_bytes == pytest.approx(stage.resident_bytes, rel=0.01)
    finally:
        remote.unload()


def test_unloading_ends_the_workers_and_their_ports(cluster: RunningCluster, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama")
    with shardlift.connect(cluster.gateway) as client:
        client.load(str(folder), name="brief", num_stages=2)
        workers = [name for name in cluster.stage_workers() if "brief" in name]
        processes = [psutil.Process(cluster.pid(name)) for name in workers]
        ports = {connection.laddr for process in processes for connection in process.net_connections("tcp")}
        client.unload("brief")
    assert len(processes) == 2
    assert ports
    eventually(lambda: not any(map(psutil.Process.is_running, processes)), "workers are left")


# -- out again --------------------------------------------------------------------------------------------------------


def test_saved_by_the_workers_it_loads_in_one_process_to_the_same_logits(
    model: RemoteModel, cluster: RunningCluster, tokenizer: Any, tmp_path: Path
) -> None:
    done = run_cli(cluster, "save", "smol", str(tmp_path / "saved"), "--shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"saved smol in {tmp_path / 'saved'}\n"
    assert "saved " in done.stderr
    assert len(list((tmp_path / "saved").glob("model-0000?-of-00003.safetensors"))) == 3
    assert not list(tmp_path.rglob(".shardlift*"))
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert (saved(ids).logits - model(ids).logits).abs().max() == 0.0
    messages = [{"role": "user", "content": "Name three rivers."}]
    own = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert own.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    # A name that means another folder in each process: what the workers don't see is streamed.
    (tmp_path / "streamed").mkdir()
    descriptor = os.open(tmp_path / "streamed", os.O_RDONLY)
    try:
        model.save_pretrained(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    files = {path.name: path.stat().st_size for path in (tmp_path / "saved").iterdir()}
    assert {path.name: path.stat().st_size for path in (tmp_path / "streamed").iterdir()} == files
    for name in files:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


def test_what_can_not_be_saved_is_one_line(model: RemoteModel, cluster: RunningCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli(cluster, "save", "smol", str(tmp_path / "there" / "x"), "--max-shard-size", "much")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "'much' is not a size" in done.stderr
    assert not (tmp_path / "there").exists()
    assert run_cli(cluster, "save", "other", str(tmp_path / "there")).returncode == 1
    assert run_cli(cluster, "save", "smol", str(tmp_path), "--private").returncode == 2
