"""Reduce the steps of a rank to the numbers that the live view, TensorBoard and the summary show."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import numpy as np

from dlion_mpi.metrics.names import form_of, main_metric
from dlion_mpi.metrics.records import GAUGES, LINKS, STEPS, Gauge, Reduce, StepRecord
from dlion_mpi.vector.named_arrays import Array, Arrays, array, column, part, under

TEST = "test/"
"""Begins the name of a test metric's gauge, which TensorBoard has too."""
RECENT = 10
"""The summary takes means over this many steps."""


def metric_gauge(metric: str) -> Gauge:
    """The gauge of a test metric. Its name cannot be that of another gauge."""
    name = f"{TEST}{metric}"
    return Gauge(metric, metric, form=form_of(metric), name=name, tag=name, summary=True)


def rank_gauges(metrics: Sequence[str] = ()) -> list[Gauge]:
    """The gauges of a rank in a snapshot, in order. ``metrics``: names of the test metrics."""
    return _with_tests([gauge for gauge in GAUGES if gauge.live and gauge.measure not in LINKS], metrics)


def link_gauges() -> list[Gauge]:
    """The gauges of a link in a snapshot, in order."""
    return [gauge for gauge in GAUGES if gauge.live and gauge.measure in LINKS]


def summary_gauges(metrics: Sequence[str] = ()) -> list[Gauge]:
    """The gauges of the summary, in order. ``metrics``: names of the test metrics."""
    return _with_tests([gauge for gauge in GAUGES if gauge.summary], metrics)


def _with_tests(gauges: list[Gauge], metrics: Sequence[str]) -> list[Gauge]:
    """Add the main test metric after the steps, and the others at the end."""
    main = main_metric(metrics)
    after = 1 + [gauge.key for gauge in gauges].index("step")
    first = [metric_gauge(name) for name in metrics if name == main]
    return [*gauges[:after], *first, *gauges[after:], *(metric_gauge(name) for name in metrics if name != main)]


def as_gauges(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a test by the names of their gauges."""
    return {f"{TEST}{name}": value for name, value in metrics.items()}


def reduced(columns: Mapping[str, Array | Sequence[float]]) -> dict[str, float]:
    """Reduce the columns of consecutive steps, each (T,), to the step gauges of a snapshot; NaN where T is 0."""
    seconds = float(np.sum(columns["step_s"]))
    shown = [gauge for gauge in rank_gauges() if gauge.measure in STEPS]
    return {gauge.key: _reduced(gauge.reduce, columns[gauge.measure], seconds) for gauge in shown}


def _reduced(reduce: Reduce, values: Array | Sequence[float], seconds: float) -> float:
    if not len(values):
        return 0.0 if reduce is Reduce.DONE else math.nan
    if reduce is Reduce.MEAN:
        return float(np.mean(values))
    if reduce is Reduce.PER_SECOND:
        return float(np.sum(values)) / (seconds or math.nan)
    return float(values[-1]) + (reduce is Reduce.DONE)


class Totals:
    """Adds up the steps of a worker for the summary at the end of the run."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._latest: StepRecord | None = None

    def add(self, record: StepRecord) -> None:
        """Add a step."""
        self._latest = record
        for gauge in summary_gauges():
            if gauge.reduce is Reduce.PER_SECOND:
                self._sums[gauge.measure] += getattr(record, gauge.measure)
            elif gauge.reduce is Reduce.MEAN:
                self._recent[gauge.measure].append(getattr(record, gauge.measure))

    def mean(self, measure: str) -> float:
        """The mean of a measure over the last RECENT steps; NaN before the first."""
        values = self._recent[measure]
        return float(np.mean(values)) if values else math.nan

    def row(self, seconds: float, metrics: Mapping[str, float], **known: float) -> list[float]:
        """The numbers of `summary_names` after ``seconds`` of training.

        ``metrics``: of the last test, by name. ``known``: values that replace the totals.
        """
        values = known | as_gauges(metrics)
        shown = summary_gauges(list(metrics))
        return [seconds, *(values.get(gauge.key, self._total(gauge, seconds)) for gauge in shown)]

    def _total(self, gauge: Gauge, seconds: float) -> float:
        if gauge.reduce is Reduce.PER_SECOND:
            return self._sums[gauge.measure] / (seconds or math.nan)
        if gauge.reduce is Reduce.MEAN:
            return self.mean(gauge.measure)
        latest = getattr(self._latest, gauge.measure, math.nan)
        return float(sum(latest.values()) if isinstance(latest, Mapping) else latest + (gauge.reduce is Reduce.DONE))

    def to_arrays(self) -> Arrays:
        """The totals as named arrays, for a checkpoint."""
        sums = {name: np.array(value, np.float64) for name, value in self._sums.items()}
        recent = {name: column(values) for name, values in self._recent.items()}
        return {**under("sums", sums), **under("recent", recent)}

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Continue from what `to_arrays` returned. Raises StateError."""
        sums, recent = part(arrays, "sums"), part(arrays, "recent")
        self._sums.update({name: float(array(sums, name, np.float64)) for name in sums})
        for name in recent:
            self._recent[name].extend(array(recent, name, np.float64, None).tolist())


def summary_names(metrics: Sequence[str]) -> list[str]:
    """The names of the numbers in `Totals.row`. ``metrics``: names of the test metrics."""
    return ["seconds", *(gauge.key for gauge in summary_gauges(metrics))]
