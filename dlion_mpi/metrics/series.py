"""The series and means that reports show: test metrics, parts of a step, links. Needs only NumPy and h5py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.config.target import Target
from dlion_mpi.metrics.files import Array, fitted
from dlion_mpi.metrics.grid import Floats, Grid, nanmean
from dlion_mpi.metrics.rank import Rank
from dlion_mpi.metrics.reader import Run
from dlion_mpi.metrics.records import CHARTS, LINKS, STEPS, Chart


@dataclass(frozen=True, slots=True)
class Curve:
    """A test metric of all workers after each evaluation, all (E,).

    Each worker counts with its latest evaluation; the series begins when all have one. ``round_ends``: rows at which
    every worker has been evaluated once more. They are enough for a curve.
    """

    time_s: Floats
    mean: Floats
    std: Floats
    low: Floats
    high: Floats
    round_ends: npt.NDArray[np.bool_]

    def reached_s(self, target: Target) -> float | None:
        """Seconds until the mean first reached ``target``, a bound of this metric; None if it never did."""
        hits = np.flatnonzero([target.reached(value) for value in self.mean.tolist()])
        return float(self.time_s[hits[0]]) if len(hits) else None

    def by_round(self) -> Curve:
        """Only the rows that end a round."""
        return Curve(*(getattr(self, f.name)[self.round_ends] for f in dataclasses.fields(self)))


def curve(run: Run, metric: str) -> Curve:
    """Mean over the workers of the latest value of a test metric, and the spread between them.

    It is empty where a rank does not have the metric.
    """
    events = sorted(
        (float(time_s), column, float(value))
        for column, rank in enumerate(run.ranks)
        for time_s, value in zip(rank.evaluations["time_s"], tested(rank, metric), strict=True)
    )
    latest, fresh, ended_s = np.full(len(run.ranks), np.nan), set[int](), -math.inf
    # A worker that has left, or is late, must not end the curve of the others.
    late_s = 1.5 * evaluation_period_s(run)
    rows, round_ends = [], []
    for time_s, column, value in events:
        latest[column] = value
        fresh.add(column)
        if np.isfinite(latest).all():
            rows.append((time_s, latest.mean(), latest.std(), latest.min(), latest.max()))
            round_ends.append(len(fresh) == len(latest) or time_s - ended_s > late_s)
            if round_ends[-1]:
                fresh, ended_s = set(), time_s
    if rows:
        round_ends[-1] = True
    time, mean, std, low, high = np.array(rows, dtype=float).reshape(len(rows), 5).T
    return Curve(time, mean, std, low, high, np.array(round_ends, dtype=bool))


def tested(rank: Rank, metric: str) -> Array:
    """A test metric of a rank, (E,); NaN if its file does not have it."""
    return fitted(rank.evaluations.get(metric), (len(rank.evaluations["time_s"]),))


def evaluation_period_s(run: Run) -> float:
    """Median time between two evaluations of a worker, in seconds; 0 if unknown."""
    between = np.concatenate([np.diff(rank.evaluations["time_s"]) for rank in run.ranks])
    return float(np.median(between)) if len(between) else 0.0


def per_worker(run: Run, on: Grid, column: str) -> Floats:
    """A measure of steps over time, (ranks, spans)."""
    return np.array([on.means(rank.steps["time_s"], rank.steps[column]) for rank in run.ranks])


def part_names() -> list[str]:
    """The parts of a step's time. The last is what belongs to no other."""
    return [*(measure.part for measure in STEPS.values() if measure.part), "other"]


def step_parts(rank: Rank) -> Floats:
    """Mean seconds of each of `part_names` in a step; NaN for a rank without steps."""
    parts = {name: measure for name, measure in STEPS.items() if measure.part}
    if not len(rank.steps["time_s"]):
        return np.full(len(parts) + 1, np.nan)
    means = {name: float(np.mean(rank.steps[name])) for name in (*parts, "step_s")}
    for name, measure in parts.items():
        if measure.within:
            if not math.isfinite(means[name]) or "environment" in rank.attributes:  # in virtual time, nothing sleeps
                means[name] = 0.0
            means[measure.within] -= means[name]
    own = [means[name] for name in parts]
    return np.array([*own, max(0.0, means["step_s"] - float(np.nansum(own)))])


@dataclass(frozen=True, slots=True)
class Links:
    """The links of one rank.

    ``over_time``: the measures of `CHARTS`; (workers, spans) for traffic to each peer; (spans,) for traffic from the
    peers, the mean over them. ``utilisation``: bytes sent, as a fraction of the bandwidth measured at that time,
    (workers, spans). ``bytes_sent``, ``bytes_received``: in the whole run, (workers,). NaN stands for no value.
    """

    over_time: Mapping[str, Floats]
    utilisation: Floats
    bytes_sent: Floats
    bytes_received: Floats


def links(rank: Rank, on: Grid) -> Links:
    """Average the measures of a rank's links over time."""
    time_s, columns = rank.steps["time_s"], rank.links()

    def over_time(chart: Chart) -> Floats:
        values = columns[chart.measure]
        if LINKS[chart.measure].link == "from":
            return on.means(time_s, nanmean(values))
        average = on.rates if chart.rate else on.means
        return _to_peers(rank, np.array([average(time_s, values[:, peer]) for peer in range(rank.workers)]))

    shown = {chart.measure: over_time(chart) for chart in CHARTS if chart.measure in LINKS}
    sent = shown["bytes_sent"]
    bandwidth = np.array([on.means(time_s, columns["bytes_per_s"][:, peer]) for peer in range(rank.workers)])
    return Links(
        over_time=shown,
        utilisation=np.divide(sent, bandwidth, out=np.full_like(sent, np.nan), where=bandwidth > 0),
        bytes_sent=_latest(rank, columns["bytes_sent"]),
        bytes_received=_latest(rank, columns["bytes_received"]),
    )


def _latest(rank: Rank, values: Array) -> Floats:
    return _to_peers(rank, values[-1].astype(float) if len(values) else np.full(rank.workers, np.nan))


def _to_peers(rank: Rank, values: Floats) -> Floats:
    """Remove the row of the rank itself: it has no link to itself."""
    values[rank.rank] = np.nan
    return values


def bytes_matrix(run: Run, found: Sequence[Links]) -> Floats:
    """Bytes from each worker (rows) to each worker (columns), (workers, workers).

    The sender's count, or the receiver's if the sender's file is missing. ``found``: `links` of every rank.
    """
    matrix = np.full((run.workers, run.workers), np.nan)
    for rank, own in zip(run.ranks, found, strict=True):
        matrix[: len(own.bytes_received), rank.rank] = own.bytes_received
    for rank, own in zip(run.ranks, found, strict=True):
        matrix[rank.rank, : len(own.bytes_sent)] = own.bytes_sent
    return matrix


def requested_s(rank: Rank) -> Floats:
    """Times at which the knowledge transfers of the rank were requested, in seconds since training began, (K,)."""
    if not len(rank.steps["time_s"]):
        return np.full(len(rank.transfers["started_step"]), np.nan)
    # `started_step` counts steps done; the times are the ends of steps.
    return np.interp(rank.transfers["started_step"], rank.steps["step"] + 1.0, rank.steps["time_s"])
