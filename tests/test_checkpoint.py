"""Reading checkpoints from folders and from a Hub, sound and broken ones."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from shardlift.cluster.checkpoint import Checkpoint, CheckpointRequest, read_checkpoint
from shardlift.cluster.hub import ResolvedCommit, resolve_commit
from shardlift.proto.v1.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GatedCheckpointError,
    InvalidRequestError,
    ShardliftError,
    SourceError,
    UnsupportedModelError,
)
from shardlift.worker.anatomy import Cut
from shardlift.worker.records import DTYPES
from shardlift.worker.sources import open_source
from shardlift.worker.spec import StageSpec
from tests.support.hub import Fault, HubServer, Reset, Status

TOKEN = "hf_averysecrettoken"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}
TENSORS = {f"t{index}": torch.full((3, index + 1), float(index)) for index in range(4)}


def write(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], *, index: str = "") -> Path:
    """A checkpoint of `shards`: file name -> tensors, with an index of that name if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    if index:
        weight_map = {key: file for file, tensors in shards.items() for key in tensors}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def single(folder: Path) -> Path:
    return write(folder, {"model.safetensors": TENSORS})


def sharded(folder: Path) -> Path:
    halves = [dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])]
    return write(
        folder,
        {f"model-0000{number}-of-00002.safetensors": half for number, half in enumerate(halves, 1)},
        index="model.safetensors.index.json",
    )


def check(checkpoint: Checkpoint, folder: Path) -> None:
    """Each record against safetensors' own reader, and its bytes against the file's."""
    assert set(checkpoint.records) == set(TENSORS)
    for key, record in checkpoint.records.items():
        with safe_open(folder / record.file, framework="pt") as theirs:
            tensor = theirs.get_tensor(key)
        assert record.shape == tuple(tensor.shape)
        data = (folder / record.file).read_bytes()[record.start : record.end]
        dtype = getattr(torch, DTYPES[record.dtype][0])
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=dtype).reshape(record.shape), tensor)
    assert {record.file for record in checkpoint.records.values()} == set(checkpoint.versions)
    for file, version in checkpoint.versions.items():
        assert version.size_bytes == (folder / file).stat().st_size


# ---- what is there ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


Read = Callable[..., Checkpoint]


@pytest.fixture(params=["folder", "hub"])
def read(request: pytest.FixtureRequest, hub: HubServer) -> Read:
    """Reads a folder, as it is or from a Hub that serves it."""

    def from_folder(folder: Path, **fields: Any) -> Checkpoint:
        return read_checkpoint(CheckpointRequest(path=str(folder), **fields), None)

    def from_hub(folder: Path, **fields: Any) -> Checkpoint:
        hub.add_repo("org/model", folder)
        return read_checkpoint(CheckpointRequest(path="org/model", hub_endpoint=hub.endpoint, **fields), False)

    return from_hub if request.param == "hub" else from_folder


