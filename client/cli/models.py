"""`shardlift list`, `show` and `unload`: what the registry holds."""

from __future__ import annotations

import json

import click

from .. import live
from ..connection import Client
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
@click.option(
    "--watch", is_flag=True, help="Stay, and show its stages, sessions and events as they are, until it is unloaded."
)
@gateway
@as_json
def show(name: str, watch: bool, address: str | None, token_file: str | None, json_: bool) -> None:
    """Shows where the model NAME is: predicted and measured bytes of each stage, and what each module holds."""
    with open_client(address, token_file) as client:
        if watch:
            _watch(client, name, json_)
            return
        info = client.model(name).info()
    if json_:
        print_json(info.to_dict())
    else:
        show_model(info)
        if info.residency:
            show_modules(info)


def _watch(client: Client, name: str, json_: bool) -> None:
    """Returns when the model is gone. As JSON, a line for each change."""
    views = client.watch(name)
    if json_:
        for view in views:
            click.echo(json.dumps(view.to_dict(), ensure_ascii=False))
    else:
        live.follow(views)
        click.echo(f"{name} was unloaded", err=True)


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
