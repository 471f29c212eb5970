"""The figures that compare runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dlion_mpi.metrics.grid import grid, nanmean
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.series import Accuracy, accuracy, part_names, per_worker, step_parts
from dlion_mpi.report.colours import part_colour
from dlion_mpi.report.figure import Figure, bars, lines, numbers, series


def figures(runs: Sequence[Run], labels: Sequence[str], target: float | None) -> list[Figure]:
    """All figures; for a single run, those that need no other. ``target``: test accuracy, 0 to 1."""
    curves = [accuracy(run) for run in runs]
    found = [_accuracy(curves, labels)]
    target = default_target(runs, curves) if target is None else target
    if len(runs) > 1 and target is not None:
        found.append(_time_to_target(runs, curves, labels, target))
    found.append(_loss(runs, labels))
    if len(runs) > 1:
        found.append(_parts(runs, labels))
    return found


def _accuracy(curves: Sequence[Accuracy], labels: Sequence[str]) -> Figure:
    drawn = []
    for n, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        rounds = curve.by_round()
        percent = [100 * values for values in (rounds.mean, rounds.low, rounds.high)]
        drawn.append(series(label, n, percent[0], time_s=rounds.time_s, low=percent[1], high=percent[2]))
    return lines(
        "accuracy",
        "Test accuracy over time",
        "Mean over the workers of their latest test accuracy. The band shows the worst and the best worker.",
        "test accuracy (%)",
        [("", drawn)],
        band="worst to best worker",
    )


def default_target(runs: Sequence[Run], curves: Sequence[Accuracy]) -> float | None:
    """The target of the runs if they agree, else the whole per cent that the median run reached."""
    targets = {run.config.get("run.target_accuracy") for run in runs}
    only = targets.pop() if len(targets) == 1 else None
    if isinstance(only, int | float):
        return float(only)
    best = sorted(float(curve.mean.max()) for curve in curves if len(curve.mean))
    return math.floor(100 * best[(len(best) - 1) // 2]) / 100 if best else None


def _time_to_target(runs: Sequence[Run], curves: Sequence[Accuracy], labels: Sequence[str], target: float) -> Figure:
    """Bars for ``target`` and for every whole per cent that a run reached. The page offers a choice."""
    best = max((float(curve.mean.max()) for curve in curves if len(curve.mean)), default=0.0)
    percents = {float(percent) for percent in range(1, math.floor(100 * best) + 1)}
    targets = sorted(percents | {round(100 * target, 6)})
    reached = [[curve.reached_s(percent / 100) for percent in targets] for curve in curves]
    return {
        "kind": "targets",
        "key": "target",
        "title": "Time to target",
        "says": "Seconds of training until the mean test accuracy first reached the target, and as a multiple of the "
        "fastest run. A hatched bar shows the length of a run that did not reach it.",
        "x": "time to target (s of training)",
        "rows": list(labels),
        "seconds": numbers([run.seconds for run in runs]),
        "targets": targets,
        "chosen": targets.index(round(100 * target, 6)),
        "reached": [numbers([math.nan if s is None else s for s in times]) for times in reached],
    }


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
