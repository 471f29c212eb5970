"""What reports and figures show of a run, from its metrics: accuracy, step times, links, ages. Needs numpy only.

Long runs are drawn on a `Grid`: means over equal spans of time, the same for all workers, so that no detail is
picked by chance and worker stands beside worker.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.metrics.reader import Array, Columns, Rank, Run

Floats = npt.NDArray[np.float64]

PARTS = ("computing", "slept to play a slower machine", "selecting and encoding", "waiting", "applying", "other")
"""Where the time of a step goes."""


@dataclass(frozen=True, slots=True)
class Grid:
    """``count`` spans of ``width_s`` seconds from the beginning of training."""

    width_s: float
    count: int

    @property
    def middles_s(self) -> Floats:
        """The middle of each span, (count,)."""
        return self.width_s * (np.arange(self.count, dtype=np.float64) + 0.5)

    def indices(self, time_s: Array) -> npt.NDArray[np.int64]:
        """The span of each time, as shaped."""
        return np.clip(time_s / self.width_s, 0, self.count - 1).astype(np.int64)

    def means(self, time_s: Array, values: Array) -> Floats:
        """Mean of the finite values of each span, NaN where there are none. Both (T,), result (count,)."""
        usable = np.isfinite(values)
        index = self.indices(time_s[usable])
        sums = np.bincount(index, weights=values[usable], minlength=self.count)
        counts = np.bincount(index, minlength=self.count)
        return np.divide(sums, counts, out=np.full(self.count, np.nan), where=counts > 0)

    def rates(self, time_s: Array, total: Array) -> Floats:
        """Growth per second in each span of a running total; NaN after the last. Both (T,), result (count,)."""
        if not len(time_s):
            return np.full(self.count, np.nan)
        edges = np.minimum(np.arange(self.count + 1) * self.width_s, time_s[-1])
        at_edges = np.interp(edges, np.concatenate([[0.0], time_s]), np.concatenate([[0.0], total]))
        seconds = np.diff(edges)
        return np.divide(np.diff(at_edges), seconds, out=np.full(self.count, np.nan), where=seconds > 0)


def grid(run: Run, points: int = 200) -> Grid:
    """At most about ``points`` spans of a round length, in most of which every worker ends a step."""
    slowest_s = [float(np.nanmedian(r.steps["step_s"])) for r in run.ranks if np.isfinite(r.steps["step_s"]).any()]
    least_s = max(run.seconds / points, 1.5 * max(slowest_s, default=0.0), 1e-3)
    power = 10.0 ** math.floor(math.log10(least_s))
    width_s = next(f * power for f in (1, 2, 5, 10) if f * power >= least_s * (1 - 1e-9))
    return Grid(width_s, max(1, math.ceil(run.seconds / width_s)))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Test accuracy, in 0..1, of all workers together after each evaluation, all (E,).

    At every time each worker counts with its latest evaluation; before everyone has one there is nothing.
    ``round_ends``: rows by which everyone has been evaluated once more, which are enough for a curve.
    """

    time_s: Floats
    mean: Floats
    std: Floats
    low: Floats
    high: Floats
    round_ends: npt.NDArray[np.bool_]

    def reached_s(self, target: float) -> float | None:
        """When the mean first reached ``target``, in seconds; None: never."""
        hits = np.flatnonzero(self.mean >= target)
        return float(self.time_s[hits[0]]) if len(hits) else None

    def by_round(self) -> Accuracy:
        """The rows that end a round."""
        return Accuracy(*(getattr(self, f.name)[self.round_ends] for f in dataclasses.fields(self)))


def accuracy(run: Run) -> Accuracy:
    """The mean over workers of everyone's latest test accuracy, and the spread between them."""
    events = sorted(
        (float(time_s), column, float(value))
        for column, rank in enumerate(run.ranks)
        for time_s, value in zip(rank.evaluations["time_s"], rank.evaluations["accuracy"], strict=True)
    )
    latest, fresh, ended_s = np.full(len(run.ranks), np.nan), set[int](), -math.inf
    # A worker that is gone, or late, must not end the curve of the others.
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
    return Accuracy(time, mean, std, low, high, np.array(round_ends, dtype=bool))


