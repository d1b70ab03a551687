"""docs/families.md and the README's table say what the tests show."""

from __future__ import annotations

from tests.support import families_table


def test_the_document_is_fresh() -> None:
    assert families_table.DOCUMENT.read_text(encoding="utf-8") == families_table.document(), "run `make families`"


def test_the_readme_is_fresh() -> None:
    text = families_table.README.read_text(encoding="utf-8")
    assert text == families_table.readme(text), "run `make families`"


def test_attention_is_looked_up_where_it_is_and_missed_where_it_is_not() -> None:
    assert families_table.goes_through_the_interface("llama")
    assert not families_table.goes_through_the_interface("bloom")
