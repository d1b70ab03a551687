"""Tokens a second of a resident model against transformers on the same machine, in the same run; and what a ring costs.

    python -m bench.generate CHECKPOINT [--parts model hops wait torchrun recovery] [--stages 1 2 4]
        [--streams 1 4 8 16] [--tokens 32] [--repeat 3] [--threads N] [--output FILE]

    model     NF4 with double quantization, greedy: one stream, then several at once, over each number of stages,
              against transformers in one process: one stream, and all prompts in one padded batch
    hops      stages in processes of their own that compute nothing: what one more of them costs a step
    wait      the same with 20 ms for each forward pass, so that the cores here don't decide: what a ring gains
    torchrun  transformers' own pipeline in two processes against two stages
    recovery  a worker killed in the middle of a stream: seconds to the next token, beside those of a reload

Prints one JSON object, with the targets and whether they are met. Medians of `--repeat` runs, after one that doesn't
count. What is compared takes turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shardlift.client import instance
from shardlift.client.connection import Client, connect
from shardlift.client.instance import Instance
from tests.support.quantization import nf4

from . import recovery, torchrun
from .common import surroundings
from .ring_processes import WIDTH, Behaviour, Rings, rings
from .streams import PROMPT_TOKENS, medians, one, padded, repeated, together
from .targets import targets

PARTS = ("model", "hops", "wait", "torchrun", "recovery")
WAIT_S = 0.02
# A step without computation takes a millisecond: many, so that a pause of the machine doesn't show.
_HOP_TOKENS = 200
_TORCHRUN_STAGES = 2


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def gateway(cache: str = "off") -> Iterator[tuple[Client, Instance]]:
    """A local instance of its own, whose stages compute with as many threads as the peer here. cache: the folder of
    quantized parts."""
    before = {name: os.environ.get(name) for name in ("SHARDLIFT_HOME", "SHARDLIFT_CACHE", "SHARDLIFT_THREADS")}
    with tempfile.TemporaryDirectory(prefix="shardlift-bench-") as home:
        os.environ["SHARDLIFT_HOME"], os.environ["SHARDLIFT_CACHE"] = home, cache
        try:
            os.environ["SHARDLIFT_THREADS"] = str(torch.get_num_threads())
            running = instance.start(port=0)
            with connect(running.address) as client:
                yield client, running
        finally:
            instance.stop()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


# ---- parts -----------------------------------------------------------------------------------------------------------


def of_model(options: argparse.Namespace) -> dict[str, Any]:
    device = {"": "cuda:0"} if torch.cuda.is_available() else None
    peer = AutoModelForCausalLM.from_pretrained(options.checkpoint, quantization_config=nf4(), device_map=device)
    peer_rates: dict[int, dict[str, float]] = {}
    for count in options.streams:
        peer_rates[count] = repeated(partial(padded, peer, count, options.tokens), options.repeat)
        say(f"model: transformers, a batch of {count}: {peer_rates[count]['tokens_per_s']:.1f} tokens/s")
    by_stages: dict[int, dict[str, Any]] = {}
    with gateway() as (client, _):
        for stages in options.stages:
            model = client.load(options.checkpoint, name="bench", num_stages=stages, quantization_config=nf4())
            by_stages[stages] = _one_and_many(model, peer, peer_rates, options)
            model.unload()
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.tokens,
        "transformers_padded_batch": peer_rates,
        "stages": by_stages,
    }


def _one_and_many(
    model: Any, peer: Any, peer_rates: dict[int, dict[str, float]], options: argparse.Namespace
) -> dict[str, Any]:
    tokens = options.tokens
    runs: dict[str, list[Any]] = {"ours": [], "theirs": []}
    for index in range(options.repeat + 1):
        for name, each in (("theirs", peer), ("ours", model)):
            run = one(each, tokens)
            if index:
                runs[name].append(run)
    ours, theirs = medians(runs["ours"]), medians(runs["theirs"])
    alone = {
        **ours,
        "transformers": theirs,
        "tokens_per_s_to_transformers": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "first_token_to_transformers": ours["first_token_s"] / theirs["first_token_s"],
    }
    stages = len(model.info().plan.stages)
    say(f"model: {stages} stages, one stream: {alone['tokens_per_s_to_transformers']:.2f} of transformers' tokens/s")
    several = {}
    for count in options.streams:
        rates = repeated(partial(together, model, count, tokens), options.repeat)
        several[count] = {
            **rates,
            "tokens_per_s_to_one_stream": rates["tokens_per_s"] / ours["tokens_per_s"],
            "tokens_per_s_to_transformers_one_after_another": rates["tokens_per_s"] / theirs["tokens_per_s"],
            "tokens_per_s_to_transformers_padded_batch": rates["tokens_per_s"] / peer_rates[count]["tokens_per_s"],
        }
        say(f"model: {stages} stages, {count} streams: {rates['tokens_per_s']:.1f} tokens/s")
    return {"one_stream": alone, "streams": several}


def of_hops(opened: Rings, options: argparse.Namespace) -> dict[str, Any]:
    """Rings take turns, so that whatever else the machine does falls on all."""
    opened.behave(Behaviour())
    runs: dict[int, list[Any]] = {stages: [] for stages in options.stages}
    for index in range(options.repeat + 1):
        for stages, each in runs.items():
            run = opened.streams(stages, 1, _HOP_TOKENS)
            if index:
                each.append(run)
    step_ms = {stages: medians(each)["step_ms"] for stages, each in runs.items()}
    result: dict[str, Any] = {"hidden_size": WIDTH, "new_tokens": _HOP_TOKENS, "step_ms": step_ms}
    if 1 in step_ms:
        longer = {stages: ms - step_ms[1] for stages, ms in step_ms.items() if stages > 1}
        result |= {
            # Of a step over S stages beyond that over one: S - 1 more stages,
            "hop_ms": {stages: ms / (stages - 1) for stages, ms in longer.items()},
            # which are S transfers in place of none.
            "transfer_ms": {stages: ms / stages for stages, ms in longer.items()},
        }
    say(f"hops: steps of {', '.join(f'{ms:.2f} ms over {stages}' for stages, ms in step_ms.items())}")
    return result


def of_wait(opened: Rings, options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"wait_ms": 1e3 * WAIT_S, "new_tokens": options.tokens}
    for name, batches in (("batches", True), ("without_batches", False)):
        opened.behave(Behaviour(wait_s=WAIT_S, batches=batches))
        result[name] = {}
        for stages in options.stages:
            rates = {
                # A wait doesn't vary as computing does: one run of each.
                count: medians([opened.streams(stages, count, options.tokens)])
                for count in sorted({1, *options.streams})
            }
            for rate in rates.values():
                rate["tokens_per_s_to_one_stream"] = rate["tokens_per_s"] / rates[1]["tokens_per_s"]
            result[name][stages] = rates
            several = ", ".join(f"{count}: {rate['tokens_per_s']:.0f}" for count, rate in rates.items())
            say(f"wait: {stages} stages, {name.replace('_', ' ')}, tokens/s by streams: {several}")
    return result


def of_torchrun(options: argparse.Namespace) -> dict[str, Any]:
    with gateway() as (client, _):
        result = torchrun.measure(client, options.checkpoint, _TORCHRUN_STAGES, options.tokens, options.repeat)
    say(f"torchrun: {result.get('tokens_per_s_to_transformers', 'transformers did not run')}")
    return result


def of_recovery(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shardlift-bench-") as cache, gateway(cache) as (client, running):
        assert running.pid is not None
        result = recovery.measure(client, running.pid, options.checkpoint, options.repeat)
    for loss in result["losses"]:
        say(f"recovery: stage {loss['stage']}: {loss['gap_s']:.1f} s, {loss['beyond_reload_s']:.1f} s beyond a reload")
    return result


# ---- all of it -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=32, help="of each stream")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of transformers and of each stage; by default all cores")
    parser.add_argument("--output", type=Path, help="a file for the JSON, in place of stdout")
    options = parser.parse_args()
    # Told to end, it leaves no processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.checkpoint = str(Path(options.checkpoint).resolve())  # workers have folders of their own
    if options.threads:
        torch.set_num_threads(options.threads)

    report: dict[str, Any] = {
        **surroundings(
            *("torch", "transformers", "bitsandbytes", "ray", "grpcio"),
            device="cuda:0" if torch.cuda.is_available() else "cpu",
        ),
        "checkpoint": Path(options.checkpoint).name,
        "repeat": options.repeat,
        "threads": torch.get_num_threads(),
        "load_average_before": {},  # of the whole machine, over a minute: others' work, and the part's before
    }

    with contextlib.ExitStack() as exits:
        opened: Rings | None = None
        for part in options.parts:
            report["load_average_before"][part] = round(os.getloadavg()[0], 1)
            if part in ("hops", "wait"):
                opened = exits.enter_context(rings(options.stages)) if opened is None else opened
                report[part] = of_hops(opened, options) if part == "hops" else of_wait(opened, options)
            else:
                report[part] = {"model": of_model, "torchrun": of_torchrun, "recovery": of_recovery}[part](options)
            report["targets"] = targets(report)
            if options.output is not None:  # as far as it has come
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.output is None:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
