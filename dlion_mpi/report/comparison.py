"""The figures that compare runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion_mpi.config.target import Target
from dlion_mpi.metrics.grid import grid, nanmean
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.series import part_names, per_worker, step_parts
from dlion_mpi.report.colours import part_colour
from dlion_mpi.report.figure import Figure, bars, lines, series
from dlion_mpi.report.tests import curves, metrics_of, time_to_target


def figures(runs: Sequence[Run], labels: Sequence[str], target: Target | None) -> list[Figure]:
    """All figures; for a single run, those that need no other. ``target``: None for a default. Raises UserError."""
    found = [curves(runs, labels, metric) for metric in metrics_of(runs)]
    to_target = time_to_target(runs, labels, target)
    if len(runs) > 1 and to_target is not None:
        found.insert(1, to_target)
    found.append(_loss(runs, labels))
    if len(runs) > 1:
        found.append(_parts(runs, labels))
    return found


def _loss(runs: Sequence[Run], labels: Sequence[str]) -> Figure:
    drawn = []
    for n, (run, label) in enumerate(zip(runs, labels, strict=True)):
        on = grid(run)
        losses = per_worker(run, on, "loss")
        known = np.isfinite(losses).any(axis=0)
        drawn.append(series(label, n, nanmean(losses.T)[known], time_s=on.middles_s[known]))
    return lines(
        "loss",
        "Training loss over time",
        "Mean over the workers and over short spans of time. Each worker trains on its own batches.",
        "training loss (no unit)",
        [("", drawn)],
    )


def _parts(runs: Sequence[Run], labels: Sequence[str]) -> Figure:
    names = part_names()
    means = np.array([nanmean(np.array([step_parts(rank) for rank in run.ranks]).T) for run in runs])
    return bars(
        "parts-of-runs",
        "Where a step's time goes",
        "Mean over all steps and workers of a run.",
        "time of a step (s)",
        labels,
        [(name, part_colour(n, len(names)), means[:, n]) for n, name in enumerate(names)],
    )
