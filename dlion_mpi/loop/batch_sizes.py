"""What workers tell each other now and then, by collectives that nobody waits for.

Two kinds of rounds run beside the exchange of gradients: `StatusRounds` gathers everyone's measured throughput
and shares out the global batch; `KnowledgeRounds` finds the best worker and brings its weights to the others.
In `sync` a stage that was started at one step is awaited at the end of the next, so that it takes effect at the
same step everywhere; otherwise it takes effect when it is done, but shares in `bounded` at the same step everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from dlion_mpi.algorithms.batching import GlobalBatchSchedule, ThroughputFit, equal_lbs, solve_lbs
from dlion_mpi.config.options import Config
from dlion_mpi.loop.ports import Collectives, Ticket, Until
from dlion_mpi.vector.named_arrays import Array, Arrays, array, column, integer, integers, number, numbers

NO_LIMIT = 1 << 30
EFFECT_STEPS = 2
"""Except in `sync`, shares are taken so many steps after they were asked for. Then most workers have them in time; who
has not waits in `bounded` (`StatusRounds.awaits`), so that the shares of every step add up to the global batch, and
takes them later in `async`."""
LEFT = math.nan
"""What a worker that has left contributes to a round that others have started."""


class StatusRounds:
    """Gathers (alpha, beta, most samples, latest accuracy) and solves for everyone's batch size.

    Every worker solves the same problem from the same table, so the shares sum to GBS exactly; of a single step in
    `sync`, and in `bounded` unless it goes on without the slowest (``--backup``).
    """

    channel = "status"

    def __init__(
        self, config: Config, rank: int, workers: int, training_samples: int, collectives: Collectives
    ) -> None:
        self._config, self._rank, self._workers = config, rank, workers
        self._collectives = collectives
        self._awaited = config.mode.lockstep
        self._period = config.rebalance_every or (10 if config.target_accuracy else None)
        self._ticket: Ticket | None = None
        self._record: list[float] = []
        self._asked_step = 0
        self._in_step = config.mode.bounded and not config.backup and self.adapts
        self._schedule = _schedule(config, workers, training_samples)
        self.fit = ThroughputFit()
        self.started = 0
        self.accuracy = math.nan
        self.target_reached = False
        self.gbs = self._gbs(0)
        self.lbs = equal_lbs(self.gbs, workers)[rank]

    @property
    def adapts(self) -> bool:
        """Whether batch sizes follow measured throughput."""
        return self._config.batching in ("auto", "proportional") and self._workers > 1

    def observe(self, samples: int, seconds: float) -> None:
        """A step of ``samples`` took ``seconds`` to compute."""
        if self.adapts:
            self.fit.add(samples, seconds)

    def first(self, step: int) -> Iterator[Until]:
        """Before a run's first step, ``step``: share out the batch by the timings that `fit` has already."""
        self._ask(step)
        yield Until(self._is_done)
        self._take()

    def awaits(self, step: int) -> bool:
        """Whether shares that everyone takes after step ``step`` are still under way."""
        if not self._in_step or self._ticket is None:
            return False
        return step >= self._asked_step + EFFECT_STEPS and not self._ticket.done

    def advance(self, step: int, skipped: int = 0) -> Iterator[Until]:
        """After step ``step``, and ``skipped`` before it left out: take a finished round, start one that is due."""
        if not self.adapts:
            self.gbs = self._gbs(step)
            self.lbs = equal_lbs(self.gbs, self._workers)[self._rank]
        if self._ticket is not None:
            if self._awaited:
                yield Until(self._is_done)
            if self._ticket.done and (self._awaited or step >= self._asked_step + EFFECT_STEPS):
                self._take()
        due = self._period and step % self._period <= skipped
        if due and self._ticket is None and (step > self._asked_step or not self._in_step):
            self._ask(step)

    def to_arrays(self) -> Arrays:
        """The batch sizes, the timings, and in `sync` the round that everyone has begun."""
        samples, seconds = zip(*self.fit.pairs, strict=True) if self.fit.pairs else ((), ())
        begun = {"begun": column(self._record)} if self._awaited and self._ticket is not None else {}
        return {
            "samples": column(samples),
            "seconds": column(seconds),
            **integers(off=self.fit.off, lbs=self.lbs, gbs=self.gbs, asked_step=self._asked_step),
            **numbers(accuracy=self.accuracy),
            **begun,
        }

    def from_arrays(self, arrays: Mapping[str, Array], farthest_step: int) -> None:
        """Go on from what `to_arrays` gave; ``farthest_step``: where the worker goes on that is ahead of all others.

        Raises StateError.
        """
        samples = array(arrays, "samples", np.float64, None)
        seconds = array(arrays, "seconds", np.float64, len(samples))
        self.fit.pairs.extend((int(b), float(t)) for b, t in zip(samples, seconds, strict=True))
        self.fit.off, self._asked_step = integer(arrays, "off"), integer(arrays, "asked_step")
        self.lbs, self.gbs = integer(arrays, "lbs"), integer(arrays, "gbs")
        self.accuracy = number(arrays, "accuracy")
        if self._in_step:  # some may have taken shares that others were to take: new ones for all, at the same step
            self._ask(farthest_step - 1)
        if "begun" in arrays:
            self._gather(array(arrays, "begun", np.float64, 4).tolist())

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in the rounds that others have started and this worker has not."""
        while self.started < rounds_everywhere:
            self.started += 1
            self._ticket = self._collectives.gather(self.channel, [LEFT] * 4)

    def settled(self) -> bool:
        """After the last step: whether no round is left."""
        return self._ticket is None or self._ticket.done

    def _is_done(self) -> bool:
        return self._ticket is not None and self._ticket.done

    def _ask(self, step: int) -> None:
        alpha, beta = self.fit.solve() if self.fit.pairs else (LEFT, LEFT)
        limit = self._config.lbs_max or NO_LIMIT
        self._asked_step = step
        self._gather([alpha, beta, limit, self.accuracy])

    def _gather(self, record: list[float]) -> None:
        self._record = record
        self.started += 1
        self._ticket = self._collectives.gather(self.channel, record)

    def _take(self) -> None:
        assert self._ticket is not None
        table, self._ticket = self._ticket.table, None
        accuracies = table[:, 3]
        if self._config.target_accuracy is not None and accuracies.mean() >= self._config.target_accuracy:
            self.target_reached = True
        if not self.adapts or np.isnan(table[:, :3]).any():  # somebody has left: the shares stay
            return
        limits = [int(limit) for limit in table[:, 2]]
        gbs = min(self._gbs(self._asked_step), sum(limits))
        fits = [(float(alpha), float(beta)) for alpha, beta in table[:, :2]]
        self.lbs = solve_lbs(gbs, fits, limits, policy=str(self._config.batching))[self._rank]
        self.gbs = gbs

    def _gbs(self, step: int) -> int:
        gbs = self._schedule.at(step) if self._schedule else self._config.lbs * self._workers
        return min(gbs, (self._config.lbs_max or NO_LIMIT) * self._workers)


def _schedule(config: Config, workers: int, training_samples: int) -> GlobalBatchSchedule | None:
    if config.gbs_schedule != "grow":
        return None
    return GlobalBatchSchedule(
        start=config.lbs * workers,
        interval=config.gbs_interval or 1,
        warmup_step=config.gbs_warmup_step or 0,
        warmup_limit=int((config.gbs_warmup_limit or 0) * training_samples),
        speedup_factor=config.gbs_speedup_factor or 1,
        limit=int((config.gbs_limit or 0) * training_samples),
    )
