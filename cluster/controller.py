"""The detached actor that owns loads and the registry, with the gateway in front of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..proto.v1.errors import InvalidRequestError, ShardliftError, one_line
from .auth import read_token
from .gateway import GRACE_S, Gateway
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

    async def __init__(  # type: ignore[misc]
        self, host: str, port: int, token_file: str | None, grace_s: float = GRACE_S
    ) -> None:
        # Asynchronous, which Ray allows, for the sake of the event loop.
        self._grace_s = grace_s
        self._stopping: asyncio.Task[None] | None = None
        self._gateway = Gateway(read_token(token_file))
        # Not awaited here: answers of other actors don't reach one that is still being constructed. A restarted
        # controller has nobody to ask it for its address, and must come up all the same.
        self._started = asyncio.create_task(self._start(host, port))

    async def _start(self, host: str, port: int) -> str:
        try:
            return await self._gateway.start(host, port)
        except Exception:
            logger.exception("the gateway could not start on %s:%s", host, port)
            raise

    async def address(self) -> str:
        """Where the gateway serves, once it does. Raises what kept it from that."""
        return await asyncio.shield(self._started)

    async def grace_s(self) -> float:
        """For how long a stop lets running calls go on."""
        return self._grace_s

    async def shutdown(self, unload: bool) -> None:
        """Stops serving, with its grace for what is under way. Models go with it only if `unload`. Whoever else asks
        for it waits for the same end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(unload))
        await asyncio.shield(self._stopping)

    async def _stop(self, unload: bool) -> None:
        await asyncio.gather(self._started, return_exceptions=True)
        await self._gateway.stop(unload=unload, grace_s=self._grace_s)


def start_controller(host: str, port: int, token_file: str | None, grace_s: float = GRACE_S) -> str:
    """The address of this cluster's gateway, started if there is none. Needs a connection to Ray.

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
    handle = controller.remote(host, port, token_file, grace_s)
    try:
        return str(ray.get(handle.address.remote(), timeout=_START_TIMEOUT_S))
    except (RayTaskError, RayActorError) as error:
        # Ray would go on restarting what can't start.
        ray.kill(handle, no_restart=True)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShardliftError):
            raise cause from None
        raise InvalidRequestError(f"the gateway could not start on {host}:{port}: {_last_line(error)}") from None


def stop_controller(*, unload: bool) -> bool:
    """Stops this cluster's gateway; False if there was none."""
    try:
        handle: Any = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    try:
        grace_s = float(ray.get(handle.grace_s.remote(), timeout=_STOP_TIMEOUT_S))
        ray.get(handle.shutdown.remote(unload), timeout=grace_s + _STOP_TIMEOUT_S)
    except RayError as error:
        logger.warning("the gateway did not stop by itself: %s", one_line(error, 200))
    ray.kill(handle, no_restart=True)
    return True


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error:" in line), lines[-1] if lines else "")[:300]
