"""docs/plans.md says what its command prints, and the plan is never the worse one where both are pipelines."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.compare_accelerate import rows

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "plans.md").read_text(encoding="utf-8")
WRITTEN_WITH = dict(re.findall(r"(accelerate|transformers) (\d+\.\d+\.\d+)", DOCUMENT))


@cache
def table() -> list[str]:
    return list(rows())


def test_the_document_is_what_the_command_prints() -> None:
    if {name: version(name) for name in WRITTEN_WITH} != WRITTEN_WITH:
        pytest.skip(f"written with {WRITTEN_WITH}: other versions map otherwise")
    assert DOCUMENT.endswith("\n\n" + "\n".join(table()) + "\n"), "run python -m bench.compare_accelerate"


def test_whatever_fits_is_laid_out_and_no_fuller() -> None:
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for row in table()[2:]:
        model, _, _, fullest, fits, cuts, own_fullest, own_fits, own_cuts = row.strip("| ").split(" | ")
        assert own_fits == "yes", row
        assert int(own_cuts) <= int(cuts), row
        if fits == "yes" and "tied" not in model:
            least, own = (float(number) * units[unit] for number, unit in (fullest.split(), own_fullest.split()))
            assert own <= least, row
