"""`shardlift cache list` and `clear`: the quantized parts that nodes keep for later loads."""

from __future__ import annotations

import click

from ..render import show_parts
from ..summary import size
from .common import as_json, gateway, open_client, print_json


@click.group()
def cache() -> None:
    """The quantized parts that the cluster's nodes keep for later loads."""


@cache.command("list")
@gateway
@as_json
def list_parts(address: str | None, token_file: str | None, json_: bool) -> None:
    """Lists the parts that each node keeps, the latest used first."""
    with open_client(address, token_file) as client:
        parts = client.cached_parts()
    if json_:
        print_json([part.to_dict() for part in parts])
    else:
        show_parts(parts)
        click.echo(f"{len(parts)} parts, {size(sum(part.bytes for part in parts))}")


@cache.command()
@gateway
@as_json
def clear(address: str | None, token_file: str | None, json_: bool) -> None:
    """Removes all of them. Resident models stay."""
    with open_client(address, token_file) as client:
        freed = client.clear_cached_parts()
    if json_:
        print_json({"freed_bytes": freed})
    else:
        click.echo(f"freed {size(freed)}")
