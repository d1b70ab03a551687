"""`shardlift up` and `shardlift down`: the local instance."""

from __future__ import annotations

import signal

import click

from ...proto.v1.errors import ShardliftError, one_line
from .. import instance
from .common import Seconds, as_json, print_json
from .ending import ended_by_sigterm


@click.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: 50051]")
@click.option(
    "--page-port", metavar="PORT|off", help="Port of the page that shows the cluster. [default: the one after --port]"
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Of the gateway's and the workers' log lines.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False))
@click.option("--ray-address", help="A Ray cluster to join, in place of a local one of its own.")
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs for the local Ray.")
@click.option("--num-gpus", type=click.IntRange(min=0), help="GPUs for the local Ray.")
@click.option("--tls-cert", help="The gateway's certificate, for TLS. [default: $SHARDLIFT_TLS_CERT]")
@click.option("--tls-key", help="Its private key. [default: $SHARDLIFT_TLS_KEY]")
@click.option(
    "--tls-client-ca",
    help="Clients must have a certificate of this CA. [default: $SHARDLIFT_TLS_CLIENT_CA]",
)
@click.option(
    "--health-port",
    type=click.IntRange(1, 65535),
    help="With TLS: a port that answers health checks in plain text. [default: one of this machine's own]",
)
@click.option("--stage-tls-cert", help="A stage's, a file on every node. [default: $SHARDLIFT_STAGE_TLS_CERT]")
@click.option("--stage-tls-key", help="Its private key. [default: $SHARDLIFT_STAGE_TLS_KEY]")
@click.option("--stage-tls-ca", help="The CA of stages' certificates. [default: $SHARDLIFT_STAGE_TLS_CA]")
@click.option("--stage-tls-name", help="What these are made out to. [default: shardlift-stage]")
@click.option("--allow-remote-code", is_flag=True, help="Listen to requests with trust_remote_code=True.")
@click.option(
    "--grace",
    "grace_s",
    type=Seconds(),
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
    page_port: str | None,
    log_format: str | None,
    log_level: str | None,
    grace_s: float | None,
    block: bool,
    json_: bool,
    **security: str | int | bool | None,
) -> None:
    """Starts a gateway, on this machine or on a Ray cluster, and prints its address."""
    options = {
        "host": host,
        "port": port,
        "ray_address": ray_address,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "page_port": page_port,
        "log_format": log_format,
        "log_level": log_level,
        "grace_s": grace_s,
    }
    options |= {name: value for name, value in security.items() if value}

    def tell(what: instance.Instance | ShardliftError) -> None:
        if isinstance(what, ShardliftError):
            click.echo(f"waiting: {one_line(what)}", err=True)
            return
        for warning in what.warnings:
            click.echo(f"warning: {one_line(Exception(warning))}", err=True)
        if json_:
            values = {"address": what.address, "pid": what.pid}
            print_json({**values, "ray_address": what.ray_address, "token_file": what.token_file, "page": what.page})
        else:
            click.echo(what.address)
            if what.page:
                click.echo(f"page: {what.page}", err=True)

    if block:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # On stderr, where `kubectl logs` finds them beside what this process says itself.
        instance.keep(tell, lambda line: click.echo(line, err=True), **options)
    else:
        with ended_by_sigterm("no gateway is started"):
            tell(instance.start(**options))  # type: ignore[arg-type]


@click.command()
@click.option(
    "--ray-address",
    help="Stop the gateway of this Ray cluster, whoever started it; models stay. [default: the local instance]",
)
@as_json
def down(ray_address: str | None, json_: bool) -> None:
    """Stops the local instance, and every model on it; of a cluster that it has joined, the gateway alone.

    Calls that run may go on for the grace that `up` was given.
    """
    if ray_address is None:
        local = instance.stop()
        address, none = (None if local is None else local.address), f"no local instance is recorded{_ELSEWHERE}"
    else:
        address, none = instance.stop_on(ray_address), f"no gateway runs on the cluster at {ray_address}"
    if json_:
        print_json({"stopped": address is not None, "address": address})
    else:
        click.echo(none if address is None else f"stopped {address}")


# A gateway on a cluster is an actor: it may run where nobody here has noted it.
_ELSEWHERE = "; a Ray cluster's gateway is stopped with `shardlift down --ray-address ADDRESS` (`auto` on its nodes)"