def evaluation_period_s(run: Run) -> float:
    """Seconds between a worker's evaluations, the median; 0 if that cannot be said."""
    between = np.concatenate([np.diff(rank.evaluations["time_s"]) for rank in run.ranks])
    return float(np.median(between)) if len(between) else 0.0


def per_worker(run: Run, on: Grid, column: str) -> Floats:
    """A column of ``steps`` over time: (workers found, spans)."""
    return np.array([on.means(rank.steps["time_s"], rank.steps[column]) for rank in run.ranks])


def step_parts(rank: Rank) -> Floats:
    """Seconds of a step by `PARTS`, the mean over the run; NaN for a rank without steps."""
    if not len(rank.steps["time_s"]):
        return np.full(len(PARTS), np.nan)
    means = {name: float(np.mean(values)) for name, values in rank.steps.items()}
    # In virtual time nobody sleeps: all computing is paced.
    paced_s = means["paced_s"] if math.isfinite(means["paced_s"]) and "environment" not in rank.attributes else 0.0
    parts = [means["compute_s"] - paced_s, paced_s]
    parts += [means[name] for name in ("select_encode_s", "wait_s", "apply_s")]
    return np.array([*parts, max(0.0, means["step_s"] - sum(parts))])


@dataclass(frozen=True, slots=True)
class Links:
    """One sender's links over time, each (workers, spans), and what arrived at it, each (spans,).

    ``quality``: N of Max N. ``bytes_per_s``: sent. ``utilisation``: of the bandwidth measured then, 1 is all of
    it. ``age_s``, ``age_steps``: of the messages applied. ``bytes_sent``, ``bytes_received``: (workers,), in all.
    """

    quality: Floats
    bytes_per_s: Floats
    utilisation: Floats
    age_s: Floats
    age_steps: Floats
    bytes_sent: Floats
    bytes_received: Floats


def links(rank: Rank, on: Grid) -> Links:
    """What a rank sent to and received from each peer; nothing (NaN) to itself."""
    time_s, columns = rank.steps["time_s"], rank.links()

    def each(reduce: Callable[[Array, Array], Floats], name: str) -> Floats:
        rows = np.array([reduce(time_s, columns[name][:, peer]) for peer in range(rank.workers)])
        rows[rank.rank] = np.nan
        return rows

    sent = each(on.rates, "bytes_sent")
    bandwidth = each(on.means, "bytes_per_s")
    return Links(
        quality=each(on.means, "quality"),
        bytes_per_s=sent,
        utilisation=np.divide(sent, bandwidth, out=np.full_like(sent, np.nan), where=bandwidth > 0),
        age_s=on.means(time_s, nanmean(columns["age_s"])),
        age_steps=on.means(time_s, nanmean(columns["age_steps"])),
        bytes_sent=_last(columns, "bytes_sent", rank),
        bytes_received=_last(columns, "bytes_received", rank),
    )


def _last(columns: Columns, name: str, rank: Rank) -> Floats:
    values = columns[name][-1].astype(float) if len(columns[name]) else np.full(rank.workers, np.nan)
    values[rank.rank] = np.nan
    return values


def bytes_matrix(run: Run, found: Sequence[Links]) -> Floats:
    """Bytes from whom (rows) to whom (columns), as counted by the sender, or by the receiver if that is missing.

    ``found``: the `links` of every rank of the run.
    """
    matrix = np.full((run.workers, run.workers), np.nan)
    for rank, own in zip(run.ranks, found, strict=True):
        matrix[: len(own.bytes_received), rank.rank] = own.bytes_received
    for rank, own in zip(run.ranks, found, strict=True):
        matrix[rank.rank, : len(own.bytes_sent)] = own.bytes_sent
    return matrix


def asked_s(rank: Rank) -> Floats:
    """When each knowledge transfer of the rank was asked for, in seconds since training began, (K,)."""
    # `started_step` counts steps done; the times are those of the ends of steps.
    return np.interp(rank.transfers["started_step"], rank.steps["step"] + 1.0, rank.steps["time_s"])


def nanmean(values: Array) -> Floats:
    """Mean over the last axis of what is finite, NaN where nothing is."""
    usable = np.isfinite(values)
    counts = usable.sum(axis=-1)
    sums = np.where(usable, values, 0.0).sum(axis=-1)
    return np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
