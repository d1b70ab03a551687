"""`shardlift up` and `shardlift down`: the local instance."""

from __future__ import annotations

import signal

import click

from ...proto.v1.errors import ShardliftError, one_line
from .. import instance
from .common import as_json, print_json


@click.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: 50051]")
@click.option("--ray-address", help="A Ray cluster to join, in place of a local one of its own.")
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs for the local Ray.")
@click.option("--num-gpus", type=click.IntRange(min=0), help="GPUs for the local Ray.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="For how long running calls may go on when the gateway is stopped. [default: 30]",
)
@click.option(
    "--block",
    is_flag=True,
    help="Stay, and start the gateway again where it has gone. Ctrl-C or SIGTERM stops it, as `shardlift down` does.",
)
@as_json
def up(
    host: str | None,
    port: int | None,
    ray_address: str | None,
    num_cpus: int | None,
    num_gpus: int | None,
    grace_s: float | None,
    block: bool,
    json_: bool,
) -> None:
    """Starts a gateway, on this machine or on a Ray cluster, and prints its address."""
    options = {
        "host": host,
        "port": port,
        "ray_address": ray_address,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "grace_s": grace_s,
    }

    def tell(what: instance.Instance | ShardliftError) -> None:
        if isinstance(what, ShardliftError):
            click.echo(f"waiting: {one_line(what)}", err=True)
        elif json_:
            values = {"address": what.address, "pid": what.pid}
            print_json({**values, "ray_address": what.ray_address, "token_file": what.token_file})
        else:
            click.echo(what.address)

    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        instance.keep(tell, **options)
    else:
        tell(instance.start(**options))  # type: ignore[arg-type]


@click.command()
@as_json
def down(json_: bool) -> None:
    """Stops the local instance, and every model on it. Calls that run may go on for the grace that `up` was given."""
    stopped = instance.stop()
    if json_:
        print_json({"stopped": stopped is not None, "address": None if stopped is None else stopped.address})
    else:
        click.echo("no local instance is recorded" if stopped is None else f"stopped {stopped.address}")
