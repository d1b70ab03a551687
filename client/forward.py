"""Forward passes: one that leaves nothing behind, or those of a session, whose KV cache lives on the workers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..proto.v1 import inference_pb2
from ..proto.v1.errors import GatewayUnavailableError, InternalError, InvalidRequestError
from ..proto.v1.wire import Assembly
from . import tensors
from .adapters import say
from .cache import CacheRecord
from .deadline import Deadline
from .gateway import Gateway
from .patience import Patience
from .session_call import SessionCall

if TYPE_CHECKING:
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithPast

# What forward takes in transformers and the gateway does not: any value but these is refused.
_NOT_FORWARDED = ("inputs_embeds", "output_attentions", "output_hidden_states", "cache_position")


def request(
    model: str,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    *,
    logits_to_keep: int = 0,
    use_cache: bool = False,
    others: Mapping[str, Any] | None = None,
    adapters: inference_pb2.AdapterChoice | None = None,
) -> inference_pb2.ForwardRequest:
    """The request for one pass. `others`: what else a caller passed. Raises InvalidRequestError."""
    for name, value in (others or {}).items():
        if name in _NOT_FORWARDED:
            if value is not None and value is not False:
                raise InvalidRequestError(f"{name} is not available on a remote model")
        elif name != "token_type_ids":
            raise InvalidRequestError(f"{name} is no argument of a remote model's forward")
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise InvalidRequestError(f"logits_to_keep is {logits_to_keep!r}: a number of positions is needed")
    if input_ids is None:
        raise InvalidRequestError("input_ids is needed")
    asked = inference_pb2.ForwardRequest(
        model=model,
        input_ids=tensors.integers(input_ids, "input_ids"),
        attention_mask=None if attention_mask is None else tensors.mask(attention_mask, "attention_mask"),
        position_ids=None if position_ids is None else tensors.integers(position_ids, "position_ids"),
        logits_to_keep=logits_to_keep,
        use_cache=use_cache,
    )
    say(asked, adapters)
    tensors.check_request_size(asked.input_ids, asked.attention_mask, asked.position_ids)
    return asked


def output(
    assembly: Assembly, cache: Any, return_dict: bool | None, labels: torch.Tensor | None = None
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    """A pass's logits and cache as transformers' models give them, and the loss where there are labels."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    logits, loss = tensors.to_torch(assembly), None
    if labels is not None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        loss = ForCausalLMLoss(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
    return result.to_tuple() if return_dict is False else result


def once(gateway: Gateway, asked: inference_pb2.ForwardRequest, deadline: Deadline | None = None) -> Assembly:
    """The logits of one pass that leaves nothing behind, and so may be asked for again where the gateway is lost."""
    patience = Patience(gateway.retry_s)
    while True:
        left_s = None if deadline is None else deadline.left_s
        try:
            return _once(gateway, asked, left_s)
        except GatewayUnavailableError as error:
            gateway.wait_for_return(patience.within(left_s), error)


def _once(gateway: Gateway, asked: inference_pb2.ForwardRequest, timeout_s: float | None) -> Assembly:
    call = gateway.inference_stream("Forward", iter([asked]), timeout_s)
    try:
        assembly = Assembly(part(_next(gateway, call), "logits").logits)
        while not assembly.complete:
            assembly.add(part(_next(gateway, call), "more").more)
        if _next(gateway, call) is not None:
            raise InternalError("the gateway went on after the end of a forward pass")
        return assembly
    finally:
        call.cancel()


def part(response: inference_pb2.ForwardResponse | None, name: str) -> inference_pb2.ForwardResponse:
    """`response` itself. Raises InternalError where it has no `name`."""
    if response is None or response.WhichOneof("part") != name:
        raise InternalError(f"the gateway ended a forward pass where {name!r} was due")
    return response


def _next(gateway: Gateway, call: Any) -> inference_pb2.ForwardResponse | None:
    with gateway.errors():
        return next(call, None)


class RemoteCache(CacheRecord):
    """Keys and values of a session, on the model's workers: what `past_key_values` is for a remote model.

    It grows with each pass that it is given to. Freed by `close()`, by the end of a `with` block, or when nothing
    refers to it any more. Thread-safe: passes of one cache are taken one after another.
    """

    def __init__(self, gateway: Gateway, model: str, idle_timeout_s: float | None = None) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._session = SessionCall(gateway, model, idle_timeout_s)

    def __enter__(self) -> RemoteCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a RemoteCache belongs to an open call and can't be pickled or copied")

    @property
    def closed(self) -> bool:
        return self._session.closed

    def close(self) -> None:
        """Frees the keys and values. Calling it again does nothing."""
        self._session.close()

    def step(self, asked: inference_pb2.ForwardRequest) -> Assembly:
        """The logits of one pass. Any failure of it ends the session, but for a refusal before anything is computed."""
        with self._lock:
            if self.closed:
                raise InvalidRequestError("this cache is closed: start again from the whole prompt")
            rows, new = asked.input_ids.shape
            action = self._prepared(rows)
            action.forward.CopyFrom(asked)
            try:
                assembly, state = self._session.forward(action)
                self._done(state, self._length + new, rows)
            except BaseException:
                if not self._session.was_refused:
                    self.close()
                raise
            return assembly
