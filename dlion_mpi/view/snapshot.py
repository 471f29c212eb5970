"""A run at one moment: the latest numbers of each rank and link, and how much of the run is left. Pure functions.

A rank adds its steps to a `Tally` and takes a `RankSnapshot` from it, which it can send as a vector. `view.from_files`
makes the same snapshot from metrics files. All ranks together are a `Snapshot`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.config.target import Target
from dlion_mpi.metrics.gauges import as_gauges, link_gauges, metric_gauge, rank_gauges, reduced
from dlion_mpi.metrics.records import LINKS, STEPS, StepRecord

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RankSnapshot:
    """The latest numbers of one rank, by gauge. NaN stands for what is not known.

    ``numbers``: over the latest steps, and of the latest test. ``links``: by peer, (n,), of the latest message.
    """

    rank: int
    numbers: Mapping[str, float]
    links: Mapping[str, Numbers]

    def __getitem__(self, gauge: str) -> float:
        return self.numbers[gauge]

    def to_vector(self) -> Numbers:
        """All numbers except ``rank``, as float64; see `vector_length`."""
        return np.concatenate([list(self.numbers.values()), *self.links.values()])

    @classmethod
    def from_vector(cls, rank: int, vector: Numbers, metrics: Sequence[str]) -> RankSnapshot:
        """Inverse of `to_vector`, for a run with these test metrics. Raises ValueError for another length."""
        own, links = [gauge.key for gauge in rank_gauges(metrics)], [gauge.key for gauge in link_gauges()]
        rows = vector[len(own) :].reshape(len(links), -1)
        numbers = dict(zip(own, vector[: len(own)].tolist(), strict=True))
        return cls(rank, numbers, dict(zip(links, rows, strict=True)))


def vector_length(workers: int, metrics: Sequence[str]) -> int:
    """Length of a rank's vector."""
    return len(rank_gauges(metrics)) + len(link_gauges()) * workers


@dataclass(slots=True)
class Tally:
    """Collects the steps of one rank between two snapshots. ``metrics``: names of the test metrics."""

    rank: int
    workers: int
    metrics: Sequence[str] = ()
    _steps: list[StepRecord] = field(default_factory=list)
    _links: dict[str, Numbers] = field(init=False)

    def __post_init__(self) -> None:
        self._links = {gauge.key: np.full(self.workers, np.nan) for gauge in link_gauges()}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, record: StepRecord) -> None:
        """Add a step."""
        self._steps.append(record)
        for gauge in link_gauges():
            for peer, value in getattr(record, gauge.measure).items():
                self._links[gauge.key][peer] = value

    def take(self, test: Mapping[str, float]) -> RankSnapshot:
        """Reduce the steps since the last call to a snapshot. ``test``: metrics of the latest evaluation."""
        columns = {name: [getattr(record, name) for record in self._steps] for name in STEPS}
        self._steps = []
        links = {name: values.copy() for name, values in self._links.items()}
        return snapshot_of(self.rank, columns, {name: test.get(name, math.nan) for name in self.metrics}, links)


def snapshot_of(
    rank: int,
    columns: Mapping[str, Sequence[float] | npt.NDArray[Any]],
    test: Mapping[str, float],
    links: Mapping[str, Numbers],
) -> RankSnapshot:
    """The snapshot of a rank.

    ``columns``: measures of its latest steps, (T,). ``test``: all metrics, NaN before the first evaluation.
    ``links``: gauges by peer, (n,).
    """
    known = reduced(columns) | as_gauges(test)
    return RankSnapshot(rank, {gauge.key: known[gauge.key] for gauge in rank_gauges(list(test))}, links)


@dataclass(frozen=True, slots=True)
class LinkSnapshot:
    """The latest numbers of the link from ``source`` to ``target``, by gauge. NaN stands for what is not known."""

    source: int
    target: int
    numbers: Mapping[str, float]

    def __getitem__(self, gauge: str) -> float:
        return self.numbers[gauge]


