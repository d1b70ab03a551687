"""Tokens a second of a resident model against transformers in one process, on the same machine, in the same run.

    python -m bench.generate CHECKPOINT [--stages 1 2 3] [--tokens 48] [--repeat 3]

Greedy decoding of one stream, NF4 with double quantization. Prints one JSON object: for each number of stages, tokens
a second, time to first token, their ratios to transformers', and what one more hop costs a step. Medians of `--repeat`
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shardlift.client import instance
from shardlift.client.connection import connect
from tests.support.quantization import nf4

from .common import surroundings

PROMPT_TOKENS = 16


class Stopwatch:
    """A streamer that notes when each token comes. The prompt comes first, and is no token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter() - self.started)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def measure(model: Any, tokens: int, repeat: int) -> dict[str, float]:
    ids = torch.arange(100, 100 + PROMPT_TOKENS)[None]
    arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(ids, **arguments)
    firsts, steps = [], []
    for _ in range(repeat):
        watch = Stopwatch()
        model.generate(ids, streamer=watch, **arguments)
        firsts.append(watch.times[0])
        steps.append((watch.times[-1] - watch.times[0]) / (tokens - 1))
    step_s = statistics.median(steps)
    return {"first_token_s": statistics.median(firsts), "step_ms": step_s * 1e3, "tokens_per_s": 1 / step_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    device = {"": "cuda:0"} if torch.cuda.is_available() else None
    local = AutoModelForCausalLM.from_pretrained(options.checkpoint, quantization_config=nf4(), device_map=device)
    peer = measure(local, options.tokens, options.repeat)
    del local

    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="shardlift-bench-") as home:
        os.environ["SHARDLIFT_HOME"], os.environ["SHARDLIFT_CACHE"] = home, "off"
        running = instance.start(port=0)
        try:
            with connect(running.address) as client:
                for stages in options.stages:
                    model = client.load(options.checkpoint, name="bench", num_stages=stages, quantization_config=nf4())
                    results[stages] = measure(model, options.tokens, options.repeat)
                    model.unload()
        finally:
            instance.stop()

    fewest = min(results)
    for stages, result in results.items():
        result["tokens_per_s_to_transformers"] = result["tokens_per_s"] / peer["tokens_per_s"]
        result["first_token_to_transformers"] = result["first_token_s"] / peer["first_token_s"]
        if stages != fewest:
            result["hop_ms"] = (result["step_ms"] - results[fewest]["step_ms"]) / (stages - fewest)
    print(
        json.dumps(
            {
                **surroundings(
                    *("torch", "transformers", "bitsandbytes", "ray", "grpcio"),
                    device=device[""] if device else "cpu",
                ),
                "prompt_tokens": PROMPT_TOKENS,
                "new_tokens": options.tokens,
                "transformers": peer,
                "stages": results,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