@pytest.mark.parametrize("make", [single, sharded])
def test_tensors(read: Read, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    # As in repositories of Mistral: the same weights once more, in another form.
    save_file(TENSORS, folder / "consolidated.safetensors")
    save_file(TENSORS, folder / "consolidated-00001-of-00001.safetensors")
    checkpoint = read(folder)
    check(checkpoint, folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config is None


def test_a_generation_config_and_a_header_longer_than_the_first_guess(read: Read, tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"note": "x" * 100_000})
    checkpoint = read(tmp_path)
    check(checkpoint, tmp_path)
    assert checkpoint.generation_config == {"top_p": 0.5}


def test_a_subfolder(read: Read, tmp_path: Path) -> None:
    sharded(tmp_path / "inner")
    checkpoint = read(tmp_path, subfolder="inner")
    check(checkpoint, tmp_path / "inner")
    assert checkpoint.source.subfolder == "inner"
    with pytest.raises(CheckpointNotFoundError, match="config"):
        read(tmp_path, subfolder="outer")


def test_a_variant(read: Read, tmp_path: Path) -> None:
    single(tmp_path)
    halves = {key: tensor.half() for key, tensor in TENSORS.items()}
    save_file(halves, tmp_path / "model.fp16.safetensors")
    checkpoint = read(tmp_path, variant="fp16")
    assert {record.dtype for record in checkpoint.records.values()} == {"F16"}
    check(checkpoint, tmp_path)
    write(tmp_path, {"model.bf16-1.safetensors": TENSORS}, index="model.safetensors.index.bf16.json")
    check(read(tmp_path, variant="bf16"), tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no safetensors weights of variant 'fp8'"):
        read(tmp_path, variant="fp8")


@pytest.mark.parametrize("name", ["special.safetensors", "weights/special.safetensors", "my.safetensors.index.json"])
def test_weights_that_the_config_names(read: Read, tmp_path: Path, name: str) -> None:
    """transformers_weights: in place of what is called as usual."""
    single(tmp_path)
    save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "weights").mkdir()
    if name.endswith(".json"):
        write(tmp_path, {"mine-1.safetensors": TENSORS}, index=name)
    else:
        save_file(TENSORS, tmp_path / name)
    config = CONFIG | {"transformers_weights": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read(tmp_path)
    check(checkpoint, tmp_path)
    assert {record.file for record in checkpoint.records.values()} <= {name, "mine-1.safetensors"}


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("../model.safetensors", CorruptCheckpointError, "no file beside it"),
        ("/model.safetensors", CorruptCheckpointError, "no file beside it"),
        (3, CorruptCheckpointError, "no file beside it"),
        ("model.bin", UnsupportedModelError, "neither a safetensors file nor an index"),
        ("absent.safetensors", CheckpointNotFoundError, "absent"),
    ],
)
def test_names_in_a_config_that_are_none(
    read: Read, tmp_path: Path, name: Any, error: type[Exception], said: str
) -> None:
    single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"transformers_weights": name}))
    with pytest.raises(error, match=said):
        read(tmp_path)


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    old, new = single(tmp_path / "old"), sharded(tmp_path / "new")
    first = hub.add_repo("org/revisions", old, revisions={"v1.0": "main"})
    second = hub.add_repo("org/revisions", new)
    third = hub.add_repo("org/revisions", old, revision="refs/pr/1")
    assert third == first
    for revision, commit in {
        "main": second,
        "": second,
        "v1.0": first,
        first: first,
        second: second,
        "refs/pr/1": first,
    }.items():
        request = CheckpointRequest(path="org/revisions", revision=revision, hub_endpoint=hub.endpoint)
        checkpoint = read_checkpoint(request, False)
        assert checkpoint.source.commit == commit
        check(checkpoint, old if commit == first else new)


