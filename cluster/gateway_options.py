"""What the operator of a gateway decides, from `shardlift up` to the actor. Paths of secrets, and no secret."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..proto.v1.tls import TLS
from ..worker.logs import LogSettings

# Kubernetes ends a pod within terminationGracePeriodSeconds.
GRACE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """host, port: to listen on; port 0 takes a free one. token_file: with the token that calls need; None for none.

    tls: the gateway's own; with a CA, clients need a certificate. health_host, health_port: where a gateway with TLS
    says in plain text whether it serves, and nothing else. stage_tls: the stages', whose files lie on every node.
    allow_remote_code: whether a request with trust_remote_code=True is listened to. page_port: of the page; None takes
    the one after the gateway's, or does without where that is taken; a negative one does without. log: of gateway and
    workers. log_file: for the gateway's lines, beside its stderr. grace_s: for calls under way when the gateway is told
    to stop.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token_file: str | None = None
    tls: TLS | None = None
    health_host: str = "127.0.0.1"
    health_port: int = 0
    stage_tls: TLS | None = None
    allow_remote_code: bool = False
    page_port: int | None = None
    log: LogSettings = LogSettings()  # noqa: RUF009 - a value
    log_file: str | None = None
    grace_s: float = GRACE_S

    def lacking(self, actual: GatewayOptions, explicit: Collection[str] = ()) -> list[str]:
        """Flags that are asked for here, and that a gateway which runs already has otherwise.

        explicit: fields of where it listens that somebody has asked for: whoever didn't takes any. Port 0 is any, too.
        """
        wanted: list[tuple[str, object, object]] = [
            ("--tls-cert", self.tls, actual.tls),
            ("--stage-tls-cert", self.stage_tls, actual.stage_tls),
            ("--allow-remote-code", self.allow_remote_code, actual.allow_remote_code),
        ]
        if "host" in explicit:
            wanted.append(("--host", self.host, actual.host))
        for field in ("port", "health_port"):
            if field in explicit:
                wanted.append((f"--{field.replace('_', '-')}", getattr(self, field), getattr(actual, field)))
        lacking = [flag for flag, asked, has in wanted if asked and asked != has]
        if "page_port" in explicit and not _is_page(self.page_port, actual):
            lacking.append("--page-port")
        return lacking


def _is_page(asked: int | None, actual: GatewayOptions) -> bool:
    """Whether the page is where it is asked for: at any port (0), at none (below), at this one."""
    port = actual.port + 1 if actual.page_port is None else actual.page_port
    if asked is None:
        return True
    if asked <= 0:
        return (port >= 0) is (asked == 0)
    return port == asked
