"""The result of a run, from the finish of each worker."""

from __future__ import annotations

import math

import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.metrics.gauges import as_gauges, summary_names
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.result import Finish, sum_up

NAMES = summary_names(["val_loss", "accuracy"])


def finish(
    *,
    accuracy: float = 0.5,
    val_loss: float = 0.25,
    loss: float = 1.25,
    stop_reason: str | None = None,
    exit_code: int = 0,
) -> Finish:
    metrics = {"val_loss": val_loss, "accuracy": accuracy}
    numbers = {**dict.fromkeys(NAMES, 3.0), **as_gauges(metrics), "loss": loss, "seconds": 0.1}
    return Finish(
        row=[numbers[name] for name in NAMES],
        evaluations=[Evaluation(5, 0.1, {"val_loss": 9.0, "accuracy": 0.0}), Evaluation(10, 1 / 3, metrics)],
        stop_reason=stop_reason,
        exit_code=exit_code,
    )


def test_a_finish_is_the_same_after_it_was_text() -> None:
    whole = finish(accuracy=1 / 7, stop_reason="größe", exit_code=143)
    assert Finish.from_text(whole.to_text()) == whole
    assert math.isnan(Finish.from_text(finish(loss=math.nan).to_text()).row[NAMES.index("loss")])


def test_a_summary_has_the_mean_of_all_and_each_rank() -> None:
    result = sum_up(Config(), [finish(accuracy=0.25), finish(accuracy=0.75)], rank=1, report=False)
    assert (result.rank, result.exit_code) == (1, 0)
    assert result.summary["ranks"] == 2
    assert result.summary["accuracy_mean"] == 0.5
    assert result.summary["accuracy_per_rank"] == [0.25, 0.75]
    assert result.summary["loss"] == 1.25
    assert result.summary["stopped"] is None
    assert sum_up(Config(), [finish(loss=math.nan), finish()], report=False).summary["loss"] is None


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((143, 143), 143), ((75, 75), 75), ((143, 1), 1), ((0, 130), 130)]
)
def test_a_failure_of_one_rank_counts_before_a_signal(codes: tuple[int, int], code: int) -> None:
    assert sum_up(Config(), [finish(exit_code=c) for c in codes], report=False).exit_code == code


def test_the_first_reason_is_said() -> None:
    finishes = [finish(), finish(stop_reason=""), finish(stop_reason="planted"), finish(stop_reason="later")]
    assert sum_up(Config(), finishes, report=False).summary["stopped"] == "planted"


def test_rank_0_prints_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):
        sum_up(Config(), [finish(), finish()], rank=rank, report=True)
    assert capsys.readouterr().err.count("test accuracy") == 1
