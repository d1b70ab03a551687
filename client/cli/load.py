"""`shardlift load`: a model into the cluster."""

from __future__ import annotations

from typing import Any

import click

from ..render import LoadProgress, show_model
from .common import Seconds, as_json, checkpoint, checkpoint_arguments, gateway, open_client, print_json
from .ending import ended_by_sigterm

_AS_GIVEN = ("staging_budget", "connections", "max_sessions", "max_waiting", "idle_timeout_s", "trace")


@click.command()
@click.argument("path")
@click.option("--name", help="The model's name in the registry. [default: derived from PATH]")
@checkpoint
@click.option("--staging-budget", help="Memory of each worker for bytes on their way. [default: 512MiB]")
@click.option("--connections", type=click.IntRange(min=1), help="Reads at a time of each worker. [default: 4]")
@click.option("--no-cache", is_flag=True, help="Neither read quantized parts that nodes keep, nor keep new ones.")
@click.option("--max-sessions", type=click.IntRange(min=1), help="Requests that run at a time. [default: 64]")
@click.option("--max-waiting", type=click.IntRange(min=1), help="Requests that may wait for their turn. [default: 256]")
@click.option(
    "--idle-timeout",
    "idle_timeout_s",
    type=Seconds(min_open=True),
    metavar="SECONDS",
    help="End a session that nothing comes for. [default: 600]",
)
@click.option("--no-batching", is_flag=True, help="Compute each request's steps by themselves.")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, writable=True),
    help="File for the timeline of all workers, in Chrome's trace format (ui.perfetto.dev shows it).",
)
@gateway
@as_json
def load(path: str, name: str | None, address: str | None, token_file: str | None, json_: bool, **values: Any) -> None:
    """Loads the checkpoint PATH ("org/name", a folder or a URL) and says where it is.

    Starts a gateway here when none is named and none runs; inside a Ray job, on the job's cluster. Ctrl-C cancels, as
    does SIGTERM, which `ray job stop` sends.
    """
    arguments = {
        **checkpoint_arguments(values),
        **{key: values[key] for key in _AS_GIVEN if values[key] is not None},
        "part_cache": not values["no_cache"],
        "batching": not values["no_batching"],
    }
    said = "the load is cancelled, and gives back what it took"
    with ended_by_sigterm(said), open_client(address, token_file, start=True) as client:
        with LoadProgress(with_summary=json_) as progress:
            info = client.load(path, name=name, on_event=progress.show, **arguments).info()
        if json_:
            print_json({"address": client.address, **info.to_dict()})
        else:
            show_model(info)
            click.echo(f"{info.name} at {client.address}")
