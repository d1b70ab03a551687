"""What a finished load says of itself: how long it took, what was read, and which link held it up. Pure."""

from __future__ import annotations

from .values import ModelInfo, Plan, StagePlan, StageResidency

_BAR = 10  # characters

# What a person calls the phases of a load; {link} is what the bytes came over.
_WORK = {
    "fetch": "reading from {link}",
    "copy": "copying to the device",
    "quantize": "quantizing",
    "cast": "casting to the model's dtype",
    "convert": "converting tensors",
    "build": "building the model's modules",
    "store": "keeping the part in the node's cache",
}


def load_summary(info: ModelInfo) -> list[str]:
    """Lines for people; none where the gateway told of no load."""
    loads = [stage for stage in info.residency if stage.load.seconds]
    if not loads:
        return []
    slowest = max(loads, key=lambda stage: stage.load.seconds)
    fetched, cached = sum(stage.fetched_bytes for stage in loads), sum(stage.load.cached_bytes for stage in loads)
    read = [f"{size(fetched)} fetched"] if fetched or not cached else []
    read += [f"{size(cached)} read from the nodes' caches"] if cached else []
    rest_s = max(0.0, info.load_seconds - slowest.load.seconds)
    pace = _rate(fetched + cached, slowest.load.seconds)
    return [
        f"{' and '.join(read)} in {slowest.load.seconds:.1f} s ({pace}), after {rest_s:.1f} s of planning, placing and "
        "starting workers",
        f"bottleneck: {_bottleneck(slowest)}",
    ]


def load_prediction(plan: Plan) -> list[str]:
    """What a load will take, and why; nothing where no speed is known."""
    if not plan.predicted_load_seconds:
        return []
    stage = plan.stages[plan.load_bottleneck_stage]
    if plan.load_bottleneck == "link":
        how = "as last measured" if plan.link_is_measured else "as given"
        why = f"the link to node {stage.node}, at {rate(plan.link_bytes_per_second)} {how}"
    else:
        why = f"converting and quantizing on {stage.place}, as last measured"
    return [f"about {duration(plan.predicted_load_seconds)} to load; bottleneck: stage {stage.index}, {why}"]


def kv_room(plan: Plan) -> list[str]:
    """How many tokens have room for their keys and values, and what that takes; nothing where it is unknown."""
    if not plan.kv_tokens:
        return []
    budget = sum(stage.kv_budget_bytes for stage in plan.stages)
    return [f"room for {plan.kv_tokens:,} tokens of all sessions together ({size(budget)} for keys and values)"]


def recovery_summary(info: ModelInfo) -> list[str]:
    """How often stages were lost and brought back; nothing where none was."""
    if not info.recoveries:
        return []
    times = "once" if info.recoveries == 1 else f"{info.recoveries} times"
    last = "" if info.recoveries == 1 else "the last time "
    return [f"recovered {times}, {last}in {info.recovery_seconds:.1f} s"]


def memory_bar(stage: StagePlan) -> str:
    """How full a stage makes its device: "████▒░░░░░  45 %"; weights, then what is kept free for their use."""
    if not stage.capacity_bytes:
        return "–"
    used = stage.resident_bytes / stage.capacity_bytes
    kept = (stage.resident_bytes + stage.workspace_bytes + stage.kv_bytes) / stage.capacity_bytes
    full, upto = (min(_BAR, max(1, round(_BAR * part))) for part in (used, kept))
    return f"{'█' * full}{'▒' * (upto - full)}{'░' * (_BAR - upto)} {100 * kept:3.0f} %"


def _bottleneck(stage: StageResidency) -> str:
    """E.g. "stage 1, quantizing: 6.1 of 8.2 s, at 95.2 MB/s"."""
    load = stage.load
    work = _WORK.get(load.bottleneck, load.bottleneck).format(link=load.link or "the source")
    # Reads and copies run beside the load: what it lost to them is its waiting.
    own = load.phases.get("wait" if load.bottleneck in ("fetch", "copy") else load.bottleneck)
    seconds = own.seconds if own is not None else 0.0
    text = f"stage {stage.stage}, {work}: {seconds:.1f} of {load.seconds:.1f} s"
    phase = load.phases.get(load.bottleneck)
    if phase is None or not phase.bytes or not phase.seconds:
        return text
    busy_s = phase.seconds / max(1, load.connections) if load.bottleneck in ("fetch", "copy") else phase.seconds
    return f"{text}, at {_rate(phase.bytes, busy_s)}"


def _rate(bytes_: float, seconds: float) -> str:
    return rate(bytes_ / seconds) if seconds > 0 else "–"


def rate(bytes_per_second: float) -> str:
    """As links are rated, in decimal units: "95.2 MB/s"."""
    value, units = bytes_per_second, ["B/s", "kB/s", "MB/s", "GB/s"]
    unit = units.pop(0)
    while value >= 1000 and units:
        value, unit = value / 1000, units.pop(0)
    return f"{value:.0f} {unit}" if unit == "B/s" else f"{value:.1f} {unit}"


def size(bytes_: int | None) -> str:
    """`bytes_` in binary units: "1.50 GiB"; "–" for None."""
    if bytes_ is None:
        return "–"
    value, units = float(bytes_), ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = units.pop(0)
    while value >= 1024 and units:
        value, unit = value / 1024, units.pop(0)
    return f"{bytes_} B" if unit == "B" else f"{value:.2f} {unit}"


def duration(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "1 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
