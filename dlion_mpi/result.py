"""What a run leaves behind, whether its micro-cloud is real or simulated: its folder, its metrics, its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.config.options import Config
from dlion_mpi.learner.evaluate import target_reached_s
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.gauges import summary_names
from dlion_mpi.metrics.records import Evaluation


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended; but for ``rank`` the same on every rank.

    ``result``: its JSON object. ``exit_code``: 0, 1 if it failed on any rank, 75 if it is to be started again and will
    go on, 128 + the signal that ended it.
    """

    rank: int
    result: dict[str, Any]
    exit_code: int


def exit_code(codes: Sequence[float]) -> int:
    """The run's exit code from everyone's: a failure counts before a signal."""
    return 1 if 1 in codes else int(max(codes))


def summary_row(worker: Worker, seconds: float) -> list[float]:
    """A worker's numbers of `summary_names` after ``seconds`` of training. It has been evaluated once at least."""
    return worker.history.totals.row(
        seconds,
        step=worker.step,
        accuracy=worker.history.evaluations[-1].accuracy,
        bytes_sent=sum(link.bytes_sent for link in worker.links.totals().values()),
    )


def result_of(
    config: Config,
    rows: npt.NDArray[np.float64],
    reasons: Sequence[str],
    evaluations: Sequence[Sequence[Evaluation]],
) -> dict[str, Any]:
    """The run's JSON object. By rank: ``rows`` (n, columns) of `summary_names`, why it stopped, its evaluations."""
    column = dict(zip(summary_names(), rows.T, strict=True))
    losses = column["loss"]
    return {
        "strategy": config.strategy,
        "ranks": len(rows),
        "steps": int(column["step"].max()),
        "seconds": round(float(column["seconds"].max()), 3),
        "accuracy_mean": round(float(column["accuracy"].mean()), 6),
        "accuracy_std": round(float(column["accuracy"].std()), 6),
        "accuracy_per_rank": [round(float(a), 6) for a in column["accuracy"]],
        "loss": round(float(losses.mean()), 6) if np.isfinite(losses).all() else None,
        "bytes_sent": int(column["bytes_sent"].sum()),
        "target_reached_s": target_reached_s(evaluations, config.target_accuracy),
        "stopped": next((reason for reason in reasons if reason), None),
        "out": config.out,
    }
