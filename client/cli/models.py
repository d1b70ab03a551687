"""`shardlift list`, `show` and `unload`: what the registry holds."""

from __future__ import annotations

import click

from ..render import show_model, show_models, show_modules
from .common import as_json, gateway, open_client, print_json


@click.command("list")
@gateway
@as_json
def list_models(address: str | None, token_file: str | None, json_: bool) -> None:
    """Lists the models of the cluster."""
    with open_client(address, token_file) as client:
        infos = client.infos()
    if json_:
        print_json([info.summary() for info in infos])
    else:
        show_models(infos)


@click.command()
@click.argument("name")
@gateway
@as_json
def show(name: str, address: str | None, token_file: str | None, json_: bool) -> None:
    """Shows where the model NAME is: predicted and measured bytes of each stage, and what each module holds."""
    with open_client(address, token_file) as client:
        info = client.model(name).info()
    if json_:
        print_json(info.to_dict())
    else:
        show_model(info)
        if info.residency:
            show_modules(info)


@click.command()
@click.argument("name")
@gateway
@as_json
def unload(name: str, address: str | None, token_file: str | None, json_: bool) -> None:
    """Takes the model NAME out of the cluster; cancels it where it is still loading."""
    with open_client(address, token_file) as client:
        client.unload(name)
    if json_:
        print_json({"name": name, "unloaded": True})
    else:
        click.echo(f"unloaded {name}")
