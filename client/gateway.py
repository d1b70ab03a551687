"""One gateway as the client sees it: where it is, its services, and its failures as shardlift's exceptions."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ..proto.v1 import inference_pb2_grpc, registry_pb2_grpc, status
from ..proto.v1.errors import GatewayUnavailableError, InvalidRequestError
from ..proto.v1.tls import TLS
from . import channel, instance
from .patience import RETRY_S, Patience

# For answers that come from the registry's memory, in seconds.
CALL_TIMEOUT_S = 60.0
# What changes nothing, and may so be asked again.
SAFE = frozenset({"GetModel", "ListModels", "PlanModel", "ListCachedParts", "DescribeCluster", "ListNodes"})
_CLOSE_S = 3.0


class Gateway:
    """A connection to the gateway at `address` ("host:port"), made when first used.

    A gateway that has answered and then is gone is waited for up to `retry_s` seconds: before anything is sent, and by
    what may safely be asked again. Thread-safe. A copy is the same connection. A pickle of it holds the address alone:
    the token, and the files for TLS, are those of the environment where it is unpickled.
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        timeout_s: float = channel.CONNECT_TIMEOUT_S,
        retry_s: float = RETRY_S,
        tls: TLS | None = None,
    ) -> None:
        self.address = channel.normalize(address, tls)
        channel.warn_of_plain_text(self.address, token)
        self.retry_s = retry_s
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connected = False
        self._has_answered = False
        self._closed = False
        self._channel = channel.open_channel(self.address, token, tls)
        self._registry = registry_pb2_grpc.ModelRegistryServiceStub(self._channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __reduce__(self) -> tuple[Callable[[str, float, float], Gateway], tuple[str, float, float]]:
        return reopen, (self.address, self._timeout_s, self.retry_s)

    def __copy__(self) -> Gateway:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Gateway:
        return self

    def connect(self, timeout_s: float | None = None) -> None:
        """Returns once somebody answers. Raises GatewayUnavailableError after a few seconds, and `timeout_s` at most;
        after `retry_s` where the gateway has answered before, and may be on its way up again."""
        with self._lock:
            patience = Patience(connect_limit_s(self._timeout_s, self.retry_s, timeout_s, self._has_answered))
            while not self._connected or self._closed:
                if self._closed:
                    raise InvalidRequestError("this client is closed: connect again")
                try:
                    channel.wait_ready(self._channel, self.address, patience.left_s)
                    self._connected = self._has_answered = True
                except GatewayUnavailableError:
                    # It may have come up, and gone again before it had answered.
                    pause_s = patience.pause_s() if self._has_answered else None
                    if pause_s is None or self._closed:
                        raise
                    time.sleep(pause_s)

    def close(self) -> None:
        """Ends the connection and whatever runs over it. Calling it again does nothing."""
        # Not under the lock, which whoever waits for the gateway holds.
        self._closed = True
        # In a thread, for grpc waits for ever if Ctrl-C came while it was starting a call; what is then left of the
        # connection ends with the process.
        closing = threading.Thread(target=self._channel.close, name="close-channel", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def ask(self, method: str, request: Any, timeout_s: float | None = CALL_TIMEOUT_S) -> Any:
        """The registry's answer to `request`. Raises what the gateway raised."""
        self.connect(timeout_s)  # nothing is sent before
        if method not in SAFE:
            return self._ask(method, request, timeout_s)
        patience = Patience(self.retry_s if timeout_s is None else min(self.retry_s, timeout_s))
        while True:
            try:
                return self._ask(method, request, timeout_s)
            except GatewayUnavailableError as error:
                self.wait_for_return(patience, error)

    def _ask(self, method: str, request: Any, timeout_s: float | None) -> Any:
        with self.errors():
            return getattr(self._registry, method)(request, timeout=timeout_s)

    def wait_for_return(self, patience: Patience, lost: GatewayUnavailableError) -> None:
        """Returns when the gateway answers again. Raises `lost` when `patience` is over."""
        while (pause_s := patience.pause_s()) is not None:
            time.sleep(pause_s)
            try:
                self.connect(patience.left_s)
            except GatewayUnavailableError:
                continue
            return
        raise lost

    def registry_stream(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """The call of a streaming method of ModelRegistryService; read it inside `errors()`."""
        self.connect()
        return getattr(self._registry, method)(request, timeout=timeout_s)

    def inference_stream(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """The call of a streaming method of InferenceService; read it inside `errors()`."""
        self.connect(timeout_s)
        return getattr(self._inference, method)(request, timeout=timeout_s)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raises gRPC's errors as shardlift's."""
        try:
            yield
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self._connected = False  # it may be on its way up again: the next call waits for it
            raise status.from_rpc_error(error, self.address) from None


def connect_limit_s(timeout_s: float, retry_s: float, wanted_s: float | None, has_answered: bool) -> float:
    """How long to wait for a gateway that isn't connected."""
    limit_s = max(timeout_s, retry_s) if has_answered else timeout_s
    return limit_s if wanted_s is None else min(limit_s, wanted_s)


def target(address: str | None, token: str | None, *, start: bool, tls: TLS | None = None) -> tuple[str, str | None]:
    """Address and token of the gateway at `address`, else at $SHARDLIFT_ADDRESS, else of the local instance.

    `start` may start the latter. Raises GatewayUnavailableError when there is none.
    """
    found = address or os.environ.get("SHARDLIFT_ADDRESS")
    if not found:
        # One that doesn't answer just now may be on its way up again: the connection waits for it, and names it.
        local = instance.find_or_start() if start else instance.find() or instance.recorded()
        if local is None:
            raise GatewayUnavailableError(
                "no gateway is known: pass address=, set SHARDLIFT_ADDRESS, or start one with `shardlift up`"
            )
        # What it speaks is known, whatever the environment says of others.
        found = channel.as_recorded(local.address)
        token = token or own_token() or local.token
    found = channel.normalize(found, tls)
    return found, token or token_for(found)


def resolve(
    address: str | None,
    token: str | None,
    *,
    start: bool,
    timeout_s: float,
    retry_s: float = RETRY_S,
    tls: TLS | None = None,
) -> Gateway:
    """The gateway that `target` names. Raises GatewayUnavailableError when there is none, or none answers."""
    gateway = Gateway(*target(address, token, start=start, tls=tls), timeout_s, retry_s, tls)
    try:
        gateway.connect()
    except BaseException:
        gateway.close()
        raise
    return gateway


def reopen(address: str, timeout_s: float = channel.CONNECT_TIMEOUT_S, retry_s: float = RETRY_S) -> Gateway:
    """The gateway at `address`, with the token that this process finds for it."""
    return Gateway(address, token_for(address), timeout_s, retry_s)


def own_token() -> str | None:
    """$SHARDLIFT_TOKEN, if it says anything; without the line end that a Secret made from a file has."""
    return os.environ.get("SHARDLIFT_TOKEN", "").strip() or None


def token_for(address: str) -> str | None:
    """The token that this process finds for the gateway at `address`."""
    if token := own_token():
        return token
    local = instance.recorded()
    return local.token if local is not None and channel.is_same(local.address, address) else None
