"""The detached actor that owns loads and the registry, with the gateway in front of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from ..proto.v1.errors import GatewayUnavailableError, InvalidRequestError, ShardliftError, one_line
from ..worker import logs, tracing
from .auth import fingerprint
from .gateway import Gateway
from .gateway_options import GatewayOptions
from .placement import NAMESPACE

logger = logging.getLogger(__name__)

ACTOR_NAME = "controller"
# Ray gives this resource to the head node alone.
_HEAD_RESOURCE = "node:__internal_head__"
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SHARDLIFT_TOKEN")
_START_TIMEOUT_S = 170.0
# A stop takes the grace, and then what giving back takes.
_STOP_TIMEOUT_S = 30.0


class Controller:
    """Runs the gateway. Restarted by Ray when its process dies; finds the resident models by their workers."""

    async def __init__(self, options: GatewayOptions) -> None:  # type: ignore[misc]
        # Asynchronous, which Ray allows, for the sake of the event loop.
        logs.configure(options.log, file=options.log_file)
        tracing.configure("shardlift-gateway")
        self._options = options
        self._stopping: asyncio.Task[None] | None = None
        self._gateway = Gateway(options)
        # Not awaited here: answers of other actors don't reach one that is still being constructed. A restarted
        # controller has nobody to ask it for its address, and must come up all the same.
        self._started = asyncio.create_task(self._start())

    async def _start(self) -> str:
        try:
            return await self._gateway.start()
        except Exception:
            logger.exception("the gateway could not start on %s:%s", self._options.host, self._options.port)
            raise

    async def address(self) -> str:
        """Where the gateway serves, once it does. Raises what kept it from that."""
        return await asyncio.shield(self._started)

    async def settings(self) -> GatewayOptions:
        """What it was started with."""
        return self._options

    async def page(self) -> str:
        """The page's URL; "" where there is none."""
        await asyncio.shield(self._started)
        return self._gateway.page.url

    async def warnings(self) -> list[str]:
        """What whoever starts it should know, one line each."""
        await asyncio.shield(self._started)
        return self._gateway.warnings

    async def has_token(self, salt: bytes, print_: bytes) -> bool:
        """Whether the gateway wants the token that `print_` is the fingerprint of (auth.py)."""
        return self._gateway.has_token(salt, print_)

    async def shutdown(self, unload: bool) -> None:
        """Stops serving, with its grace for what is under way. Models go with it only if `unload`. Whoever else asks
        for it waits for the same end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(unload))
        await asyncio.shield(self._stopping)

    async def _stop(self, unload: bool) -> None:
        await asyncio.gather(self._started, return_exceptions=True)
        await self._gateway.stop(unload=unload, grace_s=self._options.grace_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A gateway that serves. options: what it was started with. page: its URL, "" where there is none. warnings: what
    whoever starts it should know, one line each."""

    address: str
    options: GatewayOptions
    page: str
    warnings: Sequence[str]
    handle: Any

    def has_token(self, token: str) -> bool:
        """Whether it wants this very token, which stays here."""
        salt = secrets.token_bytes(16)
        asked = self.handle.has_token.remote(salt, fingerprint(token, salt))
        return bool(ray.get(asked, timeout=_START_TIMEOUT_S))


def running_controller() -> Running | None:
    """This cluster's gateway, once it serves; None where there is none. Needs a connection to Ray.

    Raises GatewayUnavailableError for one that doesn't answer, and what kept it from serving.
    """
    try:
        handle = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
        return _ask(handle)
    except (ValueError, ActorDiedError):
        return None


def start_controller(options: GatewayOptions) -> Running:
    """This cluster's gateway, started as `options` say if there is none. Needs a connection to Ray.

    Raises InvalidRequestError where it can't listen.
    """
    others = _secrets_of_this_job()
    controller = ray.remote(Controller).options(
        name=ACTOR_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources={_HEAD_RESOURCE: 0.001},
        max_restarts=-1,
        max_concurrency=1000,
        **({"runtime_env": {"env_vars": dict.fromkeys(others, "")}} if others else {}),
    )
    handle = controller.remote(options)
    try:
        return _ask(handle)
    except RayActorError as error:
        # Ray would go on restarting what can't start.
        ray.kill(handle, no_restart=True)
        raise InvalidRequestError(
            f"the gateway could not start on {options.host}:{options.port}: {_last_line(error)}"
        ) from None


def _secrets_of_this_job() -> list[str]:
    """Variables with secrets that this process's job has of its own (`runtime_env`). Ray hands them to what the job
    starts, and that to what it starts: a gateway that outlives the job would go on with its Hub token for everybody."""
    given: dict[str, str] = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return [name for name in _SECRETS if given.get(name)]


def _ask(handle: Any) -> Running:
    asked = [handle.address.remote(), handle.settings.remote(), handle.page.remote(), handle.warnings.remote()]
    try:
        address, actual, page, warnings = ray.get(asked, timeout=_START_TIMEOUT_S)
    except RayTaskError as error:
        # It is there, and serves nobody: the next start must not find it.
        ray.kill(handle, no_restart=True)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShardliftError):
            raise cause from None
        raise InvalidRequestError(f"the gateway could not start: {_last_line(error)}") from None
    except (ActorUnavailableError, GetTimeoutError) as error:
        raise GatewayUnavailableError(f"this cluster's gateway does not answer: {_last_line(error)}") from None
    return Running(address=str(address), options=actual, page=str(page), warnings=warnings, handle=handle)


def stop_controller(*, unload: bool) -> str | None:
    """Stops this cluster's gateway; gives the address that it was asked to serve at, None if there was none."""
    try:
        handle: Any = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return None
    address = "where it did not say"
    try:
        settings: GatewayOptions = ray.get(handle.settings.remote(), timeout=_STOP_TIMEOUT_S)
        address = f"{settings.host}:{settings.port}"
        ray.get(handle.shutdown.remote(unload), timeout=settings.grace_s + _STOP_TIMEOUT_S)
    except RayError as error:
        logger.warning("the gateway did not stop by itself: %s", one_line(error, 200))
    ray.kill(handle, no_restart=True)
    return address


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error:" in line), lines[-1] if lines else "")[:300]
