"""What `--tensorboard` writes: the right tags, steps, times and values, off the loop, and never the end of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.files import new_folder
from dlion_mpi.metrics.recorder import NoRecorder
from dlion_mpi.metrics.records import Evaluation, Transfer
from dlion_mpi.view.tensorboard import TensorBoard, check_unused
from tests import eventfiles, runfiles

BEGUN_S = 1_700_000_000.0
WORKERS, RANK = 3, 1


def written(folder: Path, steps: int, recorder: Any = None) -> dict[str, list[tuple[int, float, float]]]:
    """Steps of a second each, a test and a transfer."""
    times = iter([BEGUN_S + 1.0])  # the first event is of second 1
    board = TensorBoard(recorder or NoRecorder(), folder, RANK, WORKERS, now_s=lambda: next(times))
    for step in range(steps):
        board.step(runfiles.record(RANK, WORKERS, step))
    board.evaluation(Evaluation(steps, float(steps), {"accuracy": 0.75, "val_loss": 1.5, "auc": math.nan}))
    board.transfer(Transfer(steps, 2, True, steps - 1, 1000), float(steps))
    board.close(complete=True)
    return eventfiles.scalars(folder / f"rank-{RANK}")


def test_every_second_is_a_point_of_every_measure(tmp_path: Path) -> None:
    found = written(tmp_path, 4)
    assert set(found) == {
        *("training/loss", "training/samples_per_s", "batch/lbs", "batch/gbs", "time/step_s", "time/waiting_share"),
        *(f"link_{what}/to_{peer}" for what in ("N", "bytes_per_s", "bytes_sent") for peer in (0, 2)),
        *(
            "link_age_s/from_0",
            "link_age_s/from_2",
            "test/accuracy",
            "test/val_loss",
            "transfer/source",
            "transfer/merged",
        ),
    }
    records = [runfiles.record(RANK, WORKERS, step) for step in range(4)]
    steps = [1, 2, 3, 4]
    expected: dict[str, Any] = {
        "training/loss": [r.loss for r in records],
        "batch/lbs": [r.lbs for r in records],
        "batch/gbs": [96] * 4,
        "time/step_s": [1.0] * 4,
        "time/waiting_share": [0.25] * 4,
        "training/samples_per_s": [16.0] * 4,
        "link_N/to_2": [12.0] * 4,  # sent every other step; the newest stays
        "link_bytes_per_s/to_0": [8000.0] * 4,
        "link_bytes_sent/to_2": [r.bytes_sent[2] for r in records],
        "link_age_s/from_0": [0.25] * 4,
    }
    for tag, values in expected.items():
        assert [step for step, _, _ in found[tag]] == steps, tag
        assert [time_s for _, time_s, _ in found[tag]] == [BEGUN_S + r.time_s for r in records], tag
        np.testing.assert_allclose([value for _, _, value in found[tag]], values, rtol=1e-6, err_msg=tag)
    assert found["test/accuracy"] == [(4, BEGUN_S + 4.0, 0.75)]
    assert found["test/val_loss"] == [(4, BEGUN_S + 4.0, 1.5)]
    assert found["transfer/source"] == [(4, BEGUN_S + 4.0, 2.0)]


def test_short_steps_share_a_point_and_the_last_are_not_lost(tmp_path: Path) -> None:
    board = TensorBoard(NoRecorder(), tmp_path, 0, WORKERS, now_s=lambda: BEGUN_S)
    records = [runfiles.record(0, WORKERS, step) for step in range(8)]  # half a second each
    for record in records:
        board.step(record)
    board.close(complete=True)
    found = eventfiles.scalars(tmp_path / "rank-0")
    assert [step for step, _, _ in found["training/loss"]] == [1, 3, 5, 7, 8]
    means: Any = [
        records[0].loss,
        *(np.mean([records[i].loss, records[i + 1].loss]) for i in (1, 3, 5)),
        records[7].loss,
    ]
    losses: Any = [value for _, _, value in found["training/loss"]]
    np.testing.assert_allclose(losses, means, rtol=1e-6)
    np.testing.assert_allclose([value for _, _, value in found["training/samples_per_s"]], 64.0)


class Listening(NoRecorder):
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def step(self, record: Any) -> None:
        self.heard.append(record.step)

    def evaluation(self, evaluation: Any) -> None:
        self.heard.append("evaluation")

    def transfer(self, transfer: Any, time_s: float) -> None:
        self.heard.append("transfer")

    def close(self, *, complete: bool) -> None:
        self.heard.append(complete)


def test_the_metrics_file_gets_all_of_it_too(tmp_path: Path) -> None:
    recorder = Listening()
    written(tmp_path, 3, recorder)
    assert recorder.heard == [0, 1, 2, "evaluation", "transfer", True]


def test_a_writer_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Listening()
    board = TensorBoard(recorder, tmp_path, RANK, WORKERS)

    class Full:
        def add_event(self, event: Any) -> None:
            raise OSError("no space left\nat all")

        def close(self) -> None:
            raise AssertionError("it is given up")

    board._writer.close()
    board._writer = Full()
    for step in range(3):
        board.step(runfiles.record(RANK, WORKERS, step))
    board.close(complete=True)
    assert capsys.readouterr().err == "dlion: --tensorboard: nothing more is written (no space left)\n"
    assert recorder.heard == [0, 1, 2, True]


def test_a_run_without_a_step_leaves_no_points(tmp_path: Path) -> None:
    TensorBoard(NoRecorder(), tmp_path, 0, 1).close(complete=False)
    assert list((tmp_path / "rank-0").iterdir()) == []


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    check_unused(None)
    check_unused(str(tmp_path / "new"))
    check_unused(str(tmp_path))  # empty
    (tmp_path / "rank-0").mkdir()
    with pytest.raises(UserError, match="exists already"):
        check_unused(str(tmp_path))
    with pytest.raises(UserError, match="--tensorboard"):
        new_folder(Config(tensorboard=str(tmp_path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()  # so that the same command works with another folder


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        check_unused(str(file))
    with pytest.raises(UserError, match="rank 2 cannot write there"):
        TensorBoard(NoRecorder(), file, 2, 3)
