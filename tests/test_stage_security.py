"""Stages answer their own model's stages and gateway alone, over TLS where it is asked for; whatever else comes ends
its own call, and the others' tokens stay what they are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardlift.cluster.vigil import Vigil, lost_stages
from shardlift.proto.v1 import inference_pb2, stage_pb2
from shardlift.proto.v1.credentials import stage_channel
from shardlift.proto.v1.errors import ModelUnavailableError
from shardlift.proto.v1.frames import bytes_message
from shardlift.proto.v1.status import sent_by_us
from shardlift.proto.v1.tensor_pb2 import Tensor
from shardlift.proto.v1.tls import TLS
from shardlift.proto.v1.wire import CHANNEL_OPTIONS
from shardlift.worker.links import STEP_METHOD
from shardlift.worker.spec import StageSpec
from shardlift.worker.stage import ResidentStage
from shardlift.worker.tensors import to_message
from tests.support import checkpoints, ring
from tests.support.certificates import Authority
from tests.support.ray_start import free_port

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[ResidentStage]:
    folder = checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)
    return ring.load(folder, (1, 3))


@pytest.fixture
async def secured(stages: list[ResidentStage], authority: Authority) -> AsyncIterator[ring.Ring]:
    async with ring.serve(stages, tls=authority.stages()) as serving:
        yield serving


@contextlib.asynccontextmanager
async def somebody_elses_stream(serving: ring.Ring, tokens: int = 60) -> AsyncIterator[None]:
    """A generation that is under way all along, and gets the tokens that it would have got alone."""
    expected, _ = await serving.generate(IDS, max_new_tokens=tokens, eos_token_id=None)
    request = inference_pb2.GenerateRequest(input_ids=to_message(IDS))
    request.generation.update({"max_new_tokens": tokens, "eos_token_id": None})
    call = serving.stub.Generate(request, metadata=serving.metadata)
    got: list[int] = []

    async def next_token() -> bool:
        async for answer in call:
            if answer.WhichOneof("event") == "step":
                got.extend(answer.step.token_ids)
                return True
        return False

    assert await next_token()
    yield
    assert len(got) == 1, "the stream is still under way"
    while await next_token():
        pass
    assert [got] == expected.tolist()


async def ended(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


# ---- TLS between stages ----------------------------------------------------------------------------------------------


async def test_a_ring_over_tls_gives_the_same_tokens(stages: list[ResidentStage], authority: Authority) -> None:
    async with ring.serve(stages) as plain:
        expected, logits = await plain.generate(IDS, max_new_tokens=12, output_logits=True)
    async with ring.serve(stages, tls=authority.stages()) as secured:
        tokens, same = await secured.generate(IDS, max_new_tokens=12, output_logits=True)
    assert torch.equal(tokens, expected)
    assert all(torch.equal(one, other) for one, other in zip(same, logits, strict=True))


async def test_who_has_no_certificate_of_the_stages_is_kept_out(
    secured: ring.Ring, authority: Authority, tmp_path: Path
) -> None:
    assert secured.tls is not None
    stranger = Authority(tmp_path, "stranger")
    others: dict[str, TLS | None] = {
        "plain text": None,
        "no certificate": replace(secured.tls, cert=None, key=None),
        "another CA's": replace(stranger.stages(), ca=authority.file),
        "expired": authority.stages("late", days=-1),
    }
    async with somebody_elses_stream(secured):
        for what, tls in others.items():
            for address in secured.addresses:
                async with stage_channel(address, tls, CHANNEL_OPTIONS) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await health_pb2_grpc.HealthStub(channel).Check(
                            health_pb2.HealthCheckRequest(), metadata=secured.metadata, timeout=20
                        )
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, what


async def test_a_stage_believes_no_other_server_either(
    secured: ring.Ring, authority: Authority, tmp_path: Path
) -> None:
    """Neither one of another CA, nor one of this CA whose certificate is made out to something else."""
    assert secured.tls is not None
    believing_others = replace(secured.tls, ca=Authority(tmp_path, "stranger").file)
    with pytest.raises(ModelUnavailableError, match="unable to get local issuer certificate"):
        await lost_stages({0: secured.addresses[0]}, secured.metadata, believing_others)
    misnamed = replace(authority.issue("misnamed"), name="shardlift-stage")
    async with ring.serve(secured.stages[:1], tls=misnamed) as other:
        with pytest.raises(ModelUnavailableError, match="made out to another name"):
            await lost_stages({0: other.addresses[0]}, other.metadata, other.tls)


async def test_a_stage_that_tls_keeps_away_is_not_taken_for_lost(
    secured: ring.Ring, authority: Authority, tmp_path: Path
) -> None:
    """Else an expired certificate would have every worker killed, and loaded again."""
    addresses = dict(enumerate(secured.addresses))
    assert await lost_stages(addresses, secured.metadata, secured.tls) == {}
    with pytest.raises(ModelUnavailableError, match=r"TLS with stage 0 .* may not believe our certificate"):
        await lost_stages(addresses, secured.metadata, authority.stages("late", days=-1))
    stranger = Authority(tmp_path, "stranger").stages()
    with pytest.raises(ModelUnavailableError, match="unable to get local issuer certificate"):
        await lost_stages(addresses, secured.metadata, stranger)
    # One that has gone is lost all the same.
    nobody = f"127.0.0.1:{free_port('127.0.0.1')}"
    assert await lost_stages({**addresses, 7: nobody}, secured.metadata, secured.tls) == {7: False}


async def test_a_stage_that_goes_is_noticed_over_tls(stages: list[ResidentStage], authority: Authority) -> None:
    lost: asyncio.Queue[int] = asyncio.Queue()
    async with ring.serve(stages, tls=authority.stages()) as serving:
        vigil = Vigil(serving.addresses, serving.metadata, lost.put_nowait, serving.tls)
        await asyncio.sleep(0)
        assert await lost_stages(dict(enumerate(serving.addresses)), serving.metadata, serving.tls) == {}
        await serving.servers[1].stop()
        assert await asyncio.wait_for(lost.get(), 20) == 1
        await vigil.close()


async def test_stages_take_new_certificates_as_they_go(stages: list[ResidentStage], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = authority.stages()
    async with ring.serve(stages, tls=tls) as serving:
        expected, _ = await serving.generate(IDS, max_new_tokens=8)
        before = Path(tls.cert or "").read_bytes()
        assert authority.stages() == tls
        assert Path(tls.cert or "").read_bytes() != before
        # The ring anew, as after the loss of a stage: new connections, over the new files.
        for index, server in enumerate(serving.servers):
            await server.join(serving.addresses[(index + 1) % len(serving.addresses)])
        tokens, _ = await serving.generate(IDS, max_new_tokens=8)
        assert torch.equal(tokens, expected)


def test_a_spec_carries_paths_and_no_contents(authority: Authority, tmp_path: Path) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama")
    tls = authority.stages()
    [spec] = [replace(spec, tls=tls) for spec in ring.specs(folder, ())]
    assert StageSpec.from_json(spec.to_json()) == spec
    text = str(spec.to_json())
    assert str(tls.key) in text
    assert "PRIVATE" not in text
    assert spec.secret not in repr(spec)


# ---- the model's secret ----------------------------------------------------------------------------------------------


async def test_no_service_answers_without_the_secret(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages) as serving, somebody_elses_stream(serving):
        secrets = [None, "", "another model's", ring.SECRET[:-1]]
        for address, secret in itertools.product(serving.addresses, secrets):
            metadata = [] if secret is None else [(serving.metadata[0][0], secret)]
            async with grpc.aio.insecure_channel(address) as channel:
                for method in (
                    "/grpc.health.v1.Health/Check",
                    "/grpc.health.v1.Health/Watch",
                    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                    "/shardlift.v1.InferenceService/Generate",
                    "/shardlift.v1.InferenceService/Session",
                    STEP_METHOD,
                    "/no.such.Service/Method",
                ):
                    error = await ended(channel.unary_stream(method)(b"", metadata=metadata))
                    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method
                    assert ring.SECRET not in str(error.details())


# ---- hostile frames --------------------------------------------------------------------------------------------------

WIDTH = 64


def step(shape: list[int], dtype: str = "float32", data: bytes = b"") -> bytes:
    positions = Tensor(shape=[1, 1], dtype="int32", data=bytes(4))
    message = stage_pb2.Step(input=Tensor(shape=shape, dtype=dtype, data=data), position_ids=positions)
    return stage_pb2.StepRequest(step=message).SerializeToString()


HOSTILE_FRAMES: list[list[bytes]] = [
    [b"\xff\xff\xff\xff"],
    [b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"],  # a length of no end
    [b"\x12\x05ab"],  # more bytes than there are
    [b""],
    [b"\x7a\x01x"],  # a frame of a kind to come
    [bytes_message(stage_pb2.StepRequest.MORE_FIELD_NUMBER, b"to no step")],
    [step([1, 1, WIDTH]), step([1, 1, WIDTH])],
    [step([1, -1, WIDTH])],
    [step([1 << 31, 1 << 31, WIDTH])],
    [step([])],
    [step([1, 1, WIDTH + 1], data=bytes(4 * WIDTH + 4))],
    [step([1, 1, WIDTH], data=bytes(4 * WIDTH + 1))],
    [step([1, 1, WIDTH], dtype="object", data=bytes(4 * WIDTH))],
]


async def test_hostile_frames_end_their_own_stream(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages) as serving, somebody_elses_stream(serving):
        assert stages[1].width == WIDTH
        for address in serving.addresses[1:]:
            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                for frames in HOSTILE_FRAMES:
                    error = await ended(channel.stream_stream(STEP_METHOD)(iter(frames), metadata=serving.metadata))
                    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (frames, error.details())
                    assert sent_by_us(error)


def generate(**fields: Any) -> bytes:
    request = inference_pb2.GenerateRequest(input_ids=to_message(IDS))
    request.generation.update(fields)
    return request.SerializeToString()


HOSTILE: dict[str, tuple[str, Callable[[], bytes], grpc.StatusCode, str]] = {
    "no message": ("Generate", lambda: b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "can't be read"),
    "no message in a session": ("Session", lambda: b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "can't be read"),
    "no message in passes": ("Forward", lambda: b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "can't be read"),
    "a message over 40 MiB": (
        "Generate",
        lambda: bytes(41 << 20),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "larger than max",
    ),
    "copies without end": (
        "Generate",
        lambda: generate(num_beams=1e12),
        grpc.StatusCode.INVALID_ARGUMENT,
        "at most 1024 copies",
    ),
    "a time that is none": (
        "Session",
        lambda: inference_pb2.SessionRequest(idle_timeout_s=float("nan")).SerializeToString(),
        grpc.StatusCode.INVALID_ARGUMENT,
        "idle_timeout_s=nan",
    ),
}


async def test_hostile_requests_to_the_last_stage(stages: list[ResidentStage]) -> None:
    async with ring.serve(stages) as serving, somebody_elses_stream(serving):
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(serving.addresses[-1], options=options) as channel:
            for what, (method, message, code, said) in HOSTILE.items():
                path = f"/shardlift.v1.InferenceService/{method}"
                error = await ended(channel.stream_stream(path)(iter([message()]), metadata=serving.metadata))
                assert error.code() is code, (what, error.details())
                assert said in str(error.details())
