"""`shardlift save`: a resident model as a checkpoint folder, and onto the Hub."""

from __future__ import annotations

import click

from ..render import SaveLines
from .common import as_json, gateway, open_client, print_json, read_secret


@click.command()
@click.argument("name")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--max-shard-size", default="50GB", show_default=True, help="Of one file.")
@click.option("--variant", help='"fp16" gives model.fp16.safetensors and the like.')
@click.option(
    "--shared/--streamed",
    "shared",
    default=None,
    help="Have the workers write, or their bytes sent here. [default: they write where they all see DIRECTORY]",
)
@click.option(
    "--keep-quantized-experts", is_flag=True, help="Leave single experts in 4 bits, which shardlift alone can load."
)
@click.option("--adapter", metavar="NAME", help="Save this adapter of the model alone.")
@click.option("--push-to-hub", "repo_id", metavar="REPO", help="Commit the files to this repository of the Hub, too.")
@click.option("--private", is_flag=True, default=None, help="Make that repository a private one, if it has to be made.")
@click.option("--revision", help="Its branch. [default: main]")
@click.option(
    "--hf-token-file",
    type=click.Path(exists=True, dir_okay=False),
    help="File with the Hub token that may write there. [default: $HF_TOKEN]",
)
@gateway
@as_json
def save(
    name: str,
    directory: str,
    max_shard_size: str,
    variant: str | None,
    shared: bool | None,
    keep_quantized_experts: bool,
    adapter: str | None,
    repo_id: str | None,
    private: bool | None,
    revision: str | None,
    hf_token_file: str | None,
    address: str | None,
    token_file: str | None,
    json_: bool,
) -> None:
    """Saves the model NAME into DIRECTORY, as it is quantized; transformers' from_pretrained loads it from there.

    A model's adapters are not saved with it; with --adapter one of them is saved in its place, as peft has it.
    Ctrl-C ends it and leaves nothing behind.
    """
    if repo_id is None and (private or revision or hf_token_file):
        raise click.UsageError("--private, --revision and --hf-token-file need --push-to-hub.")
    with open_client(address, token_file) as client, SaveLines() as lines:
        model = client.model(name)
        if adapter is not None:
            model.set_adapter(adapter)
        else:
            model.disable_adapters()
        model.save_pretrained(
            directory,
            push_to_hub=repo_id is not None,
            max_shard_size=max_shard_size,
            variant=variant,
            shared=shared,
            dequantize_experts=not keep_quantized_experts,
            on_progress=lines.show,
            repo_id=repo_id,
            private=private,
            revision=revision,
            token=read_secret(hf_token_file),
        )
    if json_:
        print_json({"name": name, "directory": directory, "repo_id": repo_id})
    else:
        click.echo(f"saved {name} in {directory}" + (f" and {repo_id}" if repo_id else ""))
