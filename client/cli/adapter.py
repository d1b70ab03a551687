"""`shardlift adapter load`, `list` and `delete`: the adapters of a resident model."""

from __future__ import annotations

from typing import Any

import click

from ..adapters import DEFAULT_NAME
from ..summary import size
from ..values import Adapter
from .common import as_json, gateway, open_client, print_json, read_secret


@click.group()
def adapter() -> None:
    """The adapters of a resident model."""


@adapter.command()
@click.argument("model")
@click.argument("path")
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="What requests call it.")
@click.option("--revision", help="Branch, tag or commit. [default: main]")
@click.option("--subfolder", default="", help="Folder of the adapter inside the repository.")
@click.option("--cache-dir", help="Folder for the Hub's files, where the gateway runs.")
@click.option(
    "--hf-token-file",
    type=click.Path(exists=True, dir_okay=False),
    help="File with the Hub token. [default: $HF_TOKEN, for a gateway on this machine]",
)
@gateway
@as_json
def load(
    model: str,
    path: str,
    name: str,
    address: str | None,
    token_file: str | None,
    json_: bool,
    hf_token_file: str | None,
    **values: Any,
) -> None:
    """Attaches the adapter at PATH ("org/name", a folder or a URL) to the model MODEL."""
    with open_client(address, token_file) as client:
        handle = client.model(model)
        handle.load_adapter(path, name, token=read_secret(hf_token_file), **values)
        attached = next(each for each in handle.adapters() if each.name == name)
    if json_:
        print_json(attached.to_dict())
    else:
        click.echo(_line(attached))


@adapter.command("list")
@click.argument("model")
@gateway
@as_json
def list_adapters(model: str, address: str | None, token_file: str | None, json_: bool) -> None:
    """Lists the adapters of the model MODEL."""
    with open_client(address, token_file) as client:
        attached = client.model(model).adapters()
    if json_:
        print_json([each.to_dict() for each in attached])
        return
    for each in attached:
        click.echo(_line(each))


@adapter.command()
@click.argument("model")
@click.argument("name")
@gateway
@as_json
def delete(model: str, name: str, address: str | None, token_file: str | None, json_: bool) -> None:
    """Takes the adapter NAME off the model MODEL."""
    with open_client(address, token_file) as client:
        client.model(model).delete_adapter(name)
    if json_:
        print_json({"name": name, "deleted": True})
    else:
        click.echo(f"deleted {name}")


def _line(attached: Adapter) -> str:
    return f"{attached.name}: {attached.kind} from {attached.path}, {size(attached.bytes)}"
