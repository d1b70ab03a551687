"""`shardlift generate`: a prompt's continuation."""

from __future__ import annotations

from typing import Any

import click

from .common import as_json, gateway, open_client, print_json
from .sampling import sampling, sampling_arguments


@click.command()
@click.argument("name")
@click.option("--prompt", required=True)
@sampling
@gateway
@as_json
def generate(name: str, prompt: str, address: str | None, token_file: str | None, json_: bool, **values: Any) -> None:
    """Continues a prompt with the model NAME, printing the text as it comes."""
    with (
        open_client(address, token_file) as client,
        client.model(name).stream(prompt=prompt, **sampling_arguments(values)) as running,
    ):
        text, token_ids = "", []
        for step in running:
            text += step.text
            token_ids += step.token_ids
            if not json_ and step.text:
                click.echo(step.text, nl=False)
        if json_:
            print_json(
                {
                    "text": text,
                    "token_ids": token_ids,
                    "prompt_tokens": running.prompt_tokens,
                    "new_tokens": running.new_tokens,
                    "finish_reason": running.finish_reason,
                }
            )
        else:
            click.echo()
