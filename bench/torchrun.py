"""transformers' own pipeline, started by torchrun, against as many stages here."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from shardlift.client.connection import Client
from shardlift.client.instance import last_json_line
from tests.support.quantization import nf4

from .streams import exactly, one, prompt, repeated

_TIMEOUT_S = 600.0


def measure(client: Client, checkpoint: str, stages: int, tokens: int, repeat: int) -> dict[str, Any]:
    """Both in NF4, or in bf16 where transformers' pipeline doesn't do NF4, with the reason."""
    result: dict[str, Any] = {"stages": stages}
    for quantize in (True, False):
        answer = _run(checkpoint, stages, tokens, repeat, quantize=quantize)
        if isinstance(answer, str):
            result[f"why_not_in_{'nf4' if quantize else 'bf16'}"] = answer
            continue
        quantization = nf4() if quantize else None
        model = client.load(checkpoint, name="bench", num_stages=stages, quantization_config=quantization)
        rates = repeated(partial(one, model, tokens), repeat)
        ids = model.generate(prompt(0), **exactly(tokens))
        model.unload()
        peer = answer["rates"]
        return result | {
            "weights": "nf4" if quantize else "bf16",
            "transformers": peer,
            "shardlift": rates,
            "same_tokens": ids[0].tolist() == answer["ids"],
            "tokens_per_s_to_transformers": rates["tokens_per_s"] / peer["tokens_per_s"],
            "first_token_to_transformers": rates["first_token_s"] / peer["first_token_s"],
        }
    return result


def _run(checkpoint: str, stages: int, tokens: int, repeat: int, *, quantize: bool) -> dict[str, Any] | str:
    """What the first rank printed, or in one line why there is nothing. Threads as a worker of ours has them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(stages)]
    command += ["-m", "bench.torchrun_rank", checkpoint, "--tokens", str(tokens), "--repeat", str(repeat)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command + ["--quantize"] * quantize,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"nothing came within {_TIMEOUT_S:.0f} s"
    answer = last_json_line(done.stdout)
    if done.returncode == 0 and answer is not None:
        return answer
    errors = [line.split("]: ", 1)[-1] for line in done.stderr.splitlines() if "Error" in line]
    # The rank that failed says why; the others, that it has gone.
    errors.sort(key=lambda line: "gloo" in line)
    return errors[0].strip()[:300] if errors else f"torchrun ended with {done.returncode}"
