"""A run at one moment: per rank and per link what somebody who looks wants to know, and how much is left. Pure.

A rank counts its steps up in a `Tally`; what it takes from there is a `RankSnapshot`, which also travels as a vector
of numbers. `view.from_files` makes the same from metrics files. All ranks together are a `Snapshot`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.metrics.records import StepRecord

Numbers = npt.NDArray[np.float64]

RANK_NUMBERS = ("time_s", "step", "lbs", "gbs", "loss", "step_s", "waiting", "samples_per_s", "accuracy")
LINK_NUMBERS = ("quality", "bytes_sent", "bytes_per_s", "age_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSnapshot:
    """One rank. ``step``: how many are done; ``loss``, ``step_s``, ``waiting`` (share of the time, 0..1) and
    ``samples_per_s``: over the last moments; ``accuracy``: latest test, 0..1; NaN where nothing is known.

    By peer, (n,): N of what was sent last, bytes sent so far, measured bytes per second, and the mean age in seconds
    of what was applied last from there.
    """

    rank: int
    time_s: float
    step: float
    lbs: float
    gbs: float
    loss: float
    step_s: float
    waiting: float
    samples_per_s: float
    accuracy: float
    quality: Numbers
    bytes_sent: Numbers
    bytes_per_s: Numbers
    age_s: Numbers

    def to_vector(self) -> Numbers:
        """All numbers but the rank's own: (`vector_length` of n,) float64."""
        own = [getattr(self, name) for name in RANK_NUMBERS]
        return np.concatenate([own, *(getattr(self, name) for name in LINK_NUMBERS)])

    @classmethod
    def from_vector(cls, rank: int, vector: Numbers) -> RankSnapshot:
        """What `to_vector` of that rank gave. Raises ValueError if it has not that shape."""
        own, links = vector[: len(RANK_NUMBERS)], vector[len(RANK_NUMBERS) :]
        rows = links.reshape(len(LINK_NUMBERS), -1)
        numbers: dict[str, Any] = dict(zip(RANK_NUMBERS, own.tolist(), strict=True))
        numbers |= dict(zip(LINK_NUMBERS, rows, strict=True))
        return cls(rank=rank, **numbers)


def vector_length(workers: int) -> int:
    """Numbers of a rank's vector."""
    return len(RANK_NUMBERS) + len(LINK_NUMBERS) * workers


@dataclass(slots=True)
class Tally:
    """Counts up one rank's steps until somebody looks."""

    rank: int
    workers: int
    _last: StepRecord | None = None
    _steps: int = 0
    _samples: int = 0
    _seconds: float = 0.0
    _wait_s: float = 0.0
    _loss: float = 0.0
    _quality: dict[int, float] = field(default_factory=dict)
    _age_s: dict[int, float] = field(default_factory=dict)

    def add(self, record: StepRecord) -> None:
        """One more step."""
        self._last = record
        self._steps += 1
        self._samples += record.lbs
        self._seconds += record.step_s
        self._wait_s += record.wait_s
        self._loss += record.loss
        self._quality.update(record.quality)
        self._age_s.update(record.age_s)

    def take(self, accuracy: float | None) -> RankSnapshot:
        """Where the rank is, with means over the steps since the last call. There must have been one at least."""
        last = self._last
        assert last is not None
        assert self._steps
        seconds = self._seconds or math.nan
        snapshot = RankSnapshot(
            rank=self.rank,
            time_s=last.time_s,
            step=last.step + 1,
            lbs=last.lbs,
            gbs=last.gbs,
            loss=self._loss / self._steps,
            step_s=self._seconds / self._steps,
            waiting=self._wait_s / seconds,
            samples_per_s=self._samples / seconds,
            accuracy=math.nan if accuracy is None else accuracy,
            quality=self._by_peer(self._quality),
            bytes_sent=self._by_peer(last.bytes_sent),
            bytes_per_s=self._by_peer(last.bytes_per_s),
            age_s=self._by_peer(self._age_s),
        )
        self._steps, self._samples, self._seconds, self._wait_s, self._loss = 0, 0, 0.0, 0.0, 0.0
        return snapshot

    def _by_peer(self, values: Mapping[int, float]) -> Numbers:
        row = np.full(self.workers, np.nan)
        for peer, value in values.items():
            row[peer] = value
        return row


