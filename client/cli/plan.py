"""`shardlift plan`: where a model would go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from google.protobuf import json_format

from ...proto.v1 import registry_pb2, status
from ...proto.v1.errors import InternalError
from .. import options
from ..hub_token import hub_token
from ..instance import last_json_line
from ..plan_svg import plan_svg
from ..render import show_plan
from ..values import Plan
from .common import as_json, checkpoint, checkpoint_arguments, gateway, open_client, print_json


@click.command()
@click.argument("path")
@checkpoint
@click.option(
    "--devices", help="Plan without a cluster, for devices such as 8x80GiB, or those of a topology file (JSON)."
)
@click.option(
    "--link-speed", help="From the source to each node, e.g. 1.2GB/s or 10Gbit/s. [default: as last measured]"
)
@click.option("--svg", type=click.Path(dir_okay=False), help="Also draw the cluster with the model laid over it.")
@gateway
@as_json
def plan(
    path: str,
    devices: str | None,
    svg: str | None,
    link_speed: str | None,
    address: str | None,
    token_file: str | None,
    json_: bool,
    **values: Any,
) -> None:
    """Works out which layers of the checkpoint PATH would go where, from its headers alone."""
    arguments = checkpoint_arguments(values)
    if link_speed is not None:
        arguments["link_speed"] = link_speed
    if devices is None:
        with open_client(address, token_file) as client:
            found = client.plan(path, **arguments)
    else:
        found = _offline(path, devices, arguments)
    if svg is not None:
        try:
            Path(svg).write_text(plan_svg(found), encoding="utf-8")
        except OSError as error:
            raise click.UsageError(f"the picture can't be written to {svg}: {error.strerror}.") from None
    if json_:
        print_json(found.to_dict())
    else:
        show_plan(found)


def _offline(path: str, devices: str, arguments: dict[str, Any]) -> Plan:
    names = ("revision", "subfolder", "variant", "cache_dir", "trust_remote_code", "local_files_only")
    where = {name: arguments.pop(name) for name in names if name in arguments}
    token = hub_token(arguments.pop("token", None), "localhost:0")  # it goes to a child of this process alone
    request = {
        "source": _as_dict(options.source(path, token=token, **where)),
        "options": _as_dict(options.load_options(**arguments)),
        "devices": _topology(devices),
    }
    command = [sys.executable, "-m", "shardlift.cluster.offline", "--json"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    answer = _json(done.stdout)
    if answer is None or (done.returncode != 0 and "error" not in answer):
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise InternalError(f"the planner ended with {done.returncode}: {last[:300]}")
    if "error" in answer:
        raise status.from_reason(str(answer["error"]), str(answer.get("message", "")))
    return Plan.from_proto(json_format.ParseDict(answer, registry_pb2.Plan(), ignore_unknown_fields=True))


def _as_dict(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return last_json_line(text)
    return value if isinstance(value, dict) else None


def _topology(devices: str) -> Any:
    if not Path(devices).is_file():
        return devices
    try:
        return json.loads(Path(devices).read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.UsageError(f"the topology file {devices} is no valid JSON: {error}.") from None
