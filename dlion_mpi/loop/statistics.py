"""Averages of the statistics, such as those of batch normalisation, over all workers.

Every worker's batches move its own statistics. Rounds in the background bring them together while the workers train, so
that tests see nearly the same model everywhere. After the last step they are averaged once more, exactly. A worker
counts with the samples of its batch. For a model without statistics nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.loop.ports import Collectives, Replica, Ticket
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, integer, integers, vector

PERIOD = 20
"""Steps between two averages."""


def weighted(statistics: Vector, samples: int) -> Vector:
    """The addend of a worker, (S + 1,) float32: statistics times samples, then the samples. `mean` divides the sum.

    A worker whose statistics are not finite counts nothing, so that it does not spoil those of all others.
    """
    if not np.isfinite(statistics).all():
        return np.zeros(len(statistics) + 1, np.float32)
    return np.append(statistics, np.float32(1)) * np.float32(samples)


def mean(total: Vector) -> Vector | None:
    """The mean, (S,) float32, of a sum of addends. None if no worker counts."""
    return total[:-1] / total[-1] if total[-1] > 0 else None


def average(replicas: Sequence[Replica], samples: Sequence[int]) -> None:
    """Set the statistics of replicas in one process to their mean, and the averages of their weights."""
    for accesses in zip(*map(_kept, replicas), strict=True):
        own = [read() for read, _ in accesses]
        if len(own) > 1 and len(own[0]):
            total: Vector = np.add.reduce([weighted(s, b) for s, b in zip(own, samples, strict=True)])
            if (everywhere := mean(total)) is not None:
                for _, write in accesses:
                    write(everywhere)


def settle(replica: Replica, samples: int, mean_of: Callable[[Vector], Vector]) -> None:
    """Set the statistics of this worker to the mean of all workers, which call this together.

    The same for the averages of the weights, if the optimizer keeps them. ``mean_of``: the mean of all workers'
    vectors, such as `mpi.ranks.Ranks.mean`.
    """
    for read, write in _kept(replica):
        own = read()
        if len(own) and (everywhere := mean(mean_of(weighted(own, samples)))) is not None:
            write(everywhere)


def _kept(replica: Replica) -> list[tuple[Callable[[], Vector], Callable[[Vector], None]]]:
    return [(replica.statistics, replica.set_statistics), (replica.averages, replica.set_averages)]


class StatisticsRounds:
    """Sums the statistics of all workers every `PERIOD` steps, without waiting.

    When the sum has arrived, a worker takes the mean and adds what its own statistics have moved since they were sent.
    In lockstep the sum is awaited one step later, so that it takes effect at the same step everywhere.
    """

    channel = "statistics"

    def __init__(self, config: Config, workers: int, size: int, collectives: Collectives) -> None:
        self._on = workers > 1 and size > 0
        self._size = size
        self._awaited = config.mode.lockstep
        self._collectives = collectives
        self._ticket: Ticket | None = None
        self._sent: Vector = np.empty(0, np.float32)
        self._samples = 0
        self.started = 0

    def awaits(self) -> bool:
        """Whether the next step must not begin before the sum has arrived."""
        return self._awaited and not self.settled()

    def settled(self) -> bool:
        """Whether no sum is in flight."""
        return self._ticket is None or self._ticket.done

    def advance(
        self,
        step: int,
        samples: int,
        read: Callable[[], Vector],
        write: Callable[[Vector], None],
        *,
        skipped: int = 0,
    ) -> None:
        """Take the mean that has arrived, and start a round that is due after ``step``, of ``samples``.

        ``read`` returns a copy of the worker's statistics, ``write`` replaces them. ``skipped``: steps left out after
        this one.
        """
        if self._ticket is not None and self._ticket.done:
            total, self._ticket = self._ticket.vector, None
            if len(total):
                self._take(total, read(), write)
            else:  # a worker has left
                self._on = False
        if self._on and self._ticket is None and step % PERIOD <= skipped:
            self._ask(read(), samples)

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in the rounds that others have started and this worker has not. They end without a sum."""
        while self.started < rounds_everywhere:
            self.started += 1
            self._ticket = self._collectives.reduce(self.channel, None)

    def to_arrays(self) -> Arrays:
        """The round in flight, in lockstep."""
        return {"sent": self._sent, **integers(samples=self._samples)} if self._awaited and self._ticket else {}

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave. Raises StateError."""
        if "sent" in arrays:
            self._ask(vector(arrays, "sent", self._size), integer(arrays, "samples"))

    def _ask(self, statistics: Vector, samples: int) -> None:
        self._sent, self._samples = statistics, samples
        self.started += 1
        self._ticket = self._collectives.reduce(self.channel, weighted(statistics, samples))

    def _take(self, total: Vector, own: Vector, write: Callable[[Vector], None]) -> None:
        everywhere = mean(total)
        if everywhere is not None:
            now = everywhere + (own - self._sent)
            write(np.where(np.isfinite(now), now, everywhere))
