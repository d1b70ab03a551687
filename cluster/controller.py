"""The detached actor that owns loads and the registry, with the gateway in front of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..proto.v1.errors import InvalidRequestError, ShardliftError, one_line
from ..worker import logs, tracing
from .gateway import Gateway
from .gateway_options import GatewayOptions
from .placement import NAMESPACE

logger = logging.getLogger(__name__)

ACTOR_NAME = "controller"
# Ray gives this resource to the head node alone.
_HEAD_RESOURCE = "node:__internal_head__"
_START_TIMEOUT_S = 170.0
# A stop takes the grace, and then what giving back takes.
_STOP_TIMEOUT_S = 30.0


class Controller:
    """Runs the gateway. Restarted by Ray when its process dies; finds the resident models by their workers."""

    async def __init__(self, options: GatewayOptions) -> None:  # type: ignore[misc]
        # Asynchronous, which Ray allows, for the sake of the event loop.
        logs.configure(options.log)
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

    async def shutdown(self, unload: bool) -> None:
        """Stops serving, with its grace for what is under way. Models go with it only if `unload`. Whoever else asks
        for it waits for the same end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(unload))
        await asyncio.shield(self._stopping)

    async def _stop(self, unload: bool) -> None:
        await asyncio.gather(self._started, return_exceptions=True)
        await self._gateway.stop(unload=unload, grace_s=self._options.grace_s)


def start_controller(options: GatewayOptions) -> tuple[str, GatewayOptions, str]:
    """The address of this cluster's gateway, started if there is none, what it was started with, and the URL of its
    page, "" where it has none. Needs a connection to Ray.

    Raises InvalidRequestError where it can't listen, and where one runs without the protection that is asked for.
    """
    controller = ray.remote(Controller).options(
        name=ACTOR_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        resources={_HEAD_RESOURCE: 0.001},
        max_restarts=-1,
        max_concurrency=1000,
    )
    handle = controller.remote(options)
    try:
        asked = [handle.address.remote(), handle.settings.remote(), handle.page.remote()]
        address, actual, page = ray.get(asked, timeout=_START_TIMEOUT_S)
    except (RayTaskError, RayActorError) as error:
        # Ray would go on restarting what can't start.
        ray.kill(handle, no_restart=True)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShardliftError):
            raise cause from None
        raise InvalidRequestError(
            f"the gateway could not start on {options.host}:{options.port}: {_last_line(error)}"
        ) from None
    if lacking := options.lacking(actual):
        raise InvalidRequestError(
            f"a gateway already runs at {address}, with other settings of {', '.join(lacking)}: run `shardlift down` "
            "first, which leaves the models of a cluster, or leave them out"
        )
    return str(address), actual, str(page)


def stop_controller(*, unload: bool) -> bool:
    """Stops this cluster's gateway; False if there was none."""
    try:
        handle: Any = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    try:
        settings: GatewayOptions = ray.get(handle.settings.remote(), timeout=_STOP_TIMEOUT_S)
        ray.get(handle.shutdown.remote(unload), timeout=settings.grace_s + _STOP_TIMEOUT_S)
    except RayError as error:
        logger.warning("the gateway did not stop by itself: %s", one_line(error, 200))
    ray.kill(handle, no_restart=True)
    return True


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error:" in line), lines[-1] if lines else "")[:300]
