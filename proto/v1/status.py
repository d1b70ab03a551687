"""One table between shardlift's exceptions and gRPC statuses, read in both directions."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from . import errors, inference_pb2

DOMAIN = "shardlift"
# A status travels as headers, its message twice and encoded; beyond their limit the caller would see another failure.
_MOST_MESSAGE_BYTES = 3000
_MOST_MODEL_CHARACTERS = 63

# exception -> (google.rpc code, the reason that travels). Subclasses stand for themselves.
_CODES: dict[type[errors.ShardliftError], int] = {
    errors.InvalidRequestError: code_pb2.INVALID_ARGUMENT,
    errors.InvalidDeviceMapError: code_pb2.INVALID_ARGUMENT,
    errors.UnknownArgumentError: code_pb2.INVALID_ARGUMENT,
    errors.CheckpointError: code_pb2.FAILED_PRECONDITION,
    errors.CheckpointNotFoundError: code_pb2.NOT_FOUND,
    errors.GatedCheckpointError: code_pb2.PERMISSION_DENIED,
    errors.CorruptCheckpointError: code_pb2.DATA_LOSS,
    errors.TensorMismatchError: code_pb2.FAILED_PRECONDITION,
    errors.UnsupportedModelError: code_pb2.UNIMPLEMENTED,
    errors.SourceError: code_pb2.UNAVAILABLE,
    errors.SaveError: code_pb2.FAILED_PRECONDITION,
    errors.OutOfMemoryError: code_pb2.RESOURCE_EXHAUSTED,
    errors.ModelNameTakenError: code_pb2.ALREADY_EXISTS,
    errors.ModelNotFoundError: code_pb2.NOT_FOUND,
    errors.ModelUnavailableError: code_pb2.UNAVAILABLE,
    errors.WorkerDiedError: code_pb2.UNAVAILABLE,
    errors.ModelBusyError: code_pb2.RESOURCE_EXHAUSTED,
    errors.SessionExpiredError: code_pb2.ABORTED,
    errors.DeadlineExceededError: code_pb2.DEADLINE_EXCEEDED,
    errors.LoadCancelledError: code_pb2.ABORTED,
    errors.AuthenticationError: code_pb2.UNAUTHENTICATED,
    errors.GatewayUnavailableError: code_pb2.UNAVAILABLE,
    errors.InternalError: code_pb2.INTERNAL,
}
_BY_REASON = {cls.__name__: cls for cls in _CODES}
# Statuses that gRPC itself, or a server that isn't ours, makes without a reason.
_BY_CODE: dict[int, type[errors.ShardliftError]] = {
    code_pb2.INVALID_ARGUMENT: errors.InvalidRequestError,
    code_pb2.UNAUTHENTICATED: errors.AuthenticationError,
    code_pb2.UNAVAILABLE: errors.GatewayUnavailableError,
    code_pb2.RESOURCE_EXHAUSTED: errors.InvalidRequestError,
}


def code_of(error: BaseException) -> int:
    """The google.rpc code for `error`; INTERNAL for what is not ours."""
    return _CODES.get(type(error), code_pb2.INTERNAL) if isinstance(error, errors.ShardliftError) else code_pb2.INTERNAL


def to_error(error: BaseException) -> errors.ShardliftError:
    """`error` itself when it is ours, else an InternalError that quotes it in one line."""
    if isinstance(error, errors.ShardliftError):
        return error
    return errors.InternalError(f"{type(error).__name__}: {errors.one_line(error)}")


def from_reason(reason: str, message: str) -> errors.ShardliftError:
    """The exception that `reason` names."""
    return _BY_REASON.get(reason, errors.InternalError)(message)


def from_refusal(refused: inference_pb2.SessionRefusal) -> errors.ShardliftError:
    """What an action of a session was refused with."""
    error = from_reason(refused.reason, refused.message)
    error.retry_s = refused.retry_s or None
    return error


def to_refusal(error: errors.ShardliftError) -> inference_pb2.SessionRefusal:
    return inference_pb2.SessionRefusal(
        code=code_of(error), message=str(error), reason=type(error).__name__, retry_s=error.retry_s or 0.0
    )


def to_status(error: BaseException, model: str = "") -> grpc.Status:
    """A status for `context.abort_with_status`. Its details: ErrorInfo, with the `model` that was asked for among its
    metadata, and RetryInfo where the same may be asked again."""
    ours = to_error(error)
    info = error_details_pb2.ErrorInfo(reason=type(ours).__name__, domain=DOMAIN)
    if 0 < len(model) <= _MOST_MODEL_CHARACTERS and model.isprintable():
        info.metadata["model"] = model
    details = [any_pb2.Any()]
    details[0].Pack(info)
    if ours.retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * ours.retry_s))
        details.append(any_pb2.Any())
        details[1].Pack(retry)
    text = str(ours)
    if len(text.encode("utf-8", "replace")) > _MOST_MESSAGE_BYTES:
        text = text.encode("utf-8", "replace")[:_MOST_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"
    return rpc_status.to_status(status_pb2.Status(code=code_of(ours), message=text, details=details))


def _ours(error: grpc.RpcError) -> errors.ShardliftError | None:
    """What a shardlift server made a status of; None for any other's."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # what a call raises is a Call, too
    except (ValueError, NotImplementedError, AttributeError):
        return None
    found: errors.ShardliftError | None = None
    retry_s: float | None = None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            found = from_reason(info.reason, status.message)
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_s = retry.retry_delay.ToMilliseconds() / 1000
    if found is not None:
        found.retry_s = retry_s
    return found


def sent_by_us(error: grpc.RpcError) -> bool:
    """Whether a shardlift server made this status, rather than gRPC itself."""
    return _ours(error) is not None


def from_rpc_error(error: grpc.RpcError, address: str) -> Exception:
    """What a client raises for `error`: the server's exception where it sent one, else by code.

    `address` is named where nobody answered.
    """
    if (ours := _ours(error)) is not None:
        return ours
    code = error.code().value[0]
    text = " ".join(str(error.details() or "").split())
    if code == code_pb2.UNAVAILABLE:
        return errors.GatewayUnavailableError(
            f"no gateway answers at {address} ({text}): start one with `shardlift up`, or set SHARDLIFT_ADDRESS"
        )
    if code == code_pb2.UNIMPLEMENTED:
        return errors.InvalidRequestError(f"the server at {address} is no shardlift gateway, or an older one: {text}")
    if code == code_pb2.DEADLINE_EXCEEDED:
        return errors.DeadlineExceededError(f"the gateway at {address} did not answer in time: {text}")
    return _BY_CODE.get(code, errors.InternalError)(f"{error.code().name}: {text}")