def test_only_headers_are_read(hub: HubServer, tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.safetensors": {"big": torch.zeros(1 << 20)}})
    hub.add_repo("org/big", folder)
    hub.clear()
    read_checkpoint(CheckpointRequest(path="org/big", hub_endpoint=hub.endpoint), False)
    assert hub.bytes_sent("org/big") <= 64 << 10


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def refusal(read: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(ShardliftError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    assert "Traceback" not in text
    assert len(text) < 600
    return type(caught.value), text


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _adapter(folder: Path) -> None:
    _no_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def _text(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def _pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / name).write_bytes(b"pickle")

    return change


def _index(weight_map: Any) -> Callable[[Path], None]:
    return _text("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def _truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(data) and None


def _twice(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")


SHARD = "model-00002-of-00002.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], list[str]]] = {
    "no config": (_no_config, CheckpointNotFoundError, ["has no config.json"]),
    "adapter": (_adapter, UnsupportedModelError, ["is an adapter", "load its base model"]),
    "config not JSON": (_text("config.json", "{"), CorruptCheckpointError, ["config.json is not JSON"]),
    "config no object": (_text("config.json", "[]"), CorruptCheckpointError, ["config.json holds a list"]),
    "config deep": (_text("config.json", "[" * 100_000), CorruptCheckpointError, ["config.json is not JSON"]),
    "config binary": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\xfd"),
        CorruptCheckpointError,
        ["config.json is not JSON"],
    ),
    "generation config": (
        _text("generation_config.json", "nothing"),
        CorruptCheckpointError,
        ["generation_config.json is not JSON"],
    ),
    "index not JSON": (_text("model.safetensors.index.json", ""), CorruptCheckpointError, ["index.json is not JSON"]),
    "no weight_map": (
        _text("model.safetensors.index.json", '{"metadata": {}}'),
        CorruptCheckpointError,
        ["model.safetensors.index.json has no weight_map"],
    ),
    "empty weight_map": (_index({}), CorruptCheckpointError, ["no weight_map"]),
    "weight_map of lists": (_index({"t0": ["a"]}), CorruptCheckpointError, ["no safetensors file beside it"]),
    "outside": (_index({"t0": "../secret.safetensors"}), CorruptCheckpointError, ["'../secret.safetensors'"]),
    "absolute": (_index({"t0": "/etc/secret.safetensors"}), CorruptCheckpointError, ["beside it"]),
    "backslash": (_index({"t0": "..\\secret.safetensors"}), CorruptCheckpointError, ["beside it"]),
    "pickle in index": (_index({"t0": "pytorch_model.bin"}), CorruptCheckpointError, ["'pytorch_model.bin'"]),
    "missing shard": (lambda folder: (folder / SHARD).unlink(), CheckpointNotFoundError, [SHARD, "check"]),
    "only .bin": (
        _pickled("pytorch_model.bin"),
        UnsupportedModelError,
        ["only pytorch_model.bin", "convert it once", "`shardlift convert "],
    ),
    "only .bin shards": (
        _pickled("pytorch_model.bin.index.json"),
        UnsupportedModelError,
        ["only pytorch_model.bin.index.json", "`shardlift convert "],
    ),
    "no weights": (_pickled("readme"), CheckpointNotFoundError, ["has no safetensors weights", "model.safetensors"]),
    "truncated": (_truncated, CorruptCheckpointError, [SHARD, "truncated", "download it again"]),
    "empty shard": (_bytes(b""), CorruptCheckpointError, [SHARD, "truncated"]),
    "short shard": (_bytes(b"1234567"), CorruptCheckpointError, [SHARD, "truncated"]),
    "huge header": (_bytes(b"\xff" * 64), CorruptCheckpointError, [SHARD, "header claims"]),
    "corrupt header": (
        _bytes(b"\x10" + bytes(7) + b"{{{{{{{{{{{{{{{{"),
        CorruptCheckpointError,
        [SHARD, "not valid JSON"],
    ),
    "twice": (_twice, CorruptCheckpointError, ["tensor t0 is in both", SHARD]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(read: Read, tmp_path: Path, name: str) -> None:
    change, error, parts = BROKEN[name]
    change(sharded(tmp_path))
    kind, text = refusal(lambda: read(tmp_path))
    assert kind is error, text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("path", "error", "parts"),
    [
        ("", InvalidRequestError, ["no path", "org/name"]),
        ("  ", InvalidRequestError, ["no path"]),
        ("tape://reel/prefix", InvalidRequestError, ["tape://", "s3://", "or a folder"]),
        ("https://huggingface.co/org/name", InvalidRequestError, ["https://", "name the repository as org/name"]),
        ("/there/is/no/such/folder", CheckpointNotFoundError, ["/there/is/no/such/folder does not exist"]),
        ("./nowhere", CheckpointNotFoundError, ["./nowhere does not exist"]),
        ("a/b/c", CheckpointNotFoundError, ["a/b/c does not exist"]),
        ("org/" + "x" * 200, CheckpointNotFoundError, ["neither a folder nor a repository"]),
        ("org/na--me", CheckpointNotFoundError, ["neither a folder nor a repository"]),
    ],
)
def test_a_path_that_names_nothing(path: str, error: type[Exception], parts: list[str]) -> None:
    kind, text = refusal(lambda: read_checkpoint(CheckpointRequest(path=path), TOKEN))
    assert kind is error
    for part in parts:
        assert part in text


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = single(tmp_path) / "model.safetensors"
    kind, text = refusal(lambda: read_checkpoint(CheckpointRequest(path=str(file)), TOKEN))
    assert kind is CheckpointNotFoundError
    assert "is a file: name the folder" in text


# ---- the Hub's refusals ----------------------------------------------------------------------------------------------


def test_unknown_repository_and_revision(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/model", single(tmp_path))
    request = CheckpointRequest(path="org/model", hub_endpoint=hub.endpoint)
    kind, text = refusal(lambda: read_checkpoint(replace(request, path="org/nothing"), TOKEN))
    assert kind is CheckpointNotFoundError
    assert "no repository org/nothing" in text
    assert "HF_TOKEN" in text
    for revision in ("v9", "0" * 40):
        kind, text = refusal(lambda revision=revision: read_checkpoint(replace(request, revision=revision), TOKEN))
        assert kind is CheckpointNotFoundError
        assert f"no revision '{revision}'" in text


def test_a_gated_repository(hub: HubServer, tmp_path: Path) -> None:
    folder = single(tmp_path)
    hub.add_repo("org/gated", folder, gated_token=TOKEN)
    request = CheckpointRequest(path="org/gated", hub_endpoint=hub.endpoint)
    for token in (False, "hf_another"):
        kind, text = refusal(lambda token=token: read_checkpoint(request, token))
        assert kind is GatedCheckpointError
        assert "org/gated" in text
        assert "HF_TOKEN" in text
        assert "hf_another" not in text
    checkpoint = read_checkpoint(request, TOKEN)
    check(checkpoint, folder)
    assert TOKEN not in repr(checkpoint)


def test_nobody_at_the_endpoint() -> None:
    with socket.socket() as taken:
        # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        request = CheckpointRequest(path="org/model", hub_endpoint=endpoint)
        kind, text = refusal(lambda: read_checkpoint(request, TOKEN))
    assert kind is SourceError
    assert endpoint in text


def test_an_endpoint_that_is_no_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/model", single(tmp_path))
    for path in ("/nothing", ""):
        endpoint = (hub.cdn_endpoint if not path else hub.endpoint) + path
        kind, text = refusal(
            lambda endpoint=endpoint: read_checkpoint(CheckpointRequest(path="org/model", hub_endpoint=endpoint), TOKEN)
        )
        assert kind in (CheckpointNotFoundError, SourceError)
        assert endpoint in text


def test_a_hub_that_falters_is_asked_again(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_repo("org/model", single(tmp_path))
    pending: list[Fault] = [Status(502), Reset(None), Status(429, {"Retry-After": "7"})]
    hub.fault = lambda request: pending.pop(0) if pending else None
    sleeps: list[float] = []
    try:
        resolved = resolve_commit("org/model", "main", endpoint=hub.endpoint, token=False, sleep=sleeps.append)
    finally:
        hub.fault = None
    assert resolved == ResolvedCommit(commit=commit)
    assert len(sleeps) == 3
    assert sleeps[-1] == 7.0


def test_an_endpoint_whose_name_nobody_knows() -> None:
    sleeps: list[float] = []
    kind, text = refusal(
        lambda: resolve_commit(
            "org/model", "main", endpoint="http://no-such-host.invalid", token=False, sleep=sleeps.append
        )
    )
    assert issubclass(kind, SourceError)
    assert "the name no-such-host.invalid can't be resolved" in text
    assert "4 times" in text
    assert len(sleeps) == 3


# ---- the Hub's cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(hub: HubServer, tmp_path: Path) -> CheckpointRequest:
    """A repository that huggingface_hub has brought into a cache, all of it."""
    folder, cache = sharded(tmp_path / "folder"), tmp_path / "cache"
    (folder / "generation_config.json").write_text("{}")
    hub.add_repo("org/cached", folder, revisions={"v1": "main"})
    for revision in ("main", "v1"):
        snapshot_download(
            "org/cached", revision=revision, endpoint=hub.endpoint, cache_dir=cache, token=False, max_workers=1
        )
    hub.clear()
    return CheckpointRequest(path="org/cached", hub_endpoint=hub.endpoint, cache_dir=str(cache))


def test_of_a_cached_repository_no_file_is_asked_for(hub: HubServer, cached: CheckpointRequest, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(cached, False)
    check(checkpoint, tmp_path / "folder")
    assert checkpoint.source.cache_dir == cached.cache_dir
    assert not checkpoint.source.is_cached_only
    # The commit, and the one file that a cache of the whole repository can't know to be missing.
    assert [request.file for request in hub.requests] == [None, "model.safetensors"]
    assert read_checkpoint(replace(cached, cache_dir=""), False).versions == checkpoint.versions


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "down", "unknown"])
def test_without_the_hub_its_cache_is_read(
    cached: CheckpointRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    endpoint = {"down": "http://127.0.0.1:9", "unknown": "http://no-such-host.invalid"}.get(how, cached.hub_endpoint)
    commit = ""
    for revision in ("main", "v1", "commit"):
        request = replace(cached, hub_endpoint=endpoint, revision=revision.replace("commit", commit or "commit"))
        checkpoint = read_checkpoint(request, False)
        commit = checkpoint.source.commit
        check(checkpoint, tmp_path / "folder")
        assert checkpoint.generation_config == {}
        assert checkpoint.source.is_cached_only
    kind, text = refusal(lambda: read_checkpoint(replace(request, revision="v9"), False))
    assert issubclass(kind, SourceError)
    assert "HF_HUB_OFFLINE" in text or "4 times" in text


def test_only_local_files_are_read_if_so_asked(hub: HubServer, cached: CheckpointRequest, tmp_path: Path) -> None:
    local = replace(cached, local_files_only=True)
    checkpoint = read_checkpoint(local, False)
    check(checkpoint, tmp_path / "folder")
    assert checkpoint.source.local_files_only
    kind, text = refusal(lambda: read_checkpoint(replace(local, path="org/other"), False))
    assert issubclass(kind, SourceError)
    assert "local_files_only=True" in text
    assert "leave it out" in text
    # A worker's machine may lack what the planner's has.
    elsewhere = open_source(replace(checkpoint.source, cache_dir=str(tmp_path / "empty")), None)
    file, version = next(iter(checkpoint.versions.items()))
    with pytest.raises(SourceError, match=rf"{file} is not whole in this machine's cache of .*local_files_only"):
        elsewhere.read_into(file, 0, memoryview(bytearray(8)), version)
    assert hub.requests == []


def test_a_refusal_is_not_replaced_by_the_cache(hub: HubServer, cached: CheckpointRequest) -> None:
    for revision in ("v9", "0" * 40):
        kind, _ = refusal(lambda revision=revision: read_checkpoint(replace(cached, revision=revision), False))
        assert kind is CheckpointNotFoundError


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_in_what_may_be_printed(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/gated", single(tmp_path), gated_token=TOKEN)
    request = CheckpointRequest(path="org/gated", hub_endpoint=hub.endpoint)
    checkpoint = read_checkpoint(request, TOKEN)
    spec = StageSpec(
        model="m",
        load_id="l",
        index=0,
        num_stages=1,
        device="cpu",
        cut=Cut(first=0, end=2, num_layers=2),
        source=checkpoint.source,
        records=tuple(checkpoint.records.values()),
        versions=checkpoint.versions,
        config=checkpoint.config,
        generation_config=None,
        quantization=None,
        dtype="float32",
        attn_implementation=None,
        secret="the stages' own secret",
    )
    for value in (request, checkpoint.source, spec):
        for text in (repr(value), str(value), f"{value}"):
            assert TOKEN not in text
            assert "own secret" not in text
            assert len(text) < 400
    assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert TOKEN not in json.dumps(spec.to_json())
