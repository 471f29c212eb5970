"""The English of what the project ships: no new marks of translated sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.english import DOCSTRING, MARKS, ROOT, files, marks, openings, pattern, room, table


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_no_marks(path: Path) -> None:
    found = list(map(str, marks(path)))
    assert not found, "\n".join(found)


def test_files_are_found_in_every_folder() -> None:
    found = {room(str(path.relative_to(ROOT))) for path in files()}
    assert {"README.md", "docs", "jobs", "env", "benchmarks", "analysis", "dlion_mpi", "dlion_mpi/loop"} <= found


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("sent beside the loop", "besides?"),
        ("class Beside:", "besides?"),
        ("it goes\n    # on later", "(go|goes|going|gone|went) on"),
        ("links_owed = 3", "(owe|owes|owed|owing)"),
        ("in a file of its own", "of (its|their|your|one's) own"),
    ],
)
def test_a_mark_is_found(text: str, mark: str) -> None:
    assert mark in MARKS
    assert pattern(mark).search(text)


def test_a_word_that_only_contains_a_mark_is_not_one() -> None:
    assert not any(pattern(mark).search("an insight that was foretold, lowest, undertaking") for mark in MARKS)


def test_docstrings_begin_with_a_verb_or_a_noun_phrase() -> None:
    text = '"""What is sent."""\ndef f():\n    """Whether a link is full."""\nclass C:\n    """That which owns."""\n'
    assert [line for line, _ in openings(text)] == [1, 5]
    assert DOCSTRING not in MARKS


def test_the_table_ends_with_the_sum() -> None:
    name, found, lines, rate = table().splitlines()[-1].split()
    assert name == "all"
    assert float(rate) == pytest.approx(1000 * int(found) / int(lines), abs=0.05)
