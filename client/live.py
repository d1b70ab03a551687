"""`show --watch`: a model for as long as it is there. Redrawn on a terminal, else a line whenever it changes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from .summary import duration, rate, size
from .views import ClusterEvent, ClusterView, ModelView, StageView

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR = 12  # characters
_EVENTS = 8
# Wider than any table.
_ANY_WIDTH = 10_000


def follow(views: Iterable[ClusterView]) -> None:
    """Shows one model's views on stdout, to their end."""
    if sys.stdout.isatty():
        _redraw(views)
        return
    for line in plain_lines(views):
        print(line, flush=True)


def plain_lines(views: Iterable[ClusterView]) -> Iterator[str]:
    """A line for each event, and for each view that says something else than the one before."""
    told: set[tuple[str, float]] = set()
    last = ""
    for view in views:
        for event in view.events:
            if (event.kind, event.unix_s) not in told:
                told.add((event.kind, event.unix_s))
                yield f"{_clock(event.unix_s)} {_event(event)}"
        for model in view.models:
            line = _line(model)
            if line != last:
                last = line
                yield f"{_clock(view.unix_s)} {line}"


def _redraw(views: Iterable[ClusterView]) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, highlight=False)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        for view in views:
            live.update(picture(view), refresh=True)


def picture(view: ClusterView) -> RenderableType:
    """What a terminal shows of a view: the model, its stages, what has happened."""
    from rich import box
    from rich.console import Console, ConsoleOptions, Group, RenderResult
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    class Fitting:
        """A table where it has room, else `lines`: columns that are cut to nothing tell nothing."""

        def __init__(self, table: Table, lines: RenderableType) -> None:
            self._table, self._lines = table, lines

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            wanted = Measurement.get(console, options.update(width=_ANY_WIDTH), self._table).maximum
            yield self._table if wanted <= options.max_width else self._lines

    parts: list[RenderableType] = []
    for model in view.models:
        table = Table(title=Text(f"{model.name}: {_head(model)}"), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("stage", justify="right", no_wrap=True)
        table.add_column("device", no_wrap=True)
        table.add_column("layers", justify="right", no_wrap=True)
        table.add_column("weights", justify="right", no_wrap=True)
        loading = model.state == "loading"
        table.add_column("loaded" if loading else "keys and values", no_wrap=True)
        table.add_column("" if loading else "sessions", justify="left" if loading else "right")
        for stage in model.stages:
            table.add_row(
                str(stage.index),
                stage.place,
                f"{stage.first_layer}–{stage.last_layer}",
                size(stage.resident_bytes),
                *(_progress(stage) if loading else _use(stage)),
            )
        lines = [Text(f"{model.name}: {_head(model)}"), *(Text(_stage(stage, loading)) for stage in model.stages)]
        parts += [Fitting(table, Group(*lines)), Text(_activity(model))]
        if model.reason:
            parts.append(Text(model.reason))
    if view.events:
        parts.append(Text(""))
        parts += [Text(f"{_clock(event.unix_s)} {_event(event)}") for event in view.events[-_EVENTS:]]
    return Group(*parts)


def _head(model: ModelView) -> str:
    kind = "" if model.quantization in ("", "none") else f" ({model.quantization})"
    return f"{model.path}{kind}, {model.state}"


def _activity(model: ModelView) -> str:
    if model.state == "loading":
        return f"loading for {duration(model.load_seconds)}"
    text = f"{model.tokens_per_second:.1f} tokens/s, {model.sessions_running} sessions running"
    text += f" of {model.max_sessions}" if model.max_sessions else ""
    text += f", {model.sessions_waiting} waiting"
    if model.kv_tokens:
        text += f", {model.reserved_tokens:,} of {model.kv_tokens:,} tokens reserved"
    if model.recoveries:
        text += f", recovered {model.recoveries} times, last in {model.recovery_seconds:.1f} s"
    return text


def _line(model: ModelView) -> str:
    """The model in one line. While it loads, without what changes every second by itself."""
    text = f"{model.name} {model.state}"
    if model.state == "loading":
        return "; ".join([text, *(f"stage {stage.index}: {' '.join(_progress(stage)[1:])}" for stage in model.stages)])
    kv = sum(stage.kv_bytes for stage in model.stages)
    budget = sum(stage.kv_budget_bytes for stage in model.stages)
    text += f"; {_activity(model)}; {size(kv)} of {size(budget)} keys and values"
    missing = [str(stage.index) for stage in model.stages if not stage.answers]
    text += f"; no answer from stage {', '.join(missing)}" if missing else ""
    return f"{text}; {model.reason}" if model.reason else text


def _stage(stage: StageView, loading: bool) -> str:
    """A row of the table, for a terminal that is too narrow for one."""
    layers = f"layers {stage.first_layer}–{stage.last_layer}"
    text = f"stage {stage.index} on {stage.place}, {layers}, {size(stage.resident_bytes)}: "
    if loading:
        return text + " ".join(_progress(stage))
    use, sessions = _use(stage)
    return text + (f"{use}, {sessions} sessions" if sessions else use)


def _use(stage: StageView) -> tuple[str, str]:
    if not stage.answers:
        return "doesn't answer", ""
    part = stage.kv_bytes / stage.kv_budget_bytes if stage.kv_budget_bytes else 0.0
    return f"{_bar(part)} {size(stage.kv_bytes)} of {size(stage.kv_budget_bytes)}", str(stage.sessions)


def _progress(stage: StageView) -> tuple[str, str]:
    progress = stage.progress
    if progress is None:
        return _bar(0.0), "waits for its worker"
    part = progress.tensors_loaded / progress.tensors if progress.tensors else 0.0
    text = f"{size(progress.fetched_bytes)} of {size(progress.fetch_bytes)}"
    if progress.done:
        return _bar(1.0), f"{text}, resident"
    if progress.bytes_per_second:
        text += f" at {rate(progress.bytes_per_second)}"
    if progress.seconds_left:
        text += f", {duration(progress.seconds_left)} left"
    return _bar(part), text


def _bar(part: float) -> str:
    full = min(_BAR, round(_BAR * part)) or (1 if part > 0 else 0)
    return "█" * full + "░" * (_BAR - full)


def _event(event: ClusterEvent) -> str:
    times = f" ({event.count} times)" if event.count > 1 else ""
    return f"{event.kind}: {event.text}{times}"


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%H:%M:%S")
