"""The figures of benchmarks/balance.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.metrics.timeline import Phase

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import balance


@pytest.mark.parametrize(
    ("ratios", "after"),
    [
        ([1.0] * 20, 0),
        ([3.0, 2.0, 1.0, 3.0] + [1.05] * 30, 2),
        ([1.5] * 5 + [1.1] * 10, 5),
        ([1.0] * 10 + [1.2] * 10, None),
        ([], None),
    ],
)
def test_balance_is_reached_when_it_lasts(ratios: list[float], after: int | None) -> None:
    assert balance.balanced_after(np.array(ratios)) == after


def test_iterations_are_compared_and_the_global_batch_is_counted(tmp_path: Path) -> None:
    for rank, (compute_s, lbs) in enumerate([((1.0, 1.0, 1.0), (8, 8, 4)), ((2.0, 1.0, 9.0), (8, 8, 12))]):
        recorder = Recorder(tmp_path, rank, 2, {})
        recorder.span(Phase.AGREE, 0, 0.0, 0.25 * (rank + 1))
        for step, (seconds, samples) in enumerate(zip(compute_s, lbs, strict=True)):
            recorder.step(
                StepRecord(
                    step=step,
                    time_s=20.0 * step + 10,
                    compute_s=seconds,
                    paced_s=0.0,
                    select_encode_s=0.0,
                    wait_s=0.5,
                    apply_s=0.0,
                    step_s=seconds + 1.0,
                    loss=1.0,
                    lbs=samples,
                    gbs=16,
                )
            )
        recorder.close(complete=True)
    run = balance.Run.of(tmp_path)
    np.testing.assert_allclose(run.slowest_over_median(), [4 / 3, 1.0, 1.8])
    assert (run.lbs.sum(axis=0) == run.gbs[0]).tolist() == [True, True, True]
    assert run.profile_s == [8.0, 7.0]
    assert run.agree_s == [0.25, 0.5]
    assert run.other_share == pytest.approx([1.5 / 6, 1.5 / 15])
    assert [run.first_of(start_s) for start_s in (0.0, 20.0, 40.0)] == [0, 1, 2]
