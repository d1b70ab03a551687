"""Log lines and spans: each by itself, and both over the whole way, from `shardlift up` to the workers' own files."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardlift
from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.worker import logs, tracing
from shardlift.worker.logs import LogSettings
from tests.support import checkpoints
from tests.support.cluster import eventually
from tests.support.otlp import Receiver, attributes, receiver

PACKAGE = "shardlift"


@pytest.fixture
def lines() -> Iterator[Any]:
    """Configures the package's logger, and gives what it writes; puts it back afterwards."""
    logger = logging.getLogger(PACKAGE)
    before = logger.handlers[:], logger.level, logger.propagate
    stream = io.StringIO()

    def configure(settings: LogSettings, **subjects: str) -> io.StringIO:
        logs.configure(settings, subjects, stream=stream)
        return stream

    yield configure
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


# -- lines ------------------------------------------------------------------------------------------------------------


def test_json_lines_say_what_they_are_about(lines: Any) -> None:
    stream = lines(LogSettings(format="json"), model="m", stage="2")
    logger = logging.getLogger(f"{PACKAGE}.worker.service")

    async def request(session: str) -> None:
        logs.note(session=session)
        await asyncio.sleep(0)
        await asyncio.create_task(later())

    async def later() -> None:
        logger.info('a "quoted"\nline of %s', "two")

    async def two() -> None:
        await asyncio.gather(request("one"), request("other"))

    asyncio.run(two())
    logger.debug("not told")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed", extra={"model": "another", "load_id": "l"})
    first, second, last = map(json.loads, stream.getvalue().splitlines())
    assert first | {"time": ""} == {
        **{"time": "", "level": "INFO", "logger": "shardlift.worker.service", "message": 'a "quoted"\nline of two'},
        **{"model": "m", "stage": "2", "session": "one"},
    }
    assert second["session"] == "other"
    assert (last["model"], last["load_id"], last["stage"]) == ("another", "l", "2")
    assert last["exception"].endswith("ValueError: why")
    assert "session" not in last
    assert first["time"].endswith("+00:00")


def test_text_lines_end_with_what_they_are_about(lines: Any) -> None:
    stream = lines(LogSettings(level="WARNING"), model="m")
    logging.getLogger(f"{PACKAGE}.x").info("not told")
    logging.getLogger(f"{PACKAGE}.x").warning("told")
    logs.configure(LogSettings(), stream=stream)
    logging.getLogger(f"{PACKAGE}.x").info("once")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("WARNING shardlift.x: told [model=m]")
    assert second.endswith("INFO shardlift.x: once"), "configured anew, not twice"


def test_a_file_has_the_same_lines_and_stays_bounded(
    lines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = lines(LogSettings())
    file = tmp_path / "gateway.log"
    logs.configure(LogSettings(), stream=stream, file=str(file))
    logger = logging.getLogger(f"{PACKAGE}.x")
    logger.info("told twice")
    assert file.read_text() == stream.getvalue()
    monkeypatch.setattr(logs, "_MOST_FILE_BYTES", 1000)
    logs.configure(LogSettings(), stream=stream, file=str(file))
    for _ in range(100):
        logger.info("x" * 100)
    kept = [each.stat().st_size for each in tmp_path.iterdir()]
    assert len(kept) == 2
    assert max(kept) <= 1000
    # Where there is no such folder there is no file, and it serves all the same.
    logs.configure(LogSettings(), stream=stream, file=str(tmp_path / "not" / "there"))
    assert stream.getvalue().splitlines()[-1].endswith("No such file or directory")
    logs.configure(LogSettings(), stream=stream)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LogSettings.of() == LogSettings(format="text", level="INFO")
    monkeypatch.setenv("SHARDLIFT_LOG_FORMAT", "json")
    monkeypatch.setenv("SHARDLIFT_LOG_LEVEL", "debug")
    assert LogSettings.of() == LogSettings(format="json", level="DEBUG")
    assert LogSettings.of("text", "error") == LogSettings(format="text", level="ERROR")
    with pytest.raises(InvalidRequestError, match="log format 'xml' is none: write text or json"):
        LogSettings.of("xml")
    with pytest.raises(InvalidRequestError, match="log level 'LOUD' is none"):
        LogSettings.of(level="loud")


# -- spans ------------------------------------------------------------------------------------------------------------


def test_without_a_receiver_a_span_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert not tracing.configure("a test")
    with tracing.span("one", "00-" + "1" * 32 + "-" + "2" * 16 + "-01") as span:
        assert span is tracing.OFF
        assert span.child("two") is tracing.OFF
        assert span.traceparent == ""
        span.note(x=1)
        span.past("three", 0.0, 1.0)
    assert tracing.given([("traceparent", "x")]) == ""
    code = "import sys, shardlift.worker.tracing as t; t.configure('x'); t.span('y').end(); "
    code += "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_spans_are_sent_with_their_parents_times_and_failures() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the OTLP exporter is not installed")
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    code = f"""
import time
from shardlift.worker import tracing
assert tracing.configure("a test", model="m")
with tracing.span("outer", {parent!r}, stage=1) as outer:
    now = time.perf_counter()
    outer.past("inner", now - 2.0, now - 0.5, bytes=7)
try:
    with tracing.span("failing", "nonsense"):
        raise ValueError("why\\nnot")
except ValueError:
    pass
tracing.flush()
"""
    with receiver() as got:
        environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": got.endpoint}
        subprocess.run([sys.executable, "-c", code], timeout=120, check=True, env=environment)
        (outer,), (inner,), (failing,) = got.named("outer"), got.named("inner"), got.named("failing")
        resource = got.spans[0][0]
    assert (resource["service.name"], resource["shardlift.model"]) == ("a test", "m")
    assert outer.trace_id.hex() == "1" * 32
    assert outer.parent_span_id.hex() == "2" * 16
    assert attributes(outer) == {"shardlift.stage": 1}
    assert inner.parent_span_id == outer.span_id
    assert inner.end_time_unix_nano - inner.start_time_unix_nano == pytest.approx(1.5e9, rel=1e-6)
    assert attributes(inner) == {"shardlift.bytes": 7}
    assert failing.parent_span_id == b"", "what isn't a traceparent begins a trace"
    assert failing.status.message == "why not"
    assert attributes(failing)["error.type"] == "ValueError"


