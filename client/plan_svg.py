"""A plan as a picture: the cluster's nodes, their devices by size, and the model laid over them. Pure."""

from __future__ import annotations

from xml.sax.saxutils import escape

from .summary import duration, size
from .values import DeviceCapacity, Plan, StagePlan

_WIDTH, _HEIGHT, _GAP = 112, 150, 10  # of a device, in pixels
_LABELS = 46  # what is written below it
_NODE_TOP, _NODE_PAD = 26, 10
_MARGIN, _TITLE = 20, 64
_MOST_COLUMNS = 16
_COLORS = ("#4878a8", "#5b9a68", "#c08a3e", "#8d6cab", "#b5605a", "#4f9aa0")
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #222 }
.title { font-size: 17px; font-weight: 600 } .small { font-size: 10px; fill: #555 } .stage { font-weight: 600 }
.node { fill: #f6f7f9; stroke: #c4c9d1 } .device { fill: #fff; stroke: #8c95a3 } .unused { stroke-dasharray: 3 3 }
.room { fill: #d9dee6 } .path { fill: none; stroke: #d0342c; stroke-width: 1.5; opacity: .75; marker-end: url(#to) }
"""


def plan_svg(plan: Plan) -> str:
    """An SVG document. Heights are to scale: the tallest device is the largest."""
    stages = {(stage.node, stage.device): stage for stage in plan.stages}
    devices = plan.devices or tuple(
        DeviceCapacity(node=stage.node, device=stage.device, capacity_bytes=stage.capacity_bytes)
        for stage in plan.stages
    )
    nodes: dict[str, list[DeviceCapacity]] = {}
    for device in devices:
        nodes.setdefault(device.node, []).append(device)
    largest = max([device.capacity_bytes for device in devices] + [stage.resident_bytes for stage in plan.stages] + [1])

    parts: list[str] = []
    centers: dict[int, tuple[float, float]] = {}
    x, y, row_height, right = _MARGIN, _MARGIN + _TITLE, 0, 0
    for node, members in nodes.items():
        columns = min(len(members), _MOST_COLUMNS)
        rows = -(-len(members) // columns)
        width = columns * (_WIDTH + _GAP) - _GAP + 2 * _NODE_PAD
        height = _NODE_TOP + rows * (_HEIGHT + _LABELS + _GAP) - _GAP + _NODE_PAD
        if x > _MARGIN and x + width > _MARGIN + _MOST_COLUMNS * (_WIDTH + _GAP) + 2 * _NODE_PAD:
            x, y, row_height = _MARGIN, y + row_height + _MARGIN, 0
        parts.append(f'<rect class="node" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        parts.append(f'<text x="{x + _NODE_PAD}" y="{y + 17}">{escape(node)}</text>')
        for index, device in enumerate(members):
            left = x + _NODE_PAD + index % columns * (_WIDTH + _GAP)
            top = y + _NODE_TOP + index // columns * (_HEIGHT + _LABELS + _GAP)
            stage = stages.get((device.node, device.device))
            parts.append(_device(device, stage, left, top, largest))
            if stage is not None:
                centers[stage.index] = (left + _WIDTH / 2, top + _HEIGHT - 6)
        right = max(right, x + width)
        row_height = max(row_height, height)
        x += width + _MARGIN
    path = [_arrow(centers[index], centers[index + 1]) for index in sorted(centers) if index + 1 in centers]
    total_width, total_height = max(right + _MARGIN, 560), y + row_height + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width}" height="{total_height}" '
        f'viewBox="0 0 {total_width} {total_height}" role="img">\n<title>{escape(_heading(plan))}</title>\n'
        f"<style>{_STYLE}</style>\n"
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#d0342c"/></marker></defs>\n'
        f'<rect width="{total_width}" height="{total_height}" fill="#fff"/>\n'
        f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 14}">{escape(_heading(plan))}</text>\n'
        f'<text class="small" x="{_MARGIN}" y="{_MARGIN + 34}">{escape(_subtitle(plan))}</text>\n'
        + "\n".join([*parts, *path])
        + "\n</svg>\n"
    )


def _heading(plan: Plan) -> str:
    return f"{plan.model} ({plan.quantization})"


def _subtitle(plan: Plan) -> str:
    count = len(plan.stages)
    text = (
        f"{count} stage{'' if count == 1 else 's'}, {size(plan.total_resident_bytes)} resident, "
        f"{size(plan.total_fetch_bytes)} to fetch"
    )
    if plan.predicted_load_seconds:
        text += f", about {duration(plan.predicted_load_seconds)} to load"
    return text


def _device(device: DeviceCapacity, stage: StagePlan | None, left: float, top: float, largest: int) -> str:
    """A column as tall as the device's memory, filled from below: weights, then what is kept free for their use."""

    def pixels(bytes_: int) -> float:
        return round(_HEIGHT * bytes_ / largest, 2)

    bottom = top + _HEIGHT
    tall = max(2.0, pixels(device.capacity_bytes))
    kind = "device" if stage is not None else "device unused"
    parts = [f'<rect class="{kind}" x="{left}" y="{bottom - tall}" width="{_WIDTH}" height="{tall}" rx="3"/>']
    if stage is not None:
        filled, room = pixels(stage.resident_bytes), pixels(stage.kv_bytes + stage.workspace_bytes)
        color = _COLORS[stage.index % len(_COLORS)]
        parts.append(
            f'<rect x="{left}" y="{bottom - filled}" width="{_WIDTH}" height="{max(1.0, filled)}" rx="2" '
            f'fill="{color}"/>'
        )
        if room:
            parts.append(
                f'<rect class="room" x="{left}" y="{bottom - filled - room}" width="{_WIDTH}" height="{room}"/>'
            )
        layers = f"stage {stage.index}: {stage.first_layer}–{stage.last_layer}"
        parts.append(f'<text class="stage" x="{left}" y="{bottom + 27}">{layers}</text>')
        parts.append(f'<text class="small" x="{left}" y="{bottom + 40}">{size(stage.resident_bytes)}</text>')
    label = f"{device.device}, {size(device.capacity_bytes)}"
    parts.append(f'<text class="small" x="{left}" y="{bottom + 13}">{escape(label)}</text>')
    return "".join(parts)


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    bend = max(14.0, min(60.0, abs(x2 - x1) / 6))
    return f'<path class="path" d="M{x1} {y1} C{x1} {y1 - bend}, {x2} {y2 - bend}, {x2} {y2}"/>'