@dataclass(frozen=True, slots=True)
class LinkSnapshot:
    """The link from ``source`` to ``target``; NaN where nothing is known."""

    source: int
    target: int
    quality: float
    bytes_sent: float
    bytes_per_s: float
    age_s: float


@dataclass(frozen=True, slots=True)
class Goal:
    """When a run ends: whichever comes first. ``steps`` is infinite, the others None, where nothing is said."""

    steps: float = math.inf
    seconds: float | None = None
    target_accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A whole run. ``ranks``: those that are known of ``workers``; ``elapsed_s``: since training began.

    ``virtual``: whether those are seconds of a simulation, of which ``real_s_per_s`` real seconds each have passed.
    ``state``: in words, if there is something to say; ``notes``: more lines.
    """

    title: str
    workers: int
    ranks: Sequence[RankSnapshot]
    goal: Goal
    elapsed_s: float
    virtual: bool = False
    real_s_per_s: float = 1.0
    state: str = ""
    notes: Sequence[str] = ()

    @property
    def accuracy(self) -> float:
        """Mean over the ranks that have been tested; NaN before the first."""
        known = [rank.accuracy for rank in self.ranks if math.isfinite(rank.accuracy)]
        return float(np.mean(known)) if known else math.nan

    def share(self) -> float | None:
        """How much of the run is done, in 0..1, by its steps or its seconds; None if it has neither as an end."""
        shares = []
        if math.isfinite(self.goal.steps):
            done = min((rank.step for rank in self.ranks), default=0.0)
            shares.append(done / self.goal.steps)
        if self.goal.seconds is not None:
            shares.append(self.elapsed_s / self.goal.seconds)
        return min(1.0, max(shares)) if shares else None

    def left_s(self) -> float | None:
        """Real seconds that are left at the pace of the last moments, if no target is reached before; None: unknown.

        By steps, the rank that has longest to go decides: the others wait for it before they leave.
        """
        left = []
        if math.isfinite(self.goal.steps) and self.ranks:
            left.append(max(max(0.0, self.goal.steps - rank.step) * rank.step_s for rank in self.ranks))
        if self.goal.seconds is not None:
            left.append(max(0.0, self.goal.seconds - self.elapsed_s))
        known = [seconds for seconds in left if math.isfinite(seconds * self.real_s_per_s)]
        return min(known) * self.real_s_per_s if known else None

    def to_json(self) -> dict[str, Any]:
        """As what JSON can write; `from_json` reads it back."""
        ranks = [[rank.rank, *rank.to_vector().tolist()] for rank in self.ranks]
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "ranks": ranks,
            "goal": dataclasses.asdict(self.goal),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Snapshot:
        """What `to_json` gave."""
        ranks = [RankSnapshot.from_vector(int(rank), np.array(numbers)) for rank, *numbers in values["ranks"]]
        return cls(**{**values, "ranks": ranks, "goal": Goal(**values["goal"])})

    def links(self) -> list[LinkSnapshot]:
        """Every link over which something went, by source and target."""
        return list(self._links())

    def _links(self) -> Iterator[LinkSnapshot]:
        by_rank = {rank.rank: rank for rank in self.ranks}
        for source in range(self.workers):
            for target in range(self.workers):
                sender, receiver = by_rank.get(source), by_rank.get(target)
                numbers = (
                    _at(sender, "quality", target),
                    _at(sender, "bytes_sent", target),
                    _at(sender, "bytes_per_s", target),
                    _at(receiver, "age_s", source),
                )
                if source != target and any(number > 0 for number in numbers):  # NaN is not
                    yield LinkSnapshot(source, target, *numbers)


def _at(rank: RankSnapshot | None, name: str, peer: int) -> float:
    row = getattr(rank, name, ())
    return float(row[peer]) if peer < len(row) else math.nan
