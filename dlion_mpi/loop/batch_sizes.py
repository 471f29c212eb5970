"""Weighted dynamic batching in rounds: gather the throughput of all workers, divide the global batch.

Rounds run in the background of training. In lockstep a round that starts at one step is awaited at the end of the
next, so that it takes effect at the same step everywhere. In `bounded` it also takes effect at the same step
everywhere; in `async`, when it is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dlion_mpi.algorithms.batching import GlobalBatchSchedule, ThroughputFit, equal_lbs, gain, solve_lbs
from dlion_mpi.config.options import Config
from dlion_mpi.loop.ports import Collectives, Ticket, Until
from dlion_mpi.vector.named_arrays import Array, Arrays, array, column, integer, integers, number, numbers

NO_LIMIT = 1 << 30
EFFECT_STEPS = 2
"""Steps from the start of a round to its effect, except in lockstep. Most workers have the table by then. A worker that
has not waits in `bounded` (`BatchSizeRounds.awaits`), and takes the new sizes later in `async`."""
PERIOD = 10
"""Steps between two gatherings of measured throughput."""
LEAST_GAIN = 0.05
"""Share of a step's time that new batch sizes have to save. Timings are noisy, and each change makes new noise."""
FLOOR = 8
"""A batch is not smaller than an equal share divided by this. A batch of a sample or two learns little, and the timings
of very unequal batches tell little."""
LEFT = math.nan
"""The contribution of a worker that has left to a round that others have started."""


