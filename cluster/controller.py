"""The detached actor that owns loads and the registry, with the gateway in front of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..proto.v1.errors import InvalidRequestError, ShardliftError, one_line
from ..worker import logs, tracing
from .auth import read_token
from .gateway import Gateway
from .placement import NAMESPACE

logger = logging.getLogger(__name__)

ACTOR_NAME = "controller"
# Ray gives this resource to the head node alone.
_HEAD_RESOURCE = "node:__internal_head__"
_START_TIMEOUT_S = 170.0


class Controller:
    """Runs the gateway. Restarted by Ray when its process dies; finds the resident models by their workers."""

    async def __init__(  # type: ignore[misc]
        self,
        host: str,
        port: int,
        token_file: str | None,
        page_port: int | None = None,
        log_settings: logs.LogSettings | None = None,
    ) -> None:
        # Asynchronous, which Ray allows, for the sake of the event loop.
        settings = log_settings or logs.LogSettings()
        logs.configure(settings)
        tracing.configure("shardlift-gateway")
        self._gateway = Gateway(read_token(token_file), settings)
        # Not awaited here: answers of other actors don't reach one that is still being constructed. A restarted
        # controller has nobody to ask it for its address, and must come up all the same.
        self._started = asyncio.create_task(self._start(host, port, page_port))

    async def _start(self, host: str, port: int, page_port: int | None) -> str:
        try:
            return await self._gateway.start(host, port, page_port)
        except Exception:
            logger.exception("the gateway could not start on %s:%s", host, port)
            raise

    async def address(self) -> str:
        """Where the gateway serves, once it does. Raises what kept it from that."""
        return await asyncio.shield(self._started)

    async def page(self) -> str:
        """The page's URL; "" where there is none."""
        await asyncio.shield(self._started)
        return self._gateway.page.url

    async def shutdown(self, unload: bool) -> None:
        """Stops serving. Models go with it only if `unload`."""
        await asyncio.gather(self._started, return_exceptions=True)
        await self._gateway.stop(unload=unload)


def start_controller(
    host: str,
    port: int,
    token_file: str | None,
    page_port: int | None = None,
    log_settings: logs.LogSettings | None = None,
) -> tuple[str, str]:
    """The address of this cluster's gateway and the URL of its page, started if there is none. Needs a connection to
    Ray. page_port: as for `Gateway.start`.

    Raises InvalidRequestError where it can't listen.
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
    handle = controller.remote(host, port, token_file, page_port, log_settings)
    try:
        address, page = ray.get([handle.address.remote(), handle.page.remote()], timeout=_START_TIMEOUT_S)
    except (RayTaskError, RayActorError) as error:
        # Ray would go on restarting what can't start.
        ray.kill(handle, no_restart=True)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShardliftError):
            raise cause from None
        raise InvalidRequestError(f"the gateway could not start on {host}:{port}: {_last_line(error)}") from None
    return str(address), str(page)


def stop_controller(*, unload: bool) -> bool:
    """Stops this cluster's gateway; False if there was none."""
    try:
        handle: Any = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    try:
        ray.get(handle.shutdown.remote(unload), timeout=60)
    except RayError as error:
        logger.warning("the gateway did not stop by itself: %s", one_line(error, 200))
    ray.kill(handle, no_restart=True)
    return True


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error:" in line), lines[-1] if lines else "")[:300]
