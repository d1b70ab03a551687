"""`shardlift load`: a model into the cluster."""

from __future__ import annotations

from typing import Any

import click

from ..render import LoadProgress, show_model
from .common import as_json, checkpoint, checkpoint_arguments, gateway, open_client, print_json


@click.command()
@click.argument("path")
@click.option("--name", help="The model's name in the registry. [default: derived from PATH]")
@checkpoint
@gateway
@as_json
def load(path: str, name: str | None, address: str | None, token_file: str | None, json_: bool, **values: Any) -> None:
    """Loads the checkpoint PATH ("org/name" or a folder) and says where it is.

    Starts a gateway here when none is named and none runs; inside a Ray job, on the job's cluster. Ctrl-C cancels.
    """
    arguments = checkpoint_arguments(values)
    with open_client(address, token_file, start=True) as client:
        with LoadProgress() as progress:
            info = client.load(path, name=name, on_event=progress.show, **arguments).info()
        if json_:
            print_json({"address": client.address, **info.to_dict()})
        else:
            show_model(info)
            click.echo(f"{info.name} at {client.address}")
