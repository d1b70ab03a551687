"""Options that several commands share, and what they make of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ...proto.v1.errors import one_line
from ..connection import Client, connect, connect_or_start

Command = TypeVar("Command", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """A number of seconds, of a day at most; over 0 where `min_open`."""

    def __init__(self, *, min_open: bool = False) -> None:
        super().__init__(0, 86_400, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):  # of which no comparison says that it is out of range
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


def print_json(values: Mapping[str, Any] | list[Any]) -> None:
    """Prints `values` as JSON on stdout."""
    click.echo(json.dumps(values, indent=2, ensure_ascii=False))


def as_json(command: Command) -> Command:
    """Adds --json."""
    return click.option("--json", "json_", is_flag=True, help="Print JSON.")(command)


def gateway(command: Command) -> Command:
    """Adds the options that say which gateway to ask: `address` and `token_file`."""
    for option in (
        click.option(
            "--token-file",
            type=click.Path(exists=True, dir_okay=False),
            help="File with the gateway's token. [default: $SHARDLIFT_TOKEN]",
        ),
        click.option(
            "--address", help="The gateway, as host:port. [default: $SHARDLIFT_ADDRESS, or the local instance]"
        ),
    ):
        command = option(command)
    return command


def open_client(address: str | None, token_file: str | None, *, start: bool = False) -> Client:
    """The client for `gateway`'s options; `start` allows to start the local instance."""
    token = read_secret(token_file)
    return connect_or_start(address, token) if start else connect(address, token)


def checkpoint(command: Command) -> Command:
    """Adds the options that say what to load, and how; `checkpoint_arguments` reads them."""
    for option in reversed(_CHECKPOINT_OPTIONS):
        command = option(command)
    return command


def checkpoint_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Client.plan` and `Client.load` for what `checkpoint` added to the command line."""
    arguments: dict[str, Any] = {name: values[name] for name in _AS_GIVEN if values.get(name) is not None}
    if values.get("device_map") is not None:
        arguments["device_map"] = _name_or_json(values["device_map"], "--device-map")
    if values.get("max_memory"):
        arguments["max_memory"] = _limits(values["max_memory"])
    if (quantization := _quantization(values)) is not None:
        arguments["quantization_config"] = quantization
    if (token := read_secret(values.get("hf_token_file"))) is not None:
        arguments["token"] = token
    return arguments


_CHECKPOINT_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--revision", help="Branch, tag or commit. [default: main]"),
    click.option("--subfolder", help="Folder of the checkpoint inside the repository."),
    click.option("--variant", help='"fp16" selects model.fp16.safetensors and the like.'),
    click.option("--dtype", help="A torch dtype's name. [default: \"auto\", the checkpoint's own]"),
    click.option("--load-in-4bit", is_flag=True, help="Quantize to 4 bits with bitsandbytes."),
    click.option("--load-in-8bit", is_flag=True, help="Quantize to 8 bits with bitsandbytes."),
    click.option("--bnb-4bit-quant-type", type=click.Choice(["fp4", "nf4"]), help="[default: fp4]"),
    click.option("--bnb-4bit-use-double-quant", is_flag=True, help="Quantize the scales, too."),
    click.option("--bnb-4bit-compute-dtype", help="[default: float32]"),
    click.option("--bnb-4bit-quant-storage", help="[default: uint8]"),
    click.option(
        "--quantize-experts/--no-quantize-experts",
        default=None,
        help="Quantize a mixture's experts, too. [default: with --load-in-4bit, where it is possible]",
    ),
    click.option(
        "--requantize",
        is_flag=True,
        default=None,
        help="Quantize anew what the checkpoint holds quantized (with --load-in-4bit or --load-in-8bit).",
    ),
    click.option(
        "--dequantize",
        is_flag=True,
        default=None,
        help="Unpack what the checkpoint holds packed (GPTQ, AWQ, FP8, …), also where it could stay so.",
    ),
    click.option("--reserve-tokens", type=click.IntRange(min=0), help="Tokens whose keys and values must have room."),
    click.option("--num-stages", type=click.IntRange(min=1), help="[default: as many as the plan needs]"),
    click.option(
        "--device-map",
        help='"auto", "balanced", "balanced_low_0", "sequential", "cpu", or a JSON object from module to device.',
    ),
    click.option(
        "--max-memory", multiple=True, metavar="DEVICE=BYTES", help="Limit of a device, e.g. 0=20GiB; or a JSON object."
    ),
    click.option("--attn-implementation", help='"sdpa", "eager", "flash_attention_2", …'),
    click.option("--experts-implementation", help='How a mixture\'s experts are computed: "eager", "grouped_mm", …'),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run the checkpoint's own code."),
    click.option("--cache-dir", help="Folder for the Hub's files, where the gateway runs."),
    click.option(
        "--local-files-only",
        is_flag=True,
        default=None,
        help="Ask no Hub: read what its cache on each node holds.",
    ),
    click.option(
        "--hf-token-file",
        type=click.Path(exists=True, dir_okay=False),
        help="File with the Hub token. [default: $HF_TOKEN, for a gateway on this machine]",
    ),
]

_AS_GIVEN = (
    "revision",
    "subfolder",
    "variant",
    "cache_dir",
    "trust_remote_code",
    "local_files_only",
    "num_stages",
    "reserve_tokens",
    "dtype",
    "attn_implementation",
    "experts_implementation",
    "quantize_experts",
    "requantize",
    "dequantize",
)
_BNB_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def _quantization(values: Mapping[str, Any]) -> dict[str, Any] | None:
    details = {name: values[name] for name in _BNB_4BIT if values.get(name)}
    in_4bit, in_8bit = bool(values.get("load_in_4bit")), bool(values.get("load_in_8bit"))
    if in_4bit and in_8bit:
        raise click.UsageError("--load-in-4bit and --load-in-8bit can't both be given.")
    if details and not in_4bit:
        raise click.UsageError(f"--{next(iter(details)).replace('_', '-')} needs --load-in-4bit.")
    if values.get("quantize_experts") and not in_4bit:
        raise click.UsageError("--quantize-experts needs --load-in-4bit.")
    if values.get("requantize") and not in_4bit and not in_8bit:
        raise click.UsageError("--requantize needs --load-in-4bit or --load-in-8bit.")
    if not in_4bit and not in_8bit:
        return None
    return {"quant_method": "bitsandbytes", "load_in_4bit": in_4bit, "load_in_8bit": in_8bit, **details}


def _name_or_json(text: str, option: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option} is no valid JSON: {error}.") from None


def _limits(texts: tuple[str, ...]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            limits.update(_name_or_json(text, "--max-memory"))
            continue
        device, equals, limit = text.partition("=")
        if not device or not equals or not limit:
            raise click.UsageError(f"--max-memory {text!r} is not of the form DEVICE=BYTES.")
        limits[device] = limit
    return limits


def read_secret(path: str | None) -> str | None:
    """What the file holds, if one is named. An empty one is refused: another token than the one asked for must not take
    its place."""
    if path is None:
        return None
    try:
        secret = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path} can't be read: {one_line(error)}.") from None
    if not secret:
        raise click.UsageError(f"{path} is empty: write the token into it, or leave the option out.")
    return secret
