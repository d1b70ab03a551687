"""`push_to_hub`, by huggingface_hub's own client to a Hub on loopback, and what can be loaded from there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shardlift.proto.v1.errors import AuthenticationError, SaveError
from tests.support import checkpoints
from tests.support.hub_writable import WritableHub
from tests.support.ring_gateway import Served, serving

# huggingface_hub's own way to call httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

IDS = torch.arange(1, 13)[None]
TOKEN = "hf_thewriterstoken"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("served") / "source", dtype="bfloat16")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    with serving(folder, [2], quantization=quantization) as running:
        yield running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with WritableHub(TOKEN) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        # What it uploads by where Xet's own servers are not there.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server


def logits(hub: WritableHub, repo_id: str, folder: Path, revision: str = "main") -> torch.Tensor:
    folder.mkdir()
    for name, location in hub.files(repo_id, revision).items():
        shutil.copy(location, folder / name)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_what_was_pushed_loads_to_the_same_logits(
    served: Served, hub: WritableHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    commit = served.model.push_to_hub("org/ours", token=TOKEN, private=True, commit_message="Ours")
    assert commit.commit_url.startswith(f"{hub.endpoint}/org/ours/commit/")
    assert hub.commits == [("org/ours", "main", "Ours")]
    assert hub.private == {"org/ours"}
    expected = served.model(IDS).logits
    assert torch.equal(logits(hub, "org/ours", tmp_path / "first"), expected)
    assert TOKEN not in caplog.text
    assert not any(request.had_authorization for request in hub.requests if request.origin == "cdn")
    # Another commit, of other files: the older ones don't stay beside them.
    served.model.push_to_hub("org/ours", token=TOKEN, max_shard_size="30KB")
    files = hub.files("org/ours")
    count = len([file for file in files if file.endswith(".safetensors")])
    assert count > 2
    assert f"model-00001-of-{count:05d}.safetensors" in files
    assert torch.equal(logits(hub, "org/ours", tmp_path / "second"), expected)


def test_a_folder_is_saved_and_pushed_to_a_branch(served: Served, hub: WritableHub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    served.model.save_pretrained(
        tmp_path / "out", push_to_hub=True, repo_id="org/branched", token=TOKEN, revision="quantized"
    )
    assert hub.commits == [("org/branched", "quantized", "Upload model")]
    assert torch.equal(logits(hub, "org/branched", tmp_path / "cache", "quantized"), served.model(IDS).logits)
    assert "notes.txt" not in hub.files("org/branched", "quantized")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_token_that_may_not_write(served: Served, hub: WritableHub) -> None:
    with pytest.raises(AuthenticationError, match="refuses to let this token write to org/no") as raised:
        served.model.push_to_hub("org/no", token="hf_another")
    assert "hf_another" not in str(raised.value)
    with pytest.raises(SaveError, match="a/b/c/d"):
        served.model.push_to_hub("a/b/c/d", token=TOKEN)
    assert hub.commits == []
