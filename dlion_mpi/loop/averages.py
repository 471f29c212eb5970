"""Rounds of averages over all workers, in the background: of the statistics, and of samples of their movements.

For a model without statistics, and a strategy that needs no samples, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dlion_mpi.algorithms.lengths import ENTRIES, Lengths
from dlion_mpi.config.options import Config
from dlion_mpi.loop.ports import Collectives, Replica, Ticket
from dlion_mpi.loop.statistics import mean, weighted
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, integer, integers, part, under, vector

PERIOD = 20
"""Steps between two rounds."""


class AverageRounds:
    """Averages statistics and samples of all workers every `PERIOD` steps, without waiting.

    When the sum has arrived, a worker takes the mean of the statistics and adds what its own have moved since they were
    sent; ``lengths`` takes the mean of the samples. In lockstep the sum is awaited one step later, so that it takes
    effect at the same step everywhere.

    ``statistics``: their number. ``lengths``: None if no samples are needed.
    """

    channel = "averages"

    def __init__(
        self, config: Config, workers: int, statistics: int, lengths: Lengths | None, collectives: Collectives
    ) -> None:
        self._statistics, self.lengths = statistics, lengths
        self._size = statistics + (0 if lengths is None else ENTRIES + 1)
        self._on = workers > 1 and self._size > 0
        self._awaited = config.mode.lockstep
        self._collectives = collectives
        self._ticket: Ticket | None = None
        self._sent: Vector = np.empty(0, np.float32)
        self._samples = 0
        self.started = 0

    @property
    def shortened(self) -> float | None:
        """The length of the mean movement as a share of one worker's, None if it is not measured; see `Lengths`."""
        return None if self.lengths is None else self.lengths.shortened

    def awaits(self) -> bool:
        """Whether the next step must not begin before the sum has arrived."""
        return self._awaited and not self.settled()

    def settled(self) -> bool:
        """Whether no sum is in flight."""
        return self._ticket is None or self._ticket.done

    def advance(
        self, step: int, samples: int, replica: Replica, sample: Callable[[], Vector], *, skipped: int = 0
    ) -> None:
        """Take the mean that has arrived, and start a round that is due after ``step``, of ``samples``.

        ``sample`` returns a sample of this step's movement, if `lengths` needs one. ``skipped``: steps left out after
        this one.
        """
        if self._ticket is not None and self._ticket.done:
            total, self._ticket = self._ticket.vector, None
            if len(total):
                self._take(total, replica)
            else:  # a worker has left
                self._on = False
        if self._on and self._ticket is None and step % PERIOD <= skipped:
            own = replica.statistics()
            self._ask(own if self.lengths is None else np.append(own, sample()), samples)

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in the rounds that others have started and this worker has not. They end without a sum."""
        while self.started < rounds_everywhere:
            self.started += 1
            self._ticket = self._collectives.reduce(self.channel, None)

    def to_arrays(self) -> Arrays:
        """The measured lengths, and in lockstep the round in flight."""
        measured = {} if self.lengths is None else under("lengths", self.lengths.to_arrays())
        asked = {"sent": self._sent, **integers(samples=self._samples)} if self._awaited and self._ticket else {}
        return measured | asked

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave. Raises StateError."""
        measured = part(arrays, "lengths")
        if self.lengths is not None and measured:
            self.lengths.from_arrays(measured)
        if "sent" in arrays:
            self._ask(vector(arrays, "sent", self._size), integer(arrays, "samples"))

    def _ask(self, own: Vector, samples: int) -> None:
        self._sent, self._samples = own, samples
        self.started += 1
        self._ticket = self._collectives.reduce(self.channel, weighted(own, samples))

    def _take(self, total: Vector, replica: Replica) -> None:
        everywhere = mean(total)
        if everywhere is None:
            return
        if self._statistics:
            then, sent = everywhere[: self._statistics], self._sent[: self._statistics]
            now = then + (replica.statistics() - sent)
            replica.set_statistics(np.where(np.isfinite(now), now, then))
        if self.lengths is not None:
            self.lengths.take(everywhere[self._statistics :])
