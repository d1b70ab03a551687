"""The real gateway in this process, without Ray: before a ring of stages, or before nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from unittest import mock

from shardlift.cluster.gateway import Gateway
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.cluster.placement import Placement
from shardlift.cluster.registry import Entry, Registry
from shardlift.cluster.resident import Resident
from shardlift.proto.v1 import registry_pb2
from shardlift.worker.spec import LoadReport, StageSpec

from .ring import Ring

NAME = "model"


@contextlib.asynccontextmanager
async def serve(
    options: GatewayOptions, ring: Ring | None = None, specs: list[StageSpec] | None = None
) -> AsyncIterator[str]:
    """The address of a gateway that, with `ring`, has the model "model" resident."""

    async with started(options) as (gateway, address):
        if ring is not None:
            assert specs is not None
            info = registry_pb2.ModelInfo(
                name=NAME,
                state=registry_pb2.MODEL_STATE_READY,
                config_json=json.dumps(dict(specs[0].config)),
                generation_config_json=json.dumps(dict(specs[0].generation_config or {})),
                plan=registry_pb2.Plan(dtype="float32", stages=[registry_pb2.StagePlan()]),
            )
            placement = Placement(model=NAME, load_id="load")
            reports = [_report(each) for each in ring.addresses]
            own = [replace(spec, tls=ring.tls) for spec in specs]
            request = registry_pb2.LoadModelRequest(name=NAME)
            resident = Resident(info, request, None, placement, reports, own)
            await resident.connect()
            entry = Entry(info=info, placement=placement, source=own[0].source, resident=resident)
            gateway.registry._entries[NAME] = entry
        yield address


@contextlib.asynccontextmanager
async def started(options: GatewayOptions) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway and its address, without a model."""

    async def nothing(self: Registry) -> None:
        """What Ray would have been asked."""

    gateway = Gateway(options)
    with mock.patch.multiple(Registry, recover=nothing, follow_nodes=nothing):
        address = await gateway.start()
    try:
        yield gateway, address
    finally:
        await gateway.stop(unload=False)


def _report(address: str) -> LoadReport:
    return LoadReport(
        address=address,
        fetched_bytes=0,
        cached_bytes=0,
        modules=(),
        seconds=0,
        phases=(),
        link="",
        bottleneck="",
        connections=1,
    )
