"""Progress of a simulated run on the terminal: a line every few seconds, or a view of all workers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.log import say
from dlion_mpi.metrics.records import Evaluation, StepRecord
from dlion_mpi.view.live import EVERY_S, Reporter, draw, goal_of
from dlion_mpi.view.snapshot import RankSnapshot, Snapshot
from dlion_mpi.view.terminal import Terminal


class Meter:
    """Prints a line every ``every_s`` seconds of real time (0: never), or draws a view in ``terminal``."""

    def __init__(self, workers: int, config: Config, *, every_s: float, terminal: Terminal | None, title: str) -> None:
        self.steps = [0] * workers
        self.accuracies = [math.nan] * workers
        self._every_s, self._said_s = every_s, time.monotonic()
        self._terminal, self._title, self._goal, self._begun_s = terminal, title, goal_of(config), self._said_s
        self._snapshots: dict[int, RankSnapshot] = {}
        self._reporters = [
            Reporter(rank, workers, EVERY_S, partial(self._accuracy, rank), partial(self._snapshots.__setitem__, rank))
            for rank in range(workers)
        ]

    def shown(self) -> AbstractContextManager[None]:
        """Draw the view, if there is a terminal, while this context is open."""
        self._begun_s = time.monotonic()
        return nullcontext() if self._terminal is None else draw(self._terminal, self._snapshot)

    def step(self, rank: int, record: StepRecord, evaluations: Sequence[Evaluation]) -> None:
        """Count a step of a worker."""
        self.steps[rank] = record.step + 1
        if evaluations:
            self.accuracies[rank] = evaluations[-1].metrics["accuracy"]
        if self._terminal is not None:
            self._reporters[rank](record)
        elif self._every_s and time.monotonic() - self._said_s >= self._every_s:
            self._said_s = time.monotonic()
            known = [a for a in self.accuracies if not math.isnan(a)]
            tested = f"  accuracy {np.mean(known):.1%}" if known else ""
            say(f"{record.time_s:8.1f} virtual s  steps {min(self.steps)} to {max(self.steps)}{tested}")

    def _accuracy(self, rank: int) -> float:
        return self.accuracies[rank]

    def _snapshot(self) -> Snapshot:
        ranks = [snapshot for _, snapshot in sorted(dict(self._snapshots).items())]
        elapsed_s = max((rank["time_s"] for rank in ranks), default=0.0)
        return Snapshot(
            title=self._title,
            workers=len(self.steps),
            ranks=ranks,
            goal=self._goal,
            elapsed_s=elapsed_s,
            virtual=True,
            real_s_per_s=(time.monotonic() - self._begun_s) / elapsed_s if elapsed_s else math.nan,
        )
