"""`shardlift doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import click

from .. import doctor as examination
from ..nodes import Finding
from ..render import finding_lines
from .common import Seconds, as_json, gateway, print_json, read_secret


@click.command()
@click.option("--ray-address", help="Also examine the nodes of this Ray cluster, without a gateway.")
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="For each node's answers.",
)
@gateway
@as_json
def doctor(ray_address: str | None, timeout_s: float, address: str | None, token_file: str | None, json_: bool) -> None:
    """Examines this machine, the way to the gateway, and every node behind it: each check with a verdict and a remedy.

    Exit code 0 unless something fails; a warning is no failure. Nothing is changed, and no model is disturbed but for
    the seconds of some CPU time.
    """

    def findings() -> Iterator[Finding]:
        yield from examination.here()
        yield from examination.gateway_and_nodes(address, read_secret(token_file), timeout_s)
        if ray_address is not None:
            yield from examination.ray_cluster(ray_address, timeout_s)

    found = []
    for finding in findings():
        found.append(finding)
        if not json_:
            for line in finding_lines(finding):
                click.echo(line)
    counts = Counter(finding.verdict for finding in found)
    if json_:
        print_json({"ok": not counts["fail"], "findings": [finding.to_dict() for finding in found]})
    else:
        click.echo(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    if counts["fail"]:
        raise click.exceptions.Exit(1)
