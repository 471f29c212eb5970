"""Progress of a simulated run on the terminal: a line every few seconds, or a view of all workers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.log import say
from dlion_mpi.metrics.names import main_metric
from dlion_mpi.metrics.records import Evaluation, StepRecord
from dlion_mpi.view.lines import named_metric
from dlion_mpi.view.live import EVERY_S, Reporter, draw, goal_of
from dlion_mpi.view.snapshot import RankSnapshot, Snapshot
from dlion_mpi.view.terminal import Terminal


class Meter:
    """Prints a line every ``every_s`` seconds of real time (0: never), or draws a view in ``terminal``."""

    def __init__(
        self,
        workers: int,
        config: Config,
        metrics: tuple[str, ...],
        *,
        every_s: float,
        terminal: Terminal | None,
        title: str,
    ) -> None:
        self.steps = [0] * workers
        self._metrics = metrics
        self._tests: list[Mapping[str, float]] = [{}] * workers
        """The latest test of each worker."""
        self._every_s, self._said_s = every_s, time.monotonic()
        self._terminal, self._title, self._goal, self._begun_s = terminal, title, goal_of(config), self._said_s
        self._snapshots: dict[int, RankSnapshot] = {}
        self._reporters = [
            Reporter(
                rank,
                workers,
                EVERY_S,
                metrics,
                partial(self._tests.__getitem__, rank),
                partial(self._snapshots.__setitem__, rank),
            )
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
            self._tests[rank] = evaluations[-1].metrics
        if self._terminal is not None:
            self._reporters[rank](record)
        elif self._every_s and time.monotonic() - self._said_s >= self._every_s:
            self._said_s = time.monotonic()
            say(f"{record.time_s:8.1f} virtual s  steps {min(self.steps)} to {max(self.steps)}{self._tested()}")

    def _tested(self) -> str:
        """The mean of the main test metric over the workers that were tested."""
        main = main_metric(self._metrics)
        known = [test[main] for test in self._tests if main in test] if main is not None else []
        return f"  {named_metric(str(main), float(np.mean(known)))}" if known else ""

    def _snapshot(self) -> Snapshot:
        ranks = [snapshot for _, snapshot in sorted(dict(self._snapshots).items())]
        elapsed_s = max((rank["time_s"] for rank in ranks), default=0.0)
        return Snapshot(
            title=self._title,
            workers=len(self.steps),
            ranks=ranks,
            goal=self._goal,
            elapsed_s=elapsed_s,
            metrics=self._metrics,
            virtual=True,
            real_s_per_s=(time.monotonic() - self._begun_s) / elapsed_s if elapsed_s else math.nan,
        )
