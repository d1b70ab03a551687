"""The modules of a resident model for people: alike ones of several layers as one line. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .values import ModuleResidency

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleGroup:
    """Modules that differ by their layer's number (and their expert's) alone: `name` holds "*" for it, `layers` says
    which: "0–14"."""

    name: str
    layers: str
    count: int
    dtype: str
    bytes: int  # of all of them
    device: str


def grouped(modules: Iterable[tuple[str, ModuleResidency]]) -> Iterator[ModuleGroup]:
    """The modules of one stage, in their order; every byte is in one group."""
    groups: dict[tuple[str, str, str], list[tuple[int | None, int]]] = {}
    for name, held in modules:
        found = _NUMBER.search(name)
        pattern = _NUMBER.sub("*", name)
        layer = None if found is None else int(found[0])
        groups.setdefault((pattern, held.dtype, held.device), []).append((layer, held.bytes))
    for (pattern, dtype, device), members in groups.items():
        layers = sorted({layer for layer, _ in members if layer is not None})
        yield ModuleGroup(
            name=pattern,
            layers=_ranges(layers),
            count=len(members),
            dtype=dtype,
            bytes=sum(size for _, size in members),
            device=device,
        )


def _ranges(numbers: list[int]) -> str:
    """ "0–3, 5" for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
