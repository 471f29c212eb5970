"""The figures of test metrics: their curves, and when runs reached a target."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from dlion_mpi.config.target import Target, falls, is_share
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.grid import Floats
from dlion_mpi.metrics.names import main_metric
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.series import Curve, curve
from dlion_mpi.report.figure import Figure, lines, numbers, series

BOUNDS = {">=": "at least", "<=": "at most"}
CHOICES = 20
"""Approximate number of targets that the page offers, except for an accuracy, where it offers every per cent."""


def key_of(metric: str) -> str:
    """The key of a metric's figure, which is a part of names of files and elements."""
    return "test-" + re.sub(r"[^\w.-]+", "-", metric)


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """The test metrics of all runs, the main one first."""
    found = list(dict.fromkeys(name for run in runs for name in run.metrics))
    main = main_metric(found)
    return sorted(found, key=lambda name: name != main)


def axis_of(metric: str) -> str:
    """Quantity and unit of a metric, for an axis."""
    return f"test {metric} (%)" if is_share(metric) else f"test {metric}"


def scaled(metric: str, values: Floats) -> Floats:
    """Values as an axis shows them: an accuracy in per cent."""
    return 100 * values if is_share(metric) else values


def curves(runs: Sequence[Run], labels: Sequence[str], metric: str) -> Figure:
    """The mean of a metric over the workers of each run that has it."""
    drawn = []
    for n, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if metric in run.metrics:
            rounds = curve(run, metric).by_round()
            mean, low, high = (scaled(metric, values) for values in (rounds.mean, rounds.low, rounds.high))
            drawn.append(series(label, n, mean, time_s=rounds.time_s, low=low, high=high))
    return lines(
        key_of(metric),
        f"Test {metric} over time",
        f"Mean over the workers of their latest test {metric}. The band shows the worst and the best worker.",
        axis_of(metric),
        [("", drawn)],
        band="worst to best worker",
    )


def time_to_target(runs: Sequence[Run], labels: Sequence[str], target: Target | None) -> Figure | None:
    """Bars for ``target`` and for others that a run reached, of which the page offers a choice.

    ``target``: None for a default; if there is none, the figure is None. Raises UserError for a metric that no run has.
    """
    known = metrics_of(runs)
    if target is not None and target.metric not in known:
        raise UserError(
            f"--target {target}: no run has the metric {target.metric}; they have {', '.join(known) or 'none'}"
        )
    target = target or default_target(runs)
    if target is None:
        return None
    found = [curve(run, target.metric) for run in runs]
    values = sorted({*choices(found, target), target.value}, reverse=target.sign == "<=")
    reached = [[own.reached_s(Target(target.metric, target.sign, value)) for value in values] for own in found]
    return {
        "kind": "targets",
        "key": "target",
        "title": "Time to target",
        "says": f"Seconds of training until the mean test {target.metric} was first {BOUNDS[target.sign]} the target, "
        "and as a multiple of the fastest run. A hatched bar shows the length of a run that did not reach it.",
        "x": "time to target (s of training)",
        "rows": list(labels),
        "seconds": numbers([run.seconds for run in runs]),
        "metric": target.metric,
        "sign": target.sign,
        "unit": " %" if is_share(target.metric) else "",
        "targets": numbers(scaled(target.metric, np.array(values)), 6),
        "chosen": values.index(target.value),
        "reached": [numbers([math.nan if s is None else s for s in times]) for times in reached],
    }


def default_target(runs: Sequence[Run]) -> Target | None:
    """The target of the runs if they agree, else a round value of the main metric that the median run reached."""
    targets = {run.target for run in runs}
    only = targets.pop() if len(targets) == 1 else None
    shared = [name for name in metrics_of(runs) if all(name in run.metrics for run in runs)]
    if only is not None and only.metric in metrics_of(runs):
        return only
    metric = main_metric(shared)
    if metric is None:
        return None
    falling = falls(metric)
    found = [_best(curve(run, metric), falling=falling) for run in runs]
    best = sorted((value for value in found if value is not None), reverse=falling)
    if not best:
        return None
    median = best[(len(best) - 1) // 2]
    return Target(metric, "<=" if falling else ">=", _rounded(metric, median, up=falling))


def choices(found: Sequence[Curve], target: Target) -> list[float]:
    """Values of the target's metric that a run reached: every per cent of an accuracy, else about `CHOICES`."""
    falling = target.sign == "<="
    best = [value for own in found if (value := _best(own, falling=falling)) is not None]
    if not best:
        return []
    end = min(best) if falling else max(best)
    if is_share(target.metric) and not falling:
        return [percent / 100 for percent in range(1, math.floor(100 * end + 1e-9) + 1)]
    begin = max(float(own.mean.max()) if falling else -float(own.mean.min()) for own in found if len(own.mean))
    begin = begin if falling else -begin
    step = _step(abs(begin - end) / CHOICES)
    low, high = sorted((begin, end))
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)] if step else []


def _best(own: Curve, *, falling: bool) -> float | None:
    if not len(own.mean):
        return None
    return float(own.mean.min() if falling else own.mean.max())


def _rounded(metric: str, value: float, *, up: bool) -> float:
    """Round to what was reached too: to whole per cent of an accuracy, else to two digits."""
    if not value:
        return value
    unit = 0.01 if is_share(metric) else 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return round((math.ceil(value / unit - 1e-9) if up else math.floor(value / unit + 1e-9)) * unit, 12)


def _step(least: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten; 0 for 0."""
    if not least:
        return 0.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))
