"""`shardlift nodes`, `drain` and `undrain`: the cluster's machines, and taking one out of use."""

from __future__ import annotations

import click

from ..nodes import StageMove
from ..render import show_nodes
from .common import Seconds, as_json, gateway, open_client, print_json


@click.command("nodes")
@gateway
@as_json
def list_nodes(address: str | None, token_file: str | None, json_: bool) -> None:
    """Lists the cluster's nodes, with the stages on each."""
    with open_client(address, token_file) as client:
        found = client.nodes()
    if json_:
        print_json([node.to_dict() for node in found])
    else:
        show_nodes(found)


@click.command()
@click.argument("node")
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min_open=True),
    metavar="SECONDS",
    help="Give up moves that take longer. [default: none]",
)
@gateway
@as_json
def drain(node: str, timeout_s: float | None, address: str | None, token_file: str | None, json_: bool) -> None:
    """Takes NODE (name, address, host name or Ray id) out of use: no plan takes it, and its stages go elsewhere.

    Each stage is loaded on its new device first; running streams pause for the switch and go on. Where there is no room
    for all of them, it says what is missing, and touches nothing. It ends when nothing is on the node any more.
    """

    def tell(move: StageMove) -> None:
        click.echo(str(move), err=json_)

    with open_client(address, token_file) as client:
        found, moves = client.drain(node, timeout_s=timeout_s, on_move=tell)
    if json_:
        print_json({**found.to_dict(), "moves": [move.to_dict() for move in moves]})
    else:
        click.echo(f"{found.name} is drained: end it, or take it back with `shardlift undrain {found.name}`")


@click.command()
@click.argument("node")
@gateway
@as_json
def undrain(node: str, address: str | None, token_file: str | None, json_: bool) -> None:
    """Lets plans use NODE again. What was moved stays where it is."""
    with open_client(address, token_file) as client:
        found = client.undrain(node)
    if json_:
        print_json(found.to_dict())
    else:
        click.echo(f"{found.name} may be used again")