def test_a_receiver_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's own limit of a flush is none: it tries until its exporter gives up."""
    over = threading.Event()

    class Stuck:
        def force_flush(self, *_: object) -> None:
            over.wait(60)

    monkeypatch.setattr(tracing, "_provider", Stuck())
    monkeypatch.setattr(tracing, "_FLUSH_S", 0.2)
    begun = time.monotonic()
    tracing.flush()
    assert time.monotonic() - begun < 5
    over.set()


# -- the whole way ----------------------------------------------------------------------------------------------------


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardlift.client.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_a_load_and_a_generation_are_told_and_traced(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the OTLP exporter is not installed")
    folder = checkpoints.tiny("llama", tmp_path / "llama")
    # Short, for the names of Ray's sockets.
    with receiver() as got, tempfile.TemporaryDirectory(prefix="told") as rays:
        environment = os.environ | {
            "SHARDLIFT_HOME": str(tmp_path / "home"),
            "SHARDLIFT_TOKEN": "the gateways secret",
            "OTEL_EXPORTER_OTLP_ENDPOINT": got.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "RAY_TMPDIR": rays,
        }
        options = ("--num-cpus", "1", "--log-format", "json", "--log-level", "debug", "--page-port", "off")
        started = json.loads(run("up", "--json", *_port(), *options, environment=environment).stdout)
        try:
            assert started["page"] is None
            with shardlift.connect(started["address"], "the gateways secret") as client:
                model = client.load(str(folder), name="told", num_stages=2, token="hf_the_hubs_secret")
                model.generate([[5, 6, 7]], max_new_tokens=4, do_sample=False)
                eventually(lambda: len(got.named("decode")) == 1 and bool(got.named("Generate")), "no spans", 30)
                told = list(_told(Path(rays)))
                model.unload()
        finally:
            run("down", environment=environment)
        everything = "".join(file.read_text(errors="replace") for file in _files(Path(rays)))
    assert everything
    _check_spans(got)
    _check_lines(told)
    assert "the gateways secret" not in everything
    assert "hf_the_hubs_secret" not in everything


def _port() -> tuple[str, str]:
    from tests.support.ray_start import free_port

    return "--port", str(free_port("127.0.0.1"))


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("logs/*")):
        if file.is_file() and file.suffix in (".err", ".out", ".log"):
            yield file


def _told(folder: Path) -> Iterator[dict[str, str]]:
    for file in _files(folder):
        if file.name.startswith("worker-"):
            for line in file.read_text(errors="replace").splitlines():
                if line.startswith("{"):
                    yield json.loads(line)


def _check_lines(told: list[dict[str, str]]) -> None:
    about = [line for line in told if line.get("model") == "told"]
    loads = {line["load_id"] for line in about if "load_id" in line}
    assert len(loads) == 1
    assert {line["stage"] for line in about if line["message"].startswith("loaded ")} == {"0", "1"}
    assert any(line["message"].startswith("load-ready: 2 stages resident") for line in about)
    (generation,) = (line for line in about if line["message"].startswith("a generation ended (length): 4 steps"))
    (call,) = (line for line in about if line["message"] == "Generate ended: ok")
    assert generation["session"] == call["session"], "the same in the gateway's lines and in the stage's"
    assert generation["stage"] == "1"
    assert generation["level"] == "DEBUG"


def _check_spans(got: Receiver) -> None:
    (load,) = got.named("load")
    children = {span.name for _, span in got.spans if span.parent_span_id == load.span_id}
    assert children == {"resolve", "plan", "place", "stages", "join"}
    (stages,) = got.named("stages")
    of_stages = got.named("stage load")
    assert len(of_stages) == 2
    assert {span.parent_span_id for span in of_stages} == {stages.span_id}
    assert {span.trace_id for span in of_stages} == {load.trace_id}
    phases = {span.name for _, span in got.spans if span.parent_span_id == of_stages[0].span_id}
    assert {"fetch", "build", "wait"} <= phases
    (call,), (of_stage,) = got.named("Generate"), got.named("stage Generate")
    assert of_stage.parent_span_id == call.span_id
    assert attributes(call)["shardlift.outcome"] == "ok"
    assert attributes(of_stage)["shardlift.outcome"] == "length"
    parts = {span.name for _, span in got.spans if span.parent_span_id == of_stage.span_id}
    assert parts == {"queue", "prefill", "decode"}
    services = {resource["service.name"] for resource, _ in got.spans}
    assert services == {"shardlift-gateway", "shardlift-stage"}
