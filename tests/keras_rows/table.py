"""The tables of docs/what-trains.md: `python -m tests.keras_rows.table` writes them into the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.keras_rows.row import BACKENDS, GROUPS, Row
from tests.keras_rows.rows import ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs/what-trains.md"
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}


def table(group: str) -> str:
    """The rows of a group."""
    lines = [_line([group, *TITLES.values()]), "| --- " * (1 + len(TITLES)) + "|"]
    rows = [row for row in ROWS if row.group == group]
    return "\n".join(lines + [_line([row.text, *(_cell(row, backend) for backend in BACKENDS)]) for row in rows])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, backend: str) -> str:
    return "yes" if backend in row.backends else f"no: {row.note}"


def filled(page: str) -> str:
    """The page with the present tables between its marks."""
    for group in GROUPS:
        head, rest = page.split(f"<!-- rows: {group} -->\n")
        page = f"{head}<!-- rows: {group} -->\n{table(group)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
