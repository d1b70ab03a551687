"""Every failure that shardlift raises, in one tree.

    ShardliftError
    ├── InvalidRequestError            an argument that can't be meant
    │   ├── InvalidDeviceMapError      a device map or memory limit that can't be met as written
    │   └── UnknownArgumentError       an argument of a name that nothing has
    ├── CheckpointError                what was asked for can't be loaded
    │   ├── CheckpointNotFoundError    no such repository, folder, revision or file
    │   ├── GatedCheckpointError       the Hub wants a token, or a better one
    │   ├── CorruptCheckpointError     bytes that contradict themselves: header, size, index
    │   ├── TensorMismatchError        missing or misshapen tensors, by name
    │   └── UnsupportedModelError      an architecture or quantization that isn't known to be right
    ├── SourceError                    reading failed for good after retries
    ├── SaveError                      a model can't be written out where it should be
    ├── OutOfMemoryError               a device, or the cluster, is too small
    ├── ModelNameTakenError            the registry holds that name
    ├── ModelNotFoundError             the registry holds no such name
    ├── ModelUnavailableError          resident, but a stage doesn't answer
    │   └── WorkerDiedError            the process of a stage's worker is gone
    ├── ModelBusyError                 as many sessions as the model takes run and wait
    ├── SessionExpiredError            a session for which nothing came any more
    ├── DeadlineExceededError          not done in the time that its client gave
    ├── LoadCancelledError             unloaded, or given up by its client, while loading
    ├── AuthenticationError            no token, or a wrong one
    ├── GatewayUnavailableError        nobody answers at the address
    └── InternalError                  a defect of ours

Each message is one line: what was wrong, the value, the limit, the remedy.
The names travel on the wire (`ErrorInfo.reason`), so that a client raises what the worker raised.
"""

from __future__ import annotations


class ShardliftError(Exception):
    """Base of every failure that shardlift raises.

    retry_s: after so many seconds it may be gone, and the same may be asked again; None where waiting mends nothing.
    """

    retry_s: float | None = None


class InvalidRequestError(ShardliftError, ValueError):
    """An argument that can't be meant. A ValueError, too, which is what transformers raises for such."""


class InvalidDeviceMapError(InvalidRequestError):
    """A device map or memory limit that can't be met as written."""


class UnknownArgumentError(InvalidRequestError, TypeError):
    """An argument of a name that nothing has. A TypeError, too, which is what Python raises for such."""


class CheckpointError(ShardliftError):
    """What was asked for can't be loaded."""


class CheckpointNotFoundError(CheckpointError):
    """No such repository, folder, revision or file."""


class GatedCheckpointError(CheckpointError):
    """The Hub wants a token, or one with more rights."""


class CorruptCheckpointError(CheckpointError):
    """Bytes that contradict themselves: a header, a file's size, an index."""


class TensorMismatchError(CheckpointError):
    """Tensors that are missing or misshapen, or not what they seem, by name."""


class UnsupportedModelError(CheckpointError):
    """An architecture or a quantization that isn't known to come out right."""


class SourceError(ShardliftError):
    """Reading from a source failed for good."""

    retry_s = 5.0


class SaveError(ShardliftError):
    """A model can't be written out where it should be."""


class OutOfMemoryError(ShardliftError):
    """A device, or the whole cluster, is too small; or for now, where `retry_s` is given."""


class ModelNameTakenError(ShardliftError):
    """The registry already holds a model of that name."""


class ModelNotFoundError(ShardliftError):
    """The registry holds no model of that name."""


class ModelUnavailableError(ShardliftError):
    """The model is resident, but one of its stages doesn't answer."""

    retry_s = 1.0


class WorkerDiedError(ModelUnavailableError):
    """The process of a stage's worker is gone."""


class ModelBusyError(ShardliftError):
    """As many sessions as the model takes are running and waiting."""

    retry_s = 1.0


class SessionExpiredError(ShardliftError):
    """A session for which nothing came within its idle time."""


class DeadlineExceededError(ShardliftError, TimeoutError):
    """Not done in the time that its client gave. A TimeoutError, too."""


class LoadCancelledError(ShardliftError):
    """The load was cancelled, by its client or by `unload`."""


class AuthenticationError(ShardliftError):
    """The token is missing or wrong."""


class GatewayUnavailableError(ShardliftError):
    """Nobody answers at the gateway's address."""

    retry_s = 1.0


class InternalError(ShardliftError):
    """A defect of ours."""


def one_line(error: BaseException, limit: int = 600) -> str:
    """`error` as one line of at most `limit` characters, for messages that quote a library's own error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
