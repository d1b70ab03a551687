"""What is wanted of the handle, beside what was measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STAGES, _STREAMS = 4, 8


def targets(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the parts that `report` has."""
    found: dict[str, dict[str, Any]] = {}
    model, hops, wait, recovery = (report.get(part) for part in ("model", "hops", "wait", "recovery"))
    if model and 1 in model["stages"]:
        ratio = model["stages"][1]["one_stream"]["tokens_per_s_to_transformers"]
        found["one_stage_one_stream_to_transformers"] = at_least(0.9, ratio)
    if hops and hops.get("hop_ms"):
        found["hop_ms"] = at_most(1.0, max(hops["hop_ms"].values()))
    if wait and _STREAMS in wait["batches"].get(_STAGES, {}):
        ratio = wait["batches"][_STAGES][_STREAMS]["tokens_per_s_to_one_stream"]
        found[f"{_STREAMS}_streams_over_{_STAGES}_stages_to_one_stream"] = at_least(2.5, ratio)
    if recovery:
        found["recovery_s_beyond_reload"] = at_most(5.0, max(loss["beyond_reload_s"] for loss in recovery["losses"]))
    return found


def at_least(target: float, measured: float) -> dict[str, Any]:
    return {"at_least": target, "measured": measured, "met": measured >= target}


def at_most(target: float, measured: float) -> dict[str, Any]:
    return {"at_most": target, "measured": measured, "met": measured <= target}
