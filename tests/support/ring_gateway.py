"""A gateway before a ring of stages, in this process: the whole way of a client but for Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2

import shardlift
from shardlift.client.handle import RemoteModel
from shardlift.cluster import loads
from shardlift.cluster.gateway import Gateway
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.cluster.placement import Placement
from shardlift.cluster.registry import Entry
from shardlift.cluster.resident import Resident
from shardlift.proto.v1 import registry_pb2
from shardlift.worker.loader import LoadProgress, load_stage
from shardlift.worker.quantization import describe_quantization
from shardlift.worker.spec import LoadReport, StageSpec
from shardlift.worker.tokenizer import LazyTokenizer

from . import ring

NAME = "model"


@dataclass
class Served:
    """address: the gateway's. call: runs a coroutine on the event loop of gateway and stages."""

    address: str
    model: RemoteModel
    client: shardlift.Client
    ring: ring.Ring
    loop: asyncio.AbstractEventLoop

    def call(self, make: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(make(), self.loop).result(60)


@contextlib.contextmanager
def serving(folder: Path, ends: Sequence[int], **options: Any) -> Iterator[Served]:
    """The checkpoint in `folder` as stages that end before the layers `ends`; `options` are those of `ring.specs`."""
    specs = ring.specs(folder, ends, **options)
    loaded = [load_stage(spec, None, LoadProgress()) for spec in specs]
    ready = threading.Event()
    failures: list[BaseException] = []
    found: list[Any] = []

    async def serve() -> None:
        over = asyncio.Event()
        tokenizer = LazyTokenizer(specs[0].source, None).get
        async with ring.serve([each.stage for each in loaded], tokenizer=tokenizer) as running:
            reports = [
                LoadReport(
                    address=address,
                    fetched_bytes=each.fetched_bytes,
                    cached_bytes=0,
                    modules=each.modules,
                    seconds=0.0,
                    phases=(),
                    link=each.link,
                    bottleneck="",
                    connections=1,
                    parameter_bytes=each.parameter_bytes,
                    buffer_bytes=each.buffer_bytes,
                )
                for address, each in zip(running.addresses, loaded, strict=True)
            ]
            gateway = Gateway(GatewayOptions())
            info = _info(folder, specs, reports)
            request = registry_pb2.LoadModelRequest(name=NAME, source=registry_pb2.ModelSource(path=str(folder)))
            placement = Placement(model=NAME, load_id="load")
            resident = Resident(info, request, None, placement, reports, specs)
            await resident.connect()
            # As after a load, but that Ray has nothing to find again.
            gateway.registry._entries[NAME] = Entry(
                info=info, placement=placement, source=specs[0].source, resident=resident
            )
            port = gateway._server.add_insecure_port("127.0.0.1:0")
            await gateway._server.start()
            await gateway._health.set("", health_pb2.HealthCheckResponse.SERVING)
            found.extend([f"127.0.0.1:{port}", running, asyncio.get_running_loop(), over])
            ready.set()
            await over.wait()
            await running.idle()
            await resident.close()
            await gateway._server.stop(0.5)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    assert not failures, failures
    address, running, loop, over = found
    try:
        with shardlift.connect(address) as client:
            yield Served(address=address, model=client.model(NAME), client=client, ring=running, loop=loop)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
    assert not failures, failures


def _info(folder: Path, specs: Sequence[StageSpec], reports: Sequence[LoadReport]) -> registry_pb2.ModelInfo:
    quantization = specs[0].quantization
    return registry_pb2.ModelInfo(
        name=NAME,
        state=registry_pb2.MODEL_STATE_READY,
        path=str(folder),
        config_json=json.dumps(dict(specs[0].config)),
        generation_config_json=json.dumps(dict(specs[0].generation_config or {})),
        quantization_config_json=json.dumps(dict(quantization)) if quantization else "",
        footprint=loads.footprint(reports),
        residency=[loads.residency(index, report) for index, report in enumerate(reports)],
        plan=registry_pb2.Plan(
            model=str(folder),
            quantization=describe_quantization(quantization),
            dtype=specs[0].dtype,
            stages=[
                registry_pb2.StagePlan(
                    index=spec.index,
                    node="127.0.0.1",
                    device="cpu",
                    first_layer=spec.cut.first,
                    last_layer=spec.cut.end - 1,
                    modules=["model"],
                )
                for spec in specs
            ],
        ),
    )
