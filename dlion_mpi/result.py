"""The result of a run, whether its micro-cloud is real or simulated."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.config.options import Config
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.gauges import metric_gauge, summary_names
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.metrics.targets import reached_s
from dlion_mpi.view.lines import summary


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run, the same on every rank but for ``rank``.

    ``summary``: the run's JSON object. ``exit_code``: 0; 1 if a rank failed; 75 if the run can be started again and
    resumes; 128 + the signal that ended it.
    """

    rank: int
    summary: dict[str, Any]
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one worker. ``row``: its numbers of `metrics.gauges.summary_names`."""

    row: list[float]
    evaluations: list[Evaluation]
    stop_reason: str | None
    exit_code: int

    @property
    def metrics(self) -> list[str]:
        """Names of the test metrics; empty if nothing was tested."""
        return list(self.evaluations[-1].metrics) if self.evaluations else []

    @classmethod
    def of(cls, worker: Worker, seconds: float) -> Finish:
        """Sum up a worker after ``seconds`` of training."""
        return cls(
            row=worker.history.totals.row(
                seconds,
                worker.last_test(),
                step=worker.step,
                bytes_sent=sum(link.bytes_sent for link in worker.links.totals().values()),
            ),
            evaluations=worker.history.evaluations,
            stop_reason=worker.stop_reason,
            exit_code=worker.exit_code,
        )

    def to_text(self) -> str:
        """Return the finish as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Finish:
        """Return the finish of which `to_text` made this text."""
        fields = json.loads(text)
        return cls(**{**fields, "evaluations": [Evaluation(**evaluation) for evaluation in fields["evaluations"]]})


def sum_up(config: Config, finishes: Sequence[Finish], *, rank: int = 0, report: bool) -> Result:
    """Return the run's result, given every worker's finish by rank; with ``report``, rank 0 prints it in a line."""
    found = _summary(config, finishes)
    if report and rank == 0:
        say(summary(found, [finish.row for finish in finishes], finishes[0].metrics))
    codes = [finish.exit_code for finish in finishes]
    return Result(rank, found, 1 if 1 in codes else max(codes))  # a failure counts before a signal


def _summary(config: Config, finishes: Sequence[Finish]) -> dict[str, Any]:
    rows = np.array([finish.row for finish in finishes], np.float64)
    metrics = finishes[0].metrics
    column = dict(zip(summary_names(metrics), rows.T, strict=True))
    losses = column["loss"]
    return {
        "strategy": config.strategy,
        "ranks": len(rows),
        "steps": int(column["step"].max()),
        "seconds": round(float(column["seconds"].max()), 3),
        **_tests({name: column[metric_gauge(name).key] for name in metrics}),
        "loss": round(float(losses.mean()), 6) if np.isfinite(losses).all() else None,
        "bytes_sent": int(column["bytes_sent"].sum()),
        "target_reached_s": reached_s([f.evaluations for f in finishes], config.target),
        "stopped": next((f.stop_reason for f in finishes if f.stop_reason), None),
        "out": config.out,
    }


def _tests(metrics: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """The keys of the test metrics, of which the values by rank are given; None stands for NaN and infinity."""
    found: dict[str, Any] = {}
    for name, values in metrics.items():
        with np.errstate(invalid="ignore"):  # of infinite values
            found |= {f"{name}_mean": _number(values.mean()), f"{name}_std": _number(values.std())}
        found[f"{name}_per_rank"] = [_number(value) for value in values]
    return found


def _number(value: float) -> float | None:
    """Round to the digits that float32 has; None if JSON has no such number."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
