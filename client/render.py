"""Plans, loads and models for people: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

from .modules import grouped
from .nodes import Finding, NodeInfo
from .saving import SaveProgress
from .summary import duration, kv_room, load_prediction, load_summary, memory_bar, rate, recovery_summary, size
from .values import CachedPart, LoadEvent, LoadStarted, LoadWarning, ModelInfo, Plan, StagePlaced, StageProgress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

# Where progress goes to a file, a stage gets a line this often, and one when it is done.
_LINE_EVERY_S = 1.0
# A table that no terminal bounds is as wide as it needs to be: scripts read it, too.
_UNBOUNDED_COLUMNS = 200


def show_plan(plan: Plan) -> None:
    """Prints the stages of `plan`, how full their devices are, its totals, and what a load will take."""
    table = _table(f"{plan.model} ({plan.quantization})")
    _columns(table, "stage", "node", "device", right=("layers", "resident"))
    table.add_column("of its device", no_wrap=True)
    _columns(table, right=("fetch", "KV/token"))
    for stage in plan.stages:
        table.add_row(
            str(stage.index),
            stage.node,
            stage.device,
            f"{stage.first_layer}–{stage.last_layer}",
            size(stage.resident_bytes),
            memory_bar(stage),
            size(stage.fetch_bytes),
            size(stage.kv_bytes_per_token),
        )
    table.add_section()
    kv_bytes = sum(stage.kv_bytes_per_token for stage in plan.stages)
    totals = (size(plan.total_resident_bytes), "", size(plan.total_fetch_bytes), size(kv_bytes))
    table.add_row("total", "", "", "", *totals)
    _print(table)
    notes = (f"note: {note}" for note in plan.notes)
    for line in [*kv_room(plan), *load_prediction(plan), *notes]:
        print(line)


def show_model(info: ModelInfo) -> None:
    """Prints where a model is, and what was predicted and measured there."""
    table = _table(f"{info.name}: {info.plan.model} ({info.plan.quantization}), {info.state}")
    _columns(table, "stage", "node", "device", right=("layers", "predicted", "measured", "difference"))
    measured = {stage.stage: stage.measured_bytes for stage in info.residency}
    for stage in info.plan.stages:
        found = measured.get(stage.index)
        table.add_row(
            str(stage.index),
            stage.node,
            stage.device,
            f"{stage.first_layer}–{stage.last_layer}",
            size(stage.resident_bytes),
            size(found),
            "–" if found is None else f"{found - stage.resident_bytes:+d} B",
        )
    table.add_section()
    found = info.measured_bytes
    predicted = info.plan.total_resident_bytes
    difference = "–" if found is None else f"{found - predicted:+d} B"
    table.add_row("total", "", "", "", size(predicted), size(found), difference)
    _print(table)
    if info.reason:
        print(info.reason)
    for adapter in info.adapters:
        print(f"adapter {adapter.name}: {adapter.kind} from {adapter.path}, {size(adapter.bytes)}")
    for line in [*load_summary(info), *kv_room(info.plan), *recovery_summary(info)]:
        print(line)
    if info.drained_nodes:
        print(f"drained, with a stage still: {', '.join(info.drained_nodes)}")


def show_modules(info: ModelInfo) -> None:
    """Prints what each module of a model holds, as measured; alike modules of several layers are one line."""
    table = _table(None)
    _columns(table, "stage", "module", "layers", "dtype", "device", right=("modules", "bytes"))
    for stage in info.residency:
        for group in grouped(stage.modules.items()):
            table.add_row(
                str(stage.stage),
                group.name,
                group.layers,
                group.dtype,
                group.device,
                str(group.count),
                size(group.bytes),
            )
        table.add_section()
    _print(table)


def show_nodes(nodes: Iterable[NodeInfo]) -> None:
    """Prints a line for each node of the cluster."""
    table = _table(None)
    _columns(table, "node", "host", "id", "state", "stages", right=())
    for node in nodes:
        state = ("ending" if node.by_ray else "drained") if node.drained else "in use"
        stages = ", ".join(f"{each.model} {each.stage} ({each.device})" for each in node.stages)
        table.add_row(node.name, node.hostname, node.node_id[:12], state, stages)
    _print(table)


def finding_lines(finding: Finding) -> list[str]:
    """A finding for people: its verdict first, so that a column of them can be skimmed."""
    where = f" on {finding.node}" if finding.node else ""
    lines = [f"{finding.verdict:<4}  {finding.check}{where}: {finding.finding}"]
    return [*lines, f"      → {finding.remedy}"] if finding.remedy else lines


def show_parts(parts: Iterable[CachedPart]) -> None:
    """Prints a line for each quantized part that a node keeps."""
    table = _table(None)
    _columns(table, "node", "model", "layers", "quantization", "device", "last used", "key", right=("bytes",))
    for part in parts:
        layers = part.about.get("layers") or ["", ""]
        used = datetime.fromtimestamp(part.used_unix_s).astimezone()
        table.add_row(
            part.node,
            str(part.about.get("model", "")),
            f"{layers[0]}–{layers[-1]}",
            part.quantization,
            str(part.about.get("device", "")),
            used.strftime("%Y-%m-%d %H:%M"),
            part.key[:12],
            size(part.bytes),
        )
    _print(table)


def show_models(models: Iterable[ModelInfo]) -> None:
    """Prints a line for each model."""
    table = _table(None)
    _columns(table, "name", "state", "model", "quantization", right=("stages", "bytes"))
    for info in models:
        measured = info.measured_bytes
        table.add_row(
            info.name,
            ", on drained ".join([info.state, *info.drained_nodes[:1]]),
            info.path or info.plan.model,
            info.plan.quantization,
            str(len(info.plan.stages)),
            size(info.plan.total_resident_bytes if measured is None else measured),
        )
    _print(table)


class LoadProgress:
    """Shows a load on stderr: a bar per stage on a terminal, else a line per stage now and then.

    with_summary: at its end, what it took. Who shows the model afterwards (`show_model`) tells that there.
    """

    def __init__(self, stream: TextIO | None = None, *, with_summary: bool = True) -> None:
        self._stream = stream or sys.stderr
        self._with_summary = with_summary
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._places: dict[int, str] = {}
        self._last_line_s: dict[int, float] = {}
        self._done: set[int] = set()

    def __enter__(self) -> LoadProgress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            # Tensors that are resident: what is fetched runs ahead of them, and shows beside.
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("tensors, {task.fields[fetched]}"),
                console=Console(file=self._stream),
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, event: LoadEvent) -> None:
        """Takes one event of `Client.load`."""
        match event:
            case LoadStarted():
                commit = f" at {event.commit[:12]}" if event.commit else ""
                self._say(f"loading {event.name}{commit}")
            case LoadWarning():
                self._say(f"warning: {event.message}")
            case Plan():
                self._places = {stage.index: stage.place for stage in event.stages}
                count = f"{len(event.stages)} stage{'' if len(event.stages) == 1 else 's'}"
                self._say(
                    f"plan: {count}, {size(event.total_fetch_bytes)} to fetch, "
                    f"{size(event.total_resident_bytes)} resident ({event.quantization})"
                )
                if self._bars is not None:
                    for stage in event.stages:
                        self._task(stage.index)
            case StagePlaced():
                self._places[event.stage] = f"{event.node}/{event.device}"
                if self._bars is not None and event.stage in self._tasks:
                    self._bars.update(self._tasks[event.stage], description=self._label(event.stage))
            case StageProgress():
                self._progress(event)
            case ModelInfo():
                self._say(f"{event.name} is ready after {event.load_seconds:.1f} s")
                for line in load_summary(event) if self._with_summary else ():
                    self._say(line)

    def _progress(self, event: StageProgress) -> None:
        if self._bars is not None:
            fetched = _bytes(event)
            task = self._task(event.stage)
            self._bars.update(task, completed=event.tensors_loaded, total=event.tensors, fetched=fetched)
            return
        now = time.monotonic()
        if event.done:
            if event.stage in self._done:
                return
            self._done.add(event.stage)
        elif now - self._last_line_s.get(event.stage, -_LINE_EVERY_S) < _LINE_EVERY_S:
            return
        self._last_line_s[event.stage] = now
        what = f"{event.tensors_loaded} of {event.tensors} tensors"
        if event.done:
            what = f"resident in {size(event.resident_bytes)}"
        self._say(f"{self._label(event.stage)}: {_bytes(event)}, {what}")

    def _task(self, stage: int) -> TaskID:
        assert self._bars is not None
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(self._label(stage), total=None, fetched="nothing")
        return self._tasks[stage]

    def _label(self, stage: int) -> str:
        place = self._places.get(stage)
        return f"stage {stage} on {place}" if place else f"stage {stage}"

    def _say(self, line: str) -> None:
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)


def _bytes(event: StageProgress) -> str:
    """ "1.20 GiB of 4.00 GiB fetched at 310.2 MB/s, 9 s left"."""
    text = f"{size(event.fetched_bytes)} of {size(event.fetch_bytes)} {'from the cache' if event.cached else 'fetched'}"
    if event.bytes_per_second:
        text += f" at {rate(event.bytes_per_second)}"
    if event.seconds_left and not event.done:
        text += f", {duration(event.seconds_left)} left"
    return text


def _table(title: str | None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(title=None if title is None else Text(title), title_justify="left", box=box.SIMPLE_HEAD)


def _columns(table: Table, *left: str, right: tuple[str, ...]) -> None:
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)


def _print(table: Table) -> None:
    from rich.console import Console

    Console(markup=False, width=None if sys.stdout.isatty() else _UNBOUNDED_COLUMNS).print(table)


class SaveLines:
    """Shows a save on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._last_line_s = -_LINE_EVERY_S
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> SaveLines:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("saving"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            self._bars = Progress(*columns, console=Console(file=self._stream))
            self._bars.start()
            self._task = self._bars.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, progress: SaveProgress) -> None:
        """Takes what `save_pretrained` tells of its progress."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=progress.written_bytes, total=progress.total_bytes)
            return
        now = time.monotonic()
        if progress.written_bytes < progress.total_bytes and now - self._last_line_s < _LINE_EVERY_S:
            return
        self._last_line_s = now
        print(f"saved {size(progress.written_bytes)} of {size(progress.total_bytes)}", file=self._stream, flush=True)
