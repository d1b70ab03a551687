"""The tree of errors, and its way over the wire and between processes."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

import shardlift
from shardlift.proto.v1 import errors, registry_pb2, registry_pb2_grpc, status
from shardlift.proto.v1.errors import ShardliftError, one_line

TREE = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, ShardliftError) and value is not ShardliftError
]
# Two lines, and letters that a header can't carry as they are.
MESSAGE = "it's 3 > 2: naïve 模型 🙂, 100%"


def subclasses(cls: type) -> Iterator[type]:
    for below in cls.__subclasses__():
        yield below
        yield from subclasses(below)


def test_each_class_has_a_code() -> None:
    assert set(status._CODES) == set(TREE) == set(subclasses(ShardliftError))
    assert set(status._CODES.values()) <= set(code_pb2.Code.values()) - {code_pb2.OK}


def test_the_docstring_draws_the_tree() -> None:
    """Each name once, under its parent."""
    above: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"( *)([│ ]*)[├└]── (\w+)  ", line):
            depth = len(match[2]) // 4
            above[depth:] = [match[3]]
            assert match[3] not in drawn
            drawn[match[3]] = above[depth - 1] if depth else "ShardliftError"
    assert drawn == {cls.__name__: cls.__bases__[0].__name__ for cls in TREE}


def test_the_root_is_public() -> None:
    assert shardlift.ShardliftError is ShardliftError


@pytest.mark.parametrize("cls", [ShardliftError, *TREE])
def test_pickle(cls: type[ShardliftError]) -> None:
    copy = pickle.loads(pickle.dumps(cls(MESSAGE)))
    assert type(copy) is cls
    assert str(copy) == MESSAGE


@pytest.mark.parametrize("cls", TREE)
async def test_what_may_pass_says_when_to_ask_again(cls: type[ShardliftError]) -> None:
    """For clients of any language, as RetryInfo; for ours on the exception."""
    first, second = cls(MESSAGE), cls(MESSAGE)
    second.retry_s = 2.5
    (one, code), (other, _) = await over_the_wire(first, second)
    assert isinstance(one, ShardliftError)
    assert isinstance(other, ShardliftError)
    assert (one.retry_s, other.retry_s) == (cls.retry_s, 2.5)
    if code is grpc.StatusCode.UNAVAILABLE or cls is errors.ModelBusyError:
        assert cls.retry_s is not None
    refused = status.from_refusal(status.to_refusal(second))
    assert (type(refused), str(refused), refused.retry_s) == (cls, MESSAGE, 2.5)


def test_details_name_the_model() -> None:
    def details(error: ShardliftError, model: str) -> list[Any]:
        found = status_pb2.Status()
        trailers = dict(status.to_status(error, model).trailing_metadata)
        found.ParseFromString(trailers["grpc-status-details-bin"])
        return list(found.details)

    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    first, second = details(errors.ModelBusyError("busy"), "llama")
    assert first.Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("ModelBusyError", "shardlift", {"model": "llama"})
    assert second.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000
    (only,) = details(errors.ModelNotFoundError("no"), "x" * 100)
    assert only.Unpack(info)
    assert not info.metadata  # no name that a model could have


class _Registry(registry_pb2_grpc.ModelRegistryServiceServicer):
    """Raises what it is given, as the gateway does."""

    def __init__(self) -> None:
        self.error: BaseException = ShardliftError()

    async def ListModels(
        self, request: registry_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.ListModelsResponse:
        await context.abort_with_status(status.to_status(self.error))
        raise AssertionError


async def over_the_wire(*sent: BaseException) -> list[tuple[Exception, grpc.StatusCode]]:
    servicer, server = _Registry(), grpc.aio.server()
    registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    received = []
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = registry_pb2_grpc.ModelRegistryServiceStub(channel)
            for error in sent:
                servicer.error = error
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ListModels(registry_pb2.ListModelsRequest())
                received.append((status.from_rpc_error(caught.value, "here"), caught.value.code()))
    finally:
        await server.stop(None)
    return received


async def test_each_class_survives_the_wire() -> None:
    for cls, (error, code) in zip(TREE, await over_the_wire(*(cls(MESSAGE) for cls in TREE)), strict=True):
        assert type(error) is cls
        assert str(error) == MESSAGE
        assert code.value[0] == status._CODES[cls], cls


async def test_what_is_not_ours_arrives_as_internal_in_one_line() -> None:
    ((error, code),) = await over_the_wire(KeyError("no\n  such\tkey"))
    assert type(error) is errors.InternalError
    assert str(error).startswith("KeyError: ")
    assert "\n" not in str(error)
    assert code is grpc.StatusCode.INTERNAL


async def test_a_long_or_an_empty_message_arrives() -> None:
    long, empty = await over_the_wire(errors.SourceError("x" * 3000), errors.SourceError(""))
    assert type(long[0]) is type(empty[0]) is errors.SourceError
    assert str(long[0]).startswith("x" * 1000)


class _Call(grpc.RpcError):
    """What a call without our details raises."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.GatewayUnavailableError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.AuthenticationError),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.InvalidRequestError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.InvalidRequestError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
        (grpc.StatusCode.CANCELLED, errors.InternalError),
    ],
)
def test_a_status_that_is_not_ours(code: grpc.StatusCode, cls: type[Exception]) -> None:
    error = status.from_rpc_error(_Call(code, "some\nreason"), "host:1")
    assert type(error) is cls
    assert "some reason" in str(error)
    assert "\n" not in str(error)


def test_a_reason_from_a_newer_server() -> None:
    error = status.from_reason("QuantumError", "entangled")
    assert type(error) is errors.InternalError
    assert str(error) == "entangled"


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("word " * 1000))) == 600
    assert one_line(ValueError("word " * 1000)).endswith("…")
