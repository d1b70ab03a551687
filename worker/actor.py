"""The Ray actor that holds a stage. Everything that knows of Ray in this package is here."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util import metrics as ray_metrics

from ..proto.v1.errors import InternalError, InvalidRequestError, LoadCancelledError
from ..proto.v1.status import to_error
from ..proto.v1.tls import TLS
from . import logs, metrics, own_gpus, tracing
from .cores import settle_threads
from .records import HubToken
from .spec import LoadReport, LoadSnapshot, ModuleBytes, StageSpec

if TYPE_CHECKING:
    from .service import StageServer

logger = logging.getLogger(__name__)

_KEEPING_S = 3.0
_EXPORT_S = 1.0
_FLUSH_S = 2.5


class StageWorker:
    """Holds one stage of one model; detached and named, so that it outlives whoever asked for it.

    It carries its spec and the model's card (opaque to it): a restarted controller learns from the workers alone
    which models there are. `ray.remote` is applied where it is placed.
    """

    def __init__(self, spec: Mapping[str, Any], card: bytes) -> None:
        settle_threads(os.environ, shares_cores=bool(spec.get("shares_cores")))
        if str(spec["device"]).startswith("cuda"):
            # Quantized weights of a few MiB would leave a good part of torch's segments unusable. Before torch, too.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        from .loader import LoadProgress

        self._spec = StageSpec.from_json(spec)
        settings = logs.LogSettings(format=self._spec.log_format, level=self._spec.log_level)
        who = {"model": self._spec.model, "stage": str(self._spec.index), "load_id": self._spec.load_id}
        logs.configure(settings, who)
        tracing.configure("shardlift-stage", **who)
        self._card = card
        self._pulse = metrics.Pulse()
        self._exporting: asyncio.Task[None] | None = None
        self._progress = LoadProgress(trace=self._spec.trace)
        self._server: StageServer | None = None
        self._loading: asyncio.Future[LoadReport] | None = None
        self._report: LoadReport | None = None
        self._joined = False
        self._keeping: threading.Thread | None = None

    async def device(self) -> str:
        """The device as the node counts it: "cuda:3" for the fourth GPU, whatever the process sees it as; "cpu:3" for a
        CPU worker in the place of one that is made up; "cpu"."""
        kind, number = self._spec.device.partition(":")[0], own_gpus.own()
        return kind if number is None else f"{kind}:{number}"

    async def load(self, token: HubToken, traceparent: str = "") -> LoadReport:
        """Loads the stage and begins to serve it. Idempotent: a second call waits for the first one's report."""
        if self._loading is None:
            self._exporting = asyncio.ensure_future(self._export())
            self._loading = asyncio.ensure_future(self._traced_load(token, traceparent))
        return await asyncio.shield(self._loading)

    async def _traced_load(self, token: HubToken, traceparent: str) -> LoadReport:
        with tracing.span("stage load", traceparent, device=await self.device()) as span:
            report = await self._load(token)
            for phase in report.phases:
                if phase.end_s:
                    span.past(phase.name, phase.start_s, phase.end_s, busy_seconds=phase.seconds, bytes=phase.bytes_)
            span.note(resident_bytes=report.measured_bytes, bottleneck=report.bottleneck)
        logger.info("loaded %d bytes in %.1f s", report.measured_bytes, report.seconds)
        return report

    async def _load(self, token: HubToken) -> LoadReport:
        from .loader import load_stage
        from .part_cache import PartCache
        from .service import StageServer
        from .timeline import bottleneck
        from .tokenizer import LazyTokenizer
        from .trial import try_batches

        started = time.monotonic()
        try:
            if self._spec.tls is not None:
                _check_tls(self._spec.tls)
            cache = PartCache.from_environment() if self._spec.use_cache else None
            # A thread that ends with the load: OpenMP keeps a team for each thread that has computed, and with two
            # teams on its cores it stops spinning between kernels, which doubles the time of a decoding step.
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load") as thread:
                loop = asyncio.get_running_loop()
                loaded = await loop.run_in_executor(thread, load_stage, self._spec, token, self._progress, cache)
                if loaded.keep is not None and self._spec.device == "cpu":
                    await loop.run_in_executor(thread, loaded.keep)
            if loaded.keep is not None and self._spec.device != "cpu":
                # Weights on a GPU stay as they are: they are written while the stage serves.
                self._keeping = threading.Thread(target=_keep, args=(loaded.keep,), name="keep", daemon=True)
                self._keeping.start()
            self._server = StageServer(
                loaded.stage,
                secret=self._spec.secret,
                num_stages=self._spec.num_stages,
                limits=self._spec.limits,
                tokenizer=LazyTokenizer(self._spec.source, token, self._spec.trust_remote_code).get,
                tls=self._spec.tls,
            )
            if self._spec.use_batches:
                await self._server.pipeline.run("", lambda: try_batches(loaded.stage))
            address = await self._server.start(ray.util.get_node_ip_address())
        except Exception as error:
            ours = to_error(error)
            if isinstance(ours, InternalError):
                logger.exception("loading failed")
            else:
                logger.warning("loading failed: %s", ours)
            # Ray wraps what an actor raises; ours must arrive as it is, and be picklable.
            raise ours from None
        phases = self._progress.timeline.phases()
        self._report = LoadReport(
            address=address,
            fetched_bytes=loaded.fetched_bytes,
            cached_bytes=loaded.cached_bytes,
            modules=loaded.modules,
            seconds=time.monotonic() - started,
            phases=phases,
            link=loaded.link,
            bottleneck=bottleneck(phases),
            connections=self._spec.connections,
            pid=os.getpid(),
            parameter_bytes=loaded.parameter_bytes,
            buffer_bytes=loaded.buffer_bytes,
        )
        return self._report

    async def trace(self) -> list[dict[str, Any]]:
        """The load's spans as events of Chrome's trace format; empty unless the spec asked for a trace."""
        from .timeline import trace_events

        spans, dropped = self._progress.timeline.spans()
        name = f"stage {self._spec.index} on {ray.util.get_node_ip_address()}/{await self.device()}"
        return trace_events(spans, process=self._spec.index, name=name, dropped=dropped) if spans else []

    async def progress(self) -> LoadSnapshot:
        return self._progress.snapshot()

    async def join(self, next_address: str) -> None:
        """Closes the ring; the stage is ready afterwards."""
        assert self._server is not None
        await self._server.join(next_address)
        self._joined = True

    async def describe(self) -> tuple[dict[str, Any], bytes, LoadReport | None, bool]:
        """Spec (without its records), card, report, and whether the stage serves in a closed ring."""
        spec = self._spec.to_json()
        del spec["records"]
        return spec, self._card, self._report, self._joined

    async def set_card(self, card: bytes) -> None:
        """Replaces the model's card, once more is known of it."""
        self._card = card

    async def load_adapter(self, adapter: Mapping[str, Any], token: HubToken) -> tuple[ModuleBytes, ...]:
        """Attaches this stage's part of an adapter (an AdapterSpec's JSON object); gives what it holds."""
        from .adapter_spec import AdapterSpec

        assert self._server is not None
        spec = AdapterSpec.from_json(adapter)
        if self._keeping is not None:
            # The part that is being written names the model's tensors as they are without adapters.
            await asyncio.to_thread(self._keeping.join)
        try:
            return await self._server.load_adapter(spec, token, self._progress.cancelled)
        except Exception as error:
            ours = to_error(error)
            if isinstance(ours, InternalError):
                logger.exception("loading adapter %s of %s failed", spec.name, self._spec.model)
            raise ours from None

    async def delete_adapter(self, name: str) -> None:
        """Takes an adapter off. Twice is as good as once."""
        assert self._server is not None
        try:
            await self._server.delete_adapter(name)
        except Exception as error:
            raise to_error(error) from None

    async def adapters(self) -> list[str]:
        """The names of the adapters that are attached here."""
        return [] if self._server is None else list(self._server.pipeline.stage.adapters.names)

    async def limit_tokens(self, kv_tokens: int, rooms: Sequence[tuple[int, int]] = ()) -> None:
        """How many tokens' keys and values have room from now on, and the stages' rooms, as in SessionLimits. Asked of
        the last stage, which lets sessions in."""
        from .service import rooms_of

        assert self._server is not None
        self._server.sessions.admission.limit(kv_tokens, rooms_of(rooms))

    async def sessions(self) -> tuple[int, int]:
        """Sessions held, and the bytes of their keys and values."""
        if self._server is None:
            return 0, 0
        return self._server.pipeline.sessions, self._server.pipeline.kv_bytes

    async def status(self) -> metrics.StageStatus:
        """How the stage is now. Asked for while somebody looks."""
        if self._server is None:
            return metrics.StageStatus()
        return replace(self._server.status(), tokens_per_second=self._pulse.per_second)

    async def _export(self) -> None:
        """Tells Ray's metrics, again and again. What the process leaves there ends with it."""
        labels = {
            "model": self._spec.model,
            "stage": str(self._spec.index),
            "node": ray.util.get_node_ip_address(),
            "device": await self.device(),
        }
        exporter = metrics.Exporter(ray_metrics, labels)
        while True:
            try:
                exporter.phases(self._progress.timeline.phases())
                if self._server is not None and self._report is not None:
                    status = self._server.status()
                    self._pulse.take(time.monotonic(), status.generated_tokens)
                    exporter.stage(
                        status,
                        self._server.sessions.numbers,
                        resident_bytes=self._report.measured_bytes,
                        is_last=self._spec.index == self._spec.num_stages - 1,
                    )
            except Exception:
                # A stage serves, whatever becomes of its metrics.
                logger.exception("metrics could not be exported")
                return
            await asyncio.sleep(_EXPORT_S)

    async def stop(self) -> None:
        """Ends a load under way, closes the port and the sessions. The actor is killed after it."""
        self._progress.cancel()
        if self._exporting is not None:
            self._exporting.cancel()
        if self._keeping is not None:
            # A part half written is removed; killed before that, the process would leave it.
            await asyncio.to_thread(self._keeping.join, _KEEPING_S)
        if self._server is not None:
            await self._server.stop()
        # The actor is killed afterwards, and what waits with it.
        await asyncio.wait([asyncio.ensure_future(asyncio.to_thread(tracing.flush))], timeout=_FLUSH_S)


def _check_tls(tls: TLS) -> None:
    """Before anything is fetched. Raises InvalidRequestError that names the node."""
    from ..proto.v1.credentials import check

    try:
        check(tls)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{error}; on node {ray.util.get_node_ip_address()} (--stage-tls-cert)") from None


def _keep(keep: Callable[[], None]) -> None:
    """In a thread of its own: an unload ends it, and whatever else does must not end the stage."""
    try:
        keep()
    except LoadCancelledError:
        pass
    except Exception:
        logger.exception("a part could not be kept")