class BatchSizeRounds:
    """Gathers (alpha, beta, most samples, latest test) from all workers and solves for their batch sizes.

    The latest test is the value of the target's metric.

    Every worker solves the same problem from the same table, so the batch sizes of a step add up to GBS exactly. In
    `bounded` with ``--backup``, and in `async`, workers may take new batch sizes at different steps.
    """

    channel = "status"

    def __init__(
        self, config: Config, rank: int, workers: int, training_samples: int, collectives: Collectives
    ) -> None:
        self.workers = workers
        self._config, self._rank = config, rank
        self._collectives = collectives
        self._awaited = config.mode.lockstep
        self._period = PERIOD if self.adapts or config.target is not None else None
        self._ticket: Ticket | None = None
        self._record: list[float] = []
        self._asked_step = 0
        self._in_step = config.mode.bounded and not config.backup and self.adapts
        self.fit = ThroughputFit()
        self.started = 0
        self.tested = math.nan
        """The latest value of the metric of ``--target``."""
        self.target_reached = False
        self.gbs_at = global_batch(config, workers, training_samples)
        """The global batch size of a step, the same on all workers."""
        self.gbs = self.gbs_at(0)
        self._sizes = equal_lbs(self.gbs, workers)
        """The batch sizes of all workers."""
        self.lbs = self._sizes[rank]

    @property
    def adapts(self) -> bool:
        """Whether batch sizes follow measured throughput."""
        return self._config.batching in ("auto", "proportional") and self.workers > 1

    def needs_profile(self) -> bool:
        """Whether the first step needs timings. A resumed worker has them."""
        return self.adapts and not self.fit.pairs

    def observe(self, samples: int, seconds: float) -> None:
        """Add a timing: a step of ``samples`` took ``seconds`` to compute."""
        if self.adapts:
            self.fit.add(samples, seconds)

    def first(self, step: int) -> Iterator[Until]:
        """Share out the batch before a run's first step, ``step``, by the timings that `fit` already has."""
        self._ask(step)
        yield Until(self._is_done)
        self._take()

    def awaits(self, step: int) -> bool:
        """Whether all workers take new batch sizes after step ``step`` and the sizes have not arrived."""
        if not self._in_step or self._ticket is None:
            return False
        return step >= self._asked_step + EFFECT_STEPS and not self._ticket.done

    def advance(self, step: int, skipped: int = 0) -> Iterator[Until]:
        """Take a finished round and start one that is due, after step ``step`` and ``skipped`` steps left out."""
        if not self.adapts:
            self.gbs = self.gbs_at(step)
            self.lbs = equal_lbs(self.gbs, self.workers)[self._rank]
        if self._ticket is not None:
            if self._awaited:
                yield Until(self._is_done)
            if self._ticket.done and (self._awaited or step >= self._asked_step + EFFECT_STEPS):
                self._take()
        due = self._period and step % self._period <= skipped
        if due and self._ticket is None and (step > self._asked_step or not self._in_step):
            self._ask(step)

    def to_arrays(self) -> Arrays:
        """The batch sizes, the timings, and in lockstep the round in progress."""
        samples, seconds = zip(*self.fit.pairs, strict=True) if self.fit.pairs else ((), ())
        begun = {"begun": column(self._record)} if self._awaited and self._ticket is not None else {}
        return {
            "samples": column(samples),
            "seconds": column(seconds),
            "sizes": column(self._sizes),
            **integers(off=self.fit.off, lbs=self.lbs, gbs=self.gbs, asked_step=self._asked_step),
            **numbers(tested=self.tested),
            **begun,
        }

    def from_arrays(self, arrays: Mapping[str, Array], farthest_step: int) -> None:
        """Restore what `to_arrays` gave. ``farthest_step``: the step of the worker that is furthest ahead.

        Raises StateError.
        """
        samples = array(arrays, "samples", np.float64, None)
        seconds = array(arrays, "seconds", np.float64, len(samples))
        self.fit.pairs.extend((int(b), float(t)) for b, t in zip(samples, seconds, strict=True))
        self.fit.off, self._asked_step = integer(arrays, "off"), integer(arrays, "asked_step")
        self.lbs, self.gbs = integer(arrays, "lbs"), integer(arrays, "gbs")
        self._sizes = [int(size) for size in array(arrays, "sizes", np.float64, self.workers)]
        self.tested = number(arrays, "tested")
        if self._in_step:  # some may have taken sizes that others have not: start a round for all, at the same step
            self._ask(farthest_step - 1)
        if "begun" in arrays:
            self._gather(array(arrays, "begun", np.float64, 4).tolist())

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in the rounds that others have started and this worker has not."""
        while self.started < rounds_everywhere:
            self.started += 1
            self._ticket = self._collectives.gather(self.channel, [LEFT] * 4)

    def settled(self) -> bool:
        """Whether no round is in progress."""
        return self._ticket is None or self._ticket.done

    def _is_done(self) -> bool:
        return self._ticket is not None and self._ticket.done

    def _ask(self, step: int) -> None:
        alpha, beta = self.fit.solve() if self.fit.pairs else (LEFT, LEFT)
        limit = self._config.batch_size_max or NO_LIMIT
        self._asked_step = step
        self._gather([alpha, beta, limit, self.tested])

    def _gather(self, record: list[float]) -> None:
        self._record = record
        self.started += 1
        self._ticket = self._collectives.gather(self.channel, record)

    def _take(self) -> None:
        assert self._ticket is not None
        table, self._ticket = self._ticket.table, None
        target = self._config.target
        if target is not None and target.reached(float(table[:, 3].mean())):
            self.target_reached = True
        if not self.adapts or np.isnan(table[:, :3]).any():  # a worker has left: sizes stay
            return
        limits = [int(limit) for limit in table[:, 2]]
        gbs = min(self.gbs_at(self._asked_step), sum(limits))
        fits = [(float(alpha), float(beta)) for alpha, beta in table[:, :2]]
        if self._config.batching == "proportional":
            sizes = solve_lbs(gbs, fits, limits, policy="proportional")
        else:
            sizes = solve_lbs(gbs, fits, limits, least=max(1, gbs // (FLOOR * self.workers)))
            if sum(self._sizes) == gbs and gain(self._sizes, sizes, fits) < LEAST_GAIN:
                return
        self._sizes, self.lbs, self.gbs = sizes, sizes[self._rank], gbs


def global_batch(config: Config, workers: int, training_samples: int) -> Callable[[int], int]:
    """Return the global batch size as a function of the step."""
    schedule = growth(config, workers, training_samples)
    most = (config.batch_size_max or NO_LIMIT) * workers

    def at(step: int) -> int:
        return min(schedule.at(step) if schedule else config.batch_size * workers, most)

    return at


def growth(config: Config, workers: int, training_samples: int) -> GlobalBatchSchedule | None:
    """Return the schedule of the global batch; None if it is fixed (``--global-batch fixed``)."""
    if config.global_batch != "grow":
        return None
    return GlobalBatchSchedule.usual(config.batch_size * workers, training_samples)
