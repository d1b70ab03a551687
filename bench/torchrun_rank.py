"""One process of transformers' own pipeline, as torchrun starts it. The first prints its rates as a line of JSON."""

from __future__ import annotations

import argparse
import json
import os

import torch
import torch.distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.support.quantization import nf4

from .streams import one, repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--repeat", type=int, required=True)
    parser.add_argument("--quantize", action="store_true")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=torch.bfloat16,
        quantization_config=nf4() if options.quantize else None,
        distributed_config=DistributedConfig(pp_size=int(os.environ["WORLD_SIZE"])),
    )
    rates = repeated(lambda: one(model, options.tokens), options.repeat)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(rates), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
