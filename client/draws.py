"""torch's global generator, drawn from by generations that run elsewhere as if they ran here."""

from __future__ import annotations

import hashlib
import threading

from ..proto.v1 import generator_state, inference_pb2
from ..proto.v1.errors import InternalError, InvalidRequestError

# Reentrant: what the garbage collector closes, it may close in the middle of this.
_lock = threading.RLock()


class Draws:
    """One generation's turn with the generator, whose state goes along with its request, and comes back at its end.

    Meanwhile the generator is in another state, made from that one: generations that run at once, and whatever else
    draws here, so get numbers of their own. Where that has happened, the generator goes on from there.
    """

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        import torch

        with _lock:
            self._generator = torch.default_generator
            self._before = self._generator.get_state()
            request.generator_state = generator_state.taken_from(self._generator)
            digest = hashlib.sha256(request.generator_state).digest()
            self._generator.manual_seed(int.from_bytes(digest[:8], "little"))
            self._meanwhile = self._generator.get_state()

    def over(self, state: bytes = b"") -> None:
        """Takes the state that the workers left; none where nothing was drawn. Raises InternalError for no state."""
        with _lock:
            if not self._generator.get_state().equal(self._meanwhile):
                return
            self._generator.set_state(self._before)
            if not state:
                return
            try:
                generator_state.put_into(self._generator, state)
            except InvalidRequestError as error:
                raise InternalError(f"the gateway sent what is no generator's state: {error}") from None
