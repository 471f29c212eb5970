"""The tables of docs/what-trains.md are those of the rows that are tested."""

from __future__ import annotations

from dlion_mpi.learner.backend import light

with light():
    import keras  # noqa: F401

from tests.keras_rows.row import BACKENDS, GROUPS
from tests.keras_rows.rows import ROWS
from tests.keras_rows.table import PAGE, filled


def test_the_page_has_the_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run python -m tests.keras_rows.table"


def test_rows_have_names_of_their_own_and_say_why_a_backend_is_missing() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 40
    assert {row.group for row in ROWS} == set(GROUPS)
    for row in ROWS:
        assert row.note or set(row.backends) == set(BACKENDS), row.name
