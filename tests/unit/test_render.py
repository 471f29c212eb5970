"""A view fits whatever terminal there is, and says what is not known."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
from rich.cells import cell_len

from dlion_mpi.config.target import Target
from dlion_mpi.view.forms import clock, duration, size, text_of
from dlion_mpi.view.render import lines, render
from dlion_mpi.view.snapshot import Goal, RankSnapshot, Snapshot, Tally, vector_length
from tests import runfiles

METRICS = ("val_loss", "accuracy")


def snapshot(workers: int = 3, **changes: object) -> Snapshot:
    ranks = []
    for rank in range(workers):
        tally = Tally(rank, workers, METRICS)
        for step in range(5):
            tally.add(runfiles.record(rank, workers, step))
        ranks.append(tally.take({"accuracy": 0.5 + rank / 100, "val_loss": 2.0 - rank / 10}))
    made = Snapshot(
        title="dlion: dlion, bounded, 3 ranks, cipher, fashion-mnist, runs/a",
        workers=workers,
        ranks=ranks,
        goal=Goal(steps=20, target=Target("accuracy", ">=", 0.8)),
        elapsed_s=125.0,
        metrics=METRICS,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def unknown(rank: int, workers: int) -> RankSnapshot:
    """A rank of which nothing is known."""
    return RankSnapshot.from_vector(rank, np.full(vector_length(workers, METRICS), math.nan), METRICS)


def plain(made: Snapshot, width: int, height: int) -> list[str]:
    return render(made, width, height, colour=False).split("\n")


def words(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_everything_is_there_where_there_is_room() -> None:
    shown = plain(snapshot(), 100, 30)
    assert shown[0] == "dlion: dlion, bounded, 3 ranks, cipher, fashion-mnist, runs/a"
    assert shown[1].endswith("25%; 2:05; 0:22 left; accuracy 51.0%, target 80.0%")  # 15 steps of 1.5 s
    assert words(shown[2]) == [
        "rank",
        "steps",
        "accuracy",
        "loss",
        "batch",
        "step time",
        "samples/s",
        "waiting",
        "val_loss",
    ]
    assert words(shown[3]) == ["0", "5", "50.00%", "0.913", "32/96", "0.50 s", "64", "25.0%", "2"]
    assert words(shown[6]) == ["link", "bandwidth", "N", "sent", "age"]
    assert words(shown[7]) == ["0->1", "8.0 kB/s", "11.0", "10.0 kB", "0.25 s"]
    assert [words(line)[0] for line in shown[7:]] == ["0->1", "0->2", "1->0", "1->2", "2->0", "2->1"]


@pytest.mark.parametrize("workers", [1, 3, 12])
@pytest.mark.parametrize("height", [1, 2, 5, 6, 9, 24, 60])
@pytest.mark.parametrize("width", [1, 8, 20, 40, 79, 200])
def test_it_fits(width: int, height: int, workers: int) -> None:
    notes = ["rank 7: no metrics file, in a note that is longer than a narrow line"] * 3
    for colour in (False, True):
        text = render(snapshot(workers, notes=notes), width, height, colour=colour)
        shown = re.sub(r"\x1b\[[0-9;]*m", "", text).split("\n")
        assert len(shown) <= height
        assert max(map(cell_len, shown)) <= width


def test_a_narrow_terminal_keeps_what_matters_most() -> None:
    shown = plain(snapshot(), 30, 30)
    assert [words(line) for line in shown if line.lstrip().startswith("rank ")] == [
        ["rank", "steps", "accuracy", "loss"]
    ]
    assert any(words(line)[:2] == ["link", "bandwidth"] for line in shown)


def test_a_low_terminal_says_what_it_leaves_out() -> None:
    shown = plain(snapshot(12), 100, 20)
    assert len(shown) == 20
    assert any("more ranks" in line for line in shown) == (sum("/384" in line for line in shown) < 12)
    shown_links = sum("->" in line for line in shown)
    assert shown_links >= 1
    assert shown[-1] == f"... {132 - shown_links} more links, the slowest shown"


def test_of_many_links_the_slowest_are_shown() -> None:
    made = snapshot(12)
    made.ranks[7].links["bytes_per_s"][3] = 10.0
    made.ranks[2].links["bytes_per_s"][9] = 20.0
    shown = [words(line)[0] for line in plain(made, 100, 20) if "->" in line]
    assert {"2->9", "7->3"} <= set(shown)
    assert shown == sorted(shown, key=lambda name: [int(end) for end in name.split("->")])


def test_one_rank_alone_has_no_links() -> None:
    shown = plain(snapshot(1), 100, 30)
    assert len(shown) == 4
    assert not any("link" in line for line in shown)


def test_what_is_not_known_is_a_dash() -> None:
    made = snapshot(ranks=[unknown(0, 3)])
    row = next(line for line in plain(made, 100, 30) if line.lstrip().startswith("0"))
    assert words(row) == ["0", "-", "-", "-", "-/-", "-", "-", "-", "-"]
    assert "no accuracy yet, target 80.0%" in plain(made, 100, 30)[1]
    assert "nan" not in "\n".join([*plain(made, 100, 30)])


def test_nothing_is_known_at_first() -> None:
    assert plain(snapshot(ranks=[], elapsed_s=0.0, goal=Goal()), 100, 30)[1:] == ["0:00"]


def test_a_run_that_is_over_has_nothing_left() -> None:
    text = plain(snapshot(state="killed: the process of rank 1 is gone"), 120, 30)[1]
    assert "left" not in text
    assert text.endswith("(killed: the process of rank 1 is gone)")


def test_virtual_seconds_are_called_so() -> None:
    assert "2:05 virtual" in plain(snapshot(virtual=True), 100, 30)[1]


def test_a_terminal_that_knows_ascii_only_gets_that() -> None:
    text = render(snapshot(title="dlion: データ"), 100, 30, encoding="ascii")
    assert text.isascii()


def test_markup_in_a_name_is_only_text() -> None:
    assert plain(snapshot(title="[red]runs[/red] :smile:"), 100, 30)[0] == "[red]runs[/red] :smile:"


def test_plain_lines_are_those_that_training_prints() -> None:
    found = lines(snapshot(notes=["rank 3: no metrics file"], state="ended"))
    assert found[0].endswith("runs/a 25%; 2:05; accuracy 51.0%, target 80.0% (ended)")
    assert found[2] == (
        "[1]    5.0 s  step 5  batch 16/96  loss 0.913  16 samples/s  accuracy 51.0%"
        "  ->0 N 10.0 0.0 MB  ->2 N 12.0 0.0 MB"
    )
    assert found[-1] == "rank 3: no metrics file"
    assert lines(snapshot(ranks=[unknown(0, 3)]))  # nothing fails


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        *((duration(value), text) for value, text in ((0.0031, "3.1 ms"), (0.0997, "0.10 s"), (0.0996e-1, "10 ms"))),
        *((duration(value), text) for value, text in ((9.96, "10 s"), (0.214, "0.21 s"))),
        *((size(value), text) for value, text in ((512, "512 B"), (999.6, "1.0 kB"), (1.2e9, "1.2 GB"), (0, "0 B"))),
        *((text_of(math.nan, form), "-") for form in ("time", "bytes", "bytes/s", ".3f")),
        *((clock(value), text) for value, text in ((42.4, "0:42"), (3723, "1:02:03"), (183_840, "2 d 03:04"))),
    ],
)
def test_numbers_are_short(text: str, wanted: str) -> None:
    assert text == wanted
