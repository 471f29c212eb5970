"""Everything that joins this rank to the others while it trains."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dlion_mpi.errors import Stalled
from dlion_mpi.loop.links import ByteLinks
from dlion_mpi.metrics.timeline import MessageLog
from dlion_mpi.mpi.clock import CommonClock
from dlion_mpi.mpi.collectives import Collectives
from dlion_mpi.mpi.encoder import EncoderThread
from dlion_mpi.mpi.progress import ProgressThread
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.mpi.sums import summer
from dlion_mpi.mpi.transport import MpiTransport

_STALLED: list[Exchange] = []
"""Kept, because MPI may still write to their buffers."""


class Exchange:
    """The clock, links and collectives of this rank, the thread that serves them, and the one that encodes.

    ``size``: entries of the gradient vector (P). ``window``: unacknowledged messages of a link. ``summed_by``: see
    `Strategy.summed_by`. ``channels``: names of the collectives' channels. ``log``: records the messages.
    """

    def __init__(
        self, ranks: Ranks, *, size: int, window: int, summed_by: str, channels: Sequence[str], log: MessageLog
    ) -> None:
        self.clock = CommonClock(ranks)
        self.progress = ProgressThread()
        self._communicator = ranks.duplicate(ranks.communicator)
        self.transport = MpiTransport(self._communicator, self.progress.wake)
        self.links = ByteLinks(
            ranks.rank,
            ranks.size,
            self.transport,
            size=size,
            window=window,
            now_s=self.clock.now_s,
            lock=threading.Lock(),
            log=log,
        )
        self._presence, self.stall = ranks.presence, ranks.stall
        ranks.barrier()  # so that no rank waits in the collectives' duplicates
        self.collectives = Collectives(
            ranks.communicator, channels, self.progress.wake, self.links.carried, self.clock.now_s
        )
        self.sums = summer(ranks, summed_by, self.collectives, size, self.links.carried)
        self.encoder = EncoderThread(self.progress.notify)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let the thread own MPI. At the end, after `leave`, nothing is in flight.

        After a stall everything is: MPI then belongs to the caller, who must end the process without MPI's end.
        """
        self.progress.start(self.transport.progress, self.collectives.progress, self._presence.progress)
        try:
            yield
        except Stalled:
            _STALLED.append(self)
            self.encoder.close()
            self.progress.stop()
            raise
        self.encoder.close()
        self.progress.stop()
        self.sums.close()
        self.transport.close()
        self.collectives.free()
        self._communicator.Free()