@dataclass(frozen=True, slots=True)
class Goal:
    """The end of a run: whatever comes first. Without a limit, ``steps`` is infinite and the others are None."""

    steps: float = math.inf
    seconds: float | None = None
    target: Target | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A whole run.

    ``ranks``: those that are known, of ``workers``. ``metrics``: names of the test metrics. ``elapsed_s``: since
    training began. ``virtual``: whether these are seconds of a simulation, which take ``real_s_per_s`` real seconds
    each. ``state``: a remark on the run. ``notes``: further lines.
    """

    title: str
    workers: int
    ranks: Sequence[RankSnapshot]
    goal: Goal
    elapsed_s: float
    metrics: Sequence[str] = ()
    virtual: bool = False
    real_s_per_s: float = 1.0
    state: str = ""
    notes: Sequence[str] = ()

    def mean(self, metric: str) -> float:
        """Mean of a test metric over the ranks that were evaluated; NaN before the first evaluation."""
        name = metric_gauge(metric).key
        known = [rank[name] for rank in self.ranks if math.isfinite(rank[name])]
        return float(np.mean(known)) if known else math.nan

    def share(self) -> float | None:
        """Fraction of the run that is done (0 to 1), by steps or seconds; None if neither is limited."""
        shares = []
        if math.isfinite(self.goal.steps):
            done = min((rank["step"] for rank in self.ranks), default=0.0)
            shares.append(done / self.goal.steps)
        if self.goal.seconds is not None:
            shares.append(self.elapsed_s / self.goal.seconds)
        return min(1.0, max(shares)) if shares else None

    def left_s(self) -> float | None:
        """Real seconds that are left at the current pace; None if unknown.

        The slowest rank decides, since the others wait for it before they leave. A target may end the run earlier.
        """
        left = []
        if math.isfinite(self.goal.steps) and self.ranks:
            left.append(max(max(0.0, self.goal.steps - rank["step"]) * rank["step_s"] for rank in self.ranks))
        if self.goal.seconds is not None:
            left.append(max(0.0, self.goal.seconds - self.elapsed_s))
        known = [seconds for seconds in left if math.isfinite(seconds * self.real_s_per_s)]
        return min(known) * self.real_s_per_s if known else None

    def to_json(self) -> dict[str, Any]:
        """Convert to values that JSON can represent."""
        ranks = [[rank.rank, *rank.to_vector().tolist()] for rank in self.ranks]
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "ranks": ranks,
            "goal": dataclasses.asdict(self.goal) | {"target": self.goal.target and str(self.goal.target)},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Snapshot:
        """Inverse of `to_json`."""
        metrics, goal = tuple(values["metrics"]), values["goal"]
        ranks = [RankSnapshot.from_vector(int(rank), np.array(own), metrics) for rank, *own in values["ranks"]]
        target = goal["target"] and Target.parse(goal["target"])
        return cls(**{**values, "metrics": metrics, "ranks": ranks, "goal": Goal(**{**goal, "target": target})})

    def links(self) -> list[LinkSnapshot]:
        """The links that carried something, by source and target."""
        return list(self._links())

    def _links(self) -> Iterator[LinkSnapshot]:
        by_rank = {rank.rank: rank for rank in self.ranks}
        for source in range(self.workers):
            for target in range(self.workers):
                sender, receiver = by_rank.get(source), by_rank.get(target)
                numbers = {
                    gauge.key: _at(sender, gauge.key, target)
                    if LINKS[gauge.measure].link == "to"
                    else _at(receiver, gauge.key, source)
                    for gauge in link_gauges()
                }
                if source != target and any(number > 0 for number in numbers.values()):  # NaN is not
                    yield LinkSnapshot(source, target, numbers)


def _at(rank: RankSnapshot | None, gauge: str, peer: int) -> float:
    values = () if rank is None else rank.links[gauge]
    return float(values[peer]) if peer < len(values) else math.nan
