"""`shardlift chat`: a conversation."""

from __future__ import annotations

import sys
from typing import Any

import click

from ...proto.v1.errors import GatewayUnavailableError, ModelNotFoundError, ShardliftError, one_line
from ..handle import RemoteModel
from .common import gateway, open_client
from .sampling import sampling, sampling_arguments


@click.command()
@click.argument("name")
@click.option("--system", help="The system message.")
@sampling
@gateway
def chat(name: str, system: str | None, address: str | None, token_file: str | None, **values: Any) -> None:
    """Talks with the model NAME.

    /reset forgets the conversation; /exit or Ctrl-D leaves; Ctrl-C stops an answer.
    """
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    with open_client(address, token_file) as client:
        model = client.model(name)
        while (line := _read()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/reset":
                    messages = list(start)
                    continue
            messages.append({"role": "user", "content": line})
            answer = _answer(model, messages, sampling_arguments(values))
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    interactive = sys.stdin.isatty()
    while True:
        try:
            if interactive:
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            click.echo()  # drops the line that was being typed


def _answer(model: RemoteModel, messages: list[dict[str, str]], arguments: dict[str, Any]) -> str | None:
    """What the model said, as far as it got; None when that was nothing."""
    answer = ""
    try:
        for piece in model.stream_text(messages, **arguments):
            answer += piece
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except (ModelNotFoundError, GatewayUnavailableError):
        raise  # no further line will fare better
    except ShardliftError as error:
        if not sys.stdin.isatty():
            raise  # a script wants its exit code
        click.echo(f"error: {one_line(error)}", err=True)
        return None
    click.echo()
    return answer or None
