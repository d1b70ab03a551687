"""`shardlift convert`: a checkpoint of `.bin` files made into one that can be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import click

from ...proto.v1 import status
from ...proto.v1.errors import InternalError
from .. import options
from ..hub_token import hub_token
from ..instance import last_json_line
from ..summary import size
from .common import as_json, print_json, read_secret


@click.command()
@click.argument("path")
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--revision", help="Branch, tag or commit. [default: main]")
@click.option("--subfolder", help="Folder of the checkpoint inside the repository.")
@click.option("--variant", help='"fp16" selects pytorch_model.fp16.bin and the like.')
@click.option("--cache-dir", help="Folder of the Hub's cache.")
@click.option(
    "--hf-token-file",
    type=click.Path(exists=True, dir_okay=False),
    help="File with the Hub token. [default: $HF_TOKEN]",
)
@as_json
def convert(path: str, out: str, hf_token_file: str | None, json_: bool, **where: str | None) -> None:
    """Writes the checkpoint PATH, whose weights are pickled (pytorch_model.bin), as safetensors to the folder OUT.

    Runs here, needs no cluster, and no code of the checkpoint: anything but weights in its files is refused. Config and
    tokenizer are copied.
    """
    token = hub_token(read_secret(hf_token_file), "localhost:0")  # it goes to a child of this process alone
    source = options.source(path, **{name: value for name, value in where.items() if value})  # type: ignore[arg-type]
    names = ("path", "revision", "subfolder", "variant", "cache_dir", "hub_endpoint")
    request = {
        "source": {name: getattr(source, name) for name in names},
        "token": token,
        "out": os.path.abspath(out),
    }
    command = [sys.executable, "-m", "shardlift.cluster.convert"]
    # Its stderr is ours: it tells each file there.
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=False)
    answer: Any = last_json_line(done.stdout)
    if answer is None or (done.returncode != 0 and "error" not in answer):
        raise InternalError(f"the conversion ended with {done.returncode}")
    if "error" in answer:
        raise status.from_reason(str(answer["error"]), str(answer.get("message", "")))
    if json_:
        print_json(answer)
    else:
        click.echo(f"{answer['tensors']} tensors, {size(answer['bytes'])}, in {answer['folder']}")
