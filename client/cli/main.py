"""The `shardlift` command: its subcommands, and how failures end it.

Exit codes: 0 success, 1 a failure (one line on stderr), 2 a wrong command line, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import sys
from typing import IO, Any

import click

from ... import __version__
from ...proto.v1.errors import ShardliftError, one_line
from .adapter import adapter
from .cache import cache
from .chat import chat
from .convert import convert
from .doctor import doctor
from .ending import TERMINATED, Terminated
from .generate import generate
from .instance import down, up
from .load import load
from .models import list_models, show, unload
from .nodes import drain, list_nodes, undrain
from .plan import plan
from .save import save

INTERRUPTED = 130


class _Failure(click.ClickException):
    """A failure as one line on stderr."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file or sys.stderr)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShardliftError as error:
            raise _Failure(one_line(error)) from None
        except Terminated as ended:
            click.echo(f"SIGTERM: {ended}", err=True)
            raise click.exceptions.Exit(TERMINATED) from None
        except (KeyboardInterrupt, click.Abort):
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shardlift")
def cli() -> None:
    """Loads models into a cluster, shows where they are, and talks to them."""


for command in (
    up,
    down,
    plan,
    load,
    list_models,
    show,
    generate,
    chat,
    adapter,
    save,
    unload,
    cache,
    convert,
    list_nodes,
    drain,
    undrain,
    doctor,
):
    cli.add_command(command)


def main() -> None:
    """The entry point of the `shardlift` command."""
    try:
        cli(prog_name="shardlift")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
