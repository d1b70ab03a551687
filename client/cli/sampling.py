"""The options of `generate` and `chat` that say how to choose tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from .common import Command

DEFAULT_MAX_NEW_TOKENS = 256

_FIELDS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling(command: Command) -> Command:
    """Adds the options; `sampling_arguments` reads them."""
    options: list[Callable[[Any], Any]] = [
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=DEFAULT_MAX_NEW_TOKENS, show_default=True),
        click.option("--do-sample/--greedy", default=None, help="[default: as the model's generation config says]"),
        click.option("--temperature", type=float),
        click.option("--top-p", type=float),
        click.option("--top-k", type=click.IntRange(min=0)),
        click.option("--min-p", type=click.FloatRange(0, 1), help="Least share of the likeliest token's probability."),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(min=0, min_open=True),
            help="Above 1: less of what was said already.",
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer with this text; may be repeated."),
        click.option("--adapter", multiple=True, help="Compute with this adapter; may be repeated."),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes sampling repeatable."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def sampling_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `RemoteModel.stream`."""
    chosen = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    if values.get("stop"):
        chosen["stop_strings"] = list(values["stop"])
    if values.get("adapter"):
        chosen["adapter"] = list(values["adapter"])
    return {**chosen, "seed": values.get("seed")}
