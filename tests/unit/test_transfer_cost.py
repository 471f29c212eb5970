"""The figures of benchmarks/transfer.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dlion_mpi.metrics.recorder import Recorder
from dlion_mpi.metrics.records import StepRecord
from dlion_mpi.metrics.timeline import Phase

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import transfer

LENGTHS_S = (6.0, 4.0, 1.0, 1.0, 3.0, 3.0, 1.0)  # settled from the third on, at 10 s
ENDS_S = np.cumsum(LENGTHS_S)


def test_steps_are_told_apart_by_whether_half_of_them_was_in_a_transfer(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, {})
    recorder.span(Phase.TRANSFER, 1, 5.0, 10.4)  # of the third step less than half
    recorder.span(Phase.TRANSFER, 4, 12.0, 13.5)
    recorder.span(Phase.TRANSFER, 5, 13.5, 16.5)  # with the one before: all of the fifth, half of the sixth
    recorder.span(Phase.EVALUATE, 6, 10.0, 19.0)
    for step, (length_s, end_s) in enumerate(zip(LENGTHS_S, ENDS_S, strict=True)):
        recorder.step(
            StepRecord(
                step=step,
                time_s=float(end_s),
                compute_s=length_s,
                paced_s=0.0,
                select_encode_s=0.0,
                wait_s=0.0,
                apply_s=0.0,
                step_s=length_s,
                loss=1.0,
                lbs=8,
                gbs=8,
            )
        )
    recorder.close(complete=True)
    run = transfer.Run.of(tmp_path)
    assert run.with_s[0].tolist() == [3.0, 3.0]
    assert run.without_s[0].tolist() == [1.0, 1.0, 1.0]
    assert run.transfer_s == pytest.approx([5.4, 1.5, 3.0])
    assert run.cost() == {
        "steps_with": 2,
        "steps_without": 3,
        "of_medians": 3.0,
        "of_means": 3.0,
        "transfer_s": 3.0,
    }


def test_without_transfers_there_is_no_quotient() -> None:
    run = transfer.Run([np.array([])], [np.array([1.0])], [], 0, 0)
    assert run.cost() == {
        "steps_with": 0,
        "steps_without": 1,
        "of_medians": None,
        "of_means": None,
        "transfer_s": None,
    }
