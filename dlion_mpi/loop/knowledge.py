"""Direct knowledge transfer in rounds: find the best worker and send its weights to its peers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dlion_mpi.algorithms import transfer
from dlion_mpi.config.options import Config
from dlion_mpi.loop.batch_sizes import LEFT
from dlion_mpi.loop.ports import Collectives, Ticket, Until
from dlion_mpi.metrics.records import Transfer
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, array, column, integer, integers

LOSSES = 10
"""Number of recent losses whose mean decides which worker is the best."""


class KnowledgeRounds:
    """Gathers the mean recent losses, broadcasts the best worker's knowledge, and merges it by the policy."""

    channel = "transfer"

    def __init__(
        self,
        config: Config,
        rank: int,
        workers: int,
        collectives: Collectives,
        now_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._config, self._rank = config, rank
        self._collectives, self._now_s = collectives, now_s
        self._awaited = config.mode.lockstep
        self._on = config.transfer not in (None, "none") and workers > 1
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._gathering: Ticket | None = None
        self._bringing: Ticket | None = None
        self._started_step, self._started_s = 0, 0.0
        self._record: list[float] = []
        self._table: list[float] = []
        self._source = -1
        self.started = 0

    def observe(self, loss: float) -> None:
        """Add the loss of a step."""
        self._losses.append(loss)

    def to_arrays(self) -> Arrays:
        """The recent losses, and in lockstep the transfer in progress."""
        begun: Arrays = {}
        if self._awaited and self._gathering is not None:
            begun = {"gathering": column(self._record)}
        elif self._awaited and self._bringing is not None:
            begun = {"bringing": column(self._table), **integers(source=self._source)}
        return {"losses": column(self._losses), **integers(started_step=self._started_step), **begun}

    def from_arrays(self, arrays: Mapping[str, Array], read: Callable[[], Vector]) -> None:
        """Restore what `to_arrays` gave. ``read`` returns the knowledge of the snapshot. Raises StateError."""
        self._losses.extend(array(arrays, "losses", np.float64, None).tolist())
        self._started_step = integer(arrays, "started_step")
        if "gathering" in arrays:
            loss, left = array(arrays, "gathering", np.float64, 2)
            self._gather(float(loss), left=bool(left))
        elif "bringing" in arrays:
            self._table = array(arrays, "bringing", np.float64, None).tolist()
            self._source = integer(arrays, "source")
            self._bringing = self._collectives.broadcast(self.channel, self._source, read())

    @property
    def in_flight(self) -> bool:
        """Whether a transfer is in progress."""
        return self._gathering is not None or self._bringing is not None

    def advance(
        self, step: int, read: Callable[[], Vector], write: Callable[[Vector], None]
    ) -> Iterator[Until | Transfer]:
        """Continue the transfer in progress after step ``step``, or start one that is due.

        ``read`` returns a copy of this worker's knowledge, ``write`` replaces it. Yields what to wait for, and a
        `Transfer` when one is finished.
        """
        if not self._on:
            return
        if self._bringing is not None:
            if self._awaited:
                yield Until(self._is_brought)
            if self._bringing.done:
                yield self._merge(step, read, write)
        elif self._gathering is not None:
            if self._awaited:
                yield Until(self._is_gathered)
            self.bring(read)
        if step % (self._config.transfer_period or 1) == 0 and step > 0 and not self.in_flight:
            self._started_step, self._started_s = step, self._now_s()
            self._gather(float(np.mean(self._losses)) if self._losses else LEFT, left=False)

    def bring(self, read: Callable[[], Vector]) -> None:
        """Start the broadcast from the best worker once all losses have arrived."""
        if self._gathering is None or not self._gathering.done:
            return
        table, self._gathering = self._gathering.table, None
        self._table = [float(loss) for loss in table[:, 0]]
        source = transfer.best(self._table)
        if table[:, 1].any() or source is None:  # a worker has left, or no loss is finite
            return
        self._source = source
        self._bringing = self._collectives.broadcast(self.channel, source, read())

    @property
    def gathering(self) -> bool:
        """Whether this worker waits for the others' losses."""
        return self._gathering is not None

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in a round that others have started and this worker has not. It ends without a broadcast.

        Only while not `gathering`: this worker's last round may still end with a broadcast.
        """
        while self.started < rounds_everywhere:
            self._gather(LEFT, left=True)

    def serve(self, read: Callable[[], Vector]) -> None:
        """Continue an unfinished transfer after the last step, for the others."""
        self.bring(read)
        if self._bringing is not None and self._bringing.done:
            self._bringing = None

    def settled(self) -> bool:
        """Whether no transfer is in progress."""
        return not self.in_flight

    def _gather(self, loss: float, *, left: bool) -> None:
        self.started += 1
        self._record = [loss, float(left)]
        self._gathering = self._collectives.gather(self.channel, self._record)

    def _is_gathered(self) -> bool:
        return self._gathering is not None and self._gathering.done

    def _is_brought(self) -> bool:
        return self._bringing is not None and self._bringing.done

    def _merge(self, step: int, read: Callable[[], Vector], write: Callable[[Vector], None]) -> Transfer:
        assert self._bringing is not None
        brought, self._bringing = self._bringing.vector, None
        merged = transfer.merges(str(self._config.transfer), self._table, self._rank)
        if merged:
            write(transfer.merge(read(), brought, self._config.transfer_merge or 0.0))
        size = 0 if self._source == self._rank else brought.nbytes
        return Transfer(step, self._source, merged, self._started_step, size, self._started_s)
