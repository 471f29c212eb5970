"""A run that is looked at: in the terminal it was started from, through a pipe, by `dlion watch`, in TensorBoard."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.metrics import reader as runs
from tests import eventfiles
from tests.screen import Screen, running
from tests.system.launch import BIN, ROOT, command, end, run, start

pytestmark = pytest.mark.timeout(200)
SMALL = ("--data", "digits", "--model", "tests.nets:dense")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
HEAD = ["rank", "steps", "accuracy", "loss", "batch", "step", "time", "samples/s", "waiting", "val_loss"]

SUMMARY = ["rank", "steps", "accuracy", "loss", "samples/s", "compute", "select", "waiting", "apply", "sent"]
SUMMARY += ["val_loss"]


@pytest.fixture
def screen() -> Screen:
    return Screen(100, 30)


def shows_ranks(screen: Screen, ranks: int) -> Callable[[], bool]:
    """Whether the table has all ranks, and links with what was measured on them."""

    def seen() -> bool:
        lines = [line.split() for line in screen.lines()]
        if HEAD not in lines:
            return False
        table = lines[lines.index(HEAD) + 1 :][: ranks + 1]
        numbers = [line[0] for line in table if line]
        links = {line[0] for line in lines if line and "->" in line[0]}
        return numbers[:ranks] == [str(rank) for rank in range(ranks)] and len(links) == ranks * (ranks - 1)

    return seen


def test_a_run_under_mpirun_is_drawn_in_its_terminal_watched_and_written_for_tensorboard(
    screen: Screen, tmp_path: Path
) -> None:
    out, board = tmp_path / "run", tmp_path / "board"
    options = ["--seconds", "6", "--evaluate-every", "2s", "--out", str(out), "--tensorboard", str(board)]
    watching = start(None, "dlion", "watch", str(out), "--every", "0.5")
    with running(screen, command(2, "dlion", "train", *SMALL, *options), ROOT, ENVIRONMENT) as process:
        screen.read_until(shows_ranks(screen, 2))
        screen.read_to_end()
        assert process.wait(30) == 0
    watched = end(watching, 60)
    # The view is gone, the summary and the result are whole.
    lines = screen.lines()
    assert not any(line.split() == HEAD for line in lines)
    assert sum(line.split() == SUMMARY for line in lines) == 1
    result = screen.result()
    assert result["ranks"] == 2
    assert b"\x1b[?25l" not in screen.raw
    assert b"samples/s  ->" not in screen.raw  # no rank prints its lines into the view
    # From beside it.
    assert watched.code == 0, watched.err
    assert "not there yet" in watched.out
    assert any(line.startswith("[1]") and "step" in line for line in watched.out.splitlines())
    assert watched.out.splitlines()[-3].endswith("(ended)")
    # And for TensorBoard, what the metrics files have.
    for rank in runs.load(out).ranks:
        found = eventfiles.scalars(board / f"rank-{rank.rank}")
        step, _, sent = found[f"link_bytes_sent/to_{1 - rank.rank}"][-1]
        (row,) = np.flatnonzero(rank.steps["step"] == step - 1)
        assert sent == pytest.approx(rank.links()["bytes_sent"][row, 1 - rank.rank], rel=1e-6)
        assert step == rank.steps["step"][-1] + 1
        for metric in ("accuracy", "val_loss"):
            tests = [value for _, _, value in found[f"test/{metric}"]]
            np.testing.assert_allclose(tests, rank.evaluations[metric], rtol=1e-6)
        losses = found["training/loss"]
        first, last = losses[-2][0], losses[-1][0]  # the last point is the mean since the one before
        assert losses[-1][2] == pytest.approx(float(rank.steps["loss"][first:last].mean()), rel=1e-5)


def test_ctrl_c_leaves_a_whole_terminal(screen: Screen) -> None:
    with running(screen, [str(BIN / "dlion"), "train", *SMALL, "--seconds", "600"], ROOT, ENVIRONMENT) as process:
        screen.read_until(lambda: screen.shows("samples/s") and screen.shows("of 10:00"))
        screen.press(b"\x03")
        screen.read_to_end()
        assert process.wait(30) == 128 + signal.SIGINT
    assert screen.shows("stopped early: SIGINT")
    assert not screen.cursor_hidden
    assert not screen.shows("of 10:00")


def test_through_a_pipe_there_is_a_view_if_it_is_wanted() -> None:
    ended = run(2, "dlion", "train", *SMALL, "--seconds", "2", "--progress", "live", env={"COLUMNS": "60"})
    assert ended.code == 0, ended.err
    assert "\x1b[J" in ended.err
    assert json.loads(ended.out.splitlines()[-1])["ranks"] == 2
    assert "[0] " not in ended.err


def test_lines_can_be_asked_for_in_a_terminal(screen: Screen) -> None:
    options = ["--progress", "lines", "--progress-every", "0.2", "--seconds", "1"]
    with running(screen, [str(BIN / "dlion"), "train", *SMALL, *options], ROOT, ENVIRONMENT) as process:
        screen.read_to_end()
        assert process.wait(30) == 0
    assert b"\x1b" not in screen.raw
    assert screen.shows("[0] ")


def test_a_simulated_run_is_drawn_too(screen: Screen, tmp_path: Path) -> None:
    board = tmp_path / "board"
    options = ["--env", "homo-b", "--workers", "2", "--seconds", "600", "--tensorboard", str(board)]
    with running(screen, [str(BIN / "dlion"), "simulate", *SMALL, *options], ROOT, ENVIRONMENT) as process:
        screen.read_until(shows_ranks(screen, 2))
        assert screen.shows("virtual of 10:00")
        screen.press(b"\x03")
        screen.read_to_end()
        assert process.wait(30) == 128 + signal.SIGINT
    points = eventfiles.scalars(board / "rank-1")["training/loss"]
    times = [time_s for _, time_s, _ in points]
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times[:-1]))


def test_a_watched_run_that_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    training = start(None, "dlion", "train", *SMALL, "--seconds", "600", "--out", str(out))
    with subprocess.Popen(
        [str(BIN / "dlion"), "watch", str(out), "--every", "0.5"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as watching:
        assert watching.stdout is not None
        while not (line := watching.stdout.readline()).startswith("[0]"):
            assert line
        os.killpg(training.pid, signal.SIGKILL)
        training.communicate()
        assert "(killed: the process of rank 0 is gone)" in watching.stdout.read()
        assert watching.wait(30) == 1
