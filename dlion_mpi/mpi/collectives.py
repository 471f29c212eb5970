"""Non-blocking collectives. Each channel has its own communicator, so channels may overtake one another.

The worker's loop asks for a gather, a broadcast or a sum and gets a ticket. The thread that owns MPI starts and
completes them in order. All ranks must ask for the same sequence on a channel, each at its own pace.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dlion_mpi.algorithms.ring import chunk_bounds, chunk_sent
from dlion_mpi.mpi.startup import MPI
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import ValueType, rounded
from dlion_mpi.wire.format import values_bytes
from dlion_mpi.wire.values import from_wire, to_wire

CHUNK = 1 << 16
"""Entries (4 bytes each) of a broadcast in flight at a time, so that gradients pass between the chunks."""

Table = npt.NDArray[np.float64]


@dataclass(slots=True)
class Ticket:
    """A collective in flight. ``table``: (n, k) of a gather, row r from rank r; ``vector``: of a broadcast or sum."""

    done: bool = False
    table: Table = field(default_factory=lambda: np.empty((0, 0)))
    vector: Vector = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(slots=True)
class _Operation:
    ticket: Ticket
    pieces: Iterator[list[MPI.Request]]
    """Starts the next piece each time it is asked, which is when the previous piece is complete."""


class Collectives:
    """The channels of one worker, by name.

    ``wake``: called when there is work to do. ``carried``: counts the bytes of each piece of a sum, as
    `loop.links.Links.carried`, by the clock ``now_s``.
    """

    def __init__(
        self,
        communicator: MPI.Intracomm,
        channels: Sequence[str],
        wake: Callable[[], None],
        carried: Callable[[int, int, int, float], None] = lambda peer, sent_bytes, received_bytes, began_s: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._size = communicator.Get_rank(), communicator.Get_size()
        self._communicators = {name: communicator.Dup() for name in channels}
        self._queues: dict[str, deque[_Operation]] = {name: deque() for name in channels}
        self._requests: dict[str, list[MPI.Request]] = {name: [] for name in channels}
        self._wake = wake
        self._carried = carried
        self._now_s = now_s

    def gather(self, channel: str, record: Sequence[float]) -> Ticket:
        """Gather the ``record`` of each rank on all ranks (`Iallgather`). All records have the same length."""
        communicator = self._communicators[channel]
        own = np.array(record, dtype=np.float64)
        table = np.empty((self._size, len(own)), dtype=np.float64)

        def pieces() -> Iterator[list[MPI.Request]]:
            yield [communicator.Iallgather(own, table)]

        return self._ask(channel, Ticket(table=table), pieces())

    def broadcast(self, channel: str, root: int, vector: Vector) -> Ticket:
        """Overwrite ``vector`` (K,) float32 on all ranks with rank ``root``'s, chunk by chunk (`Ibcast`)."""
        communicator = self._communicators[channel]

        def pieces() -> Iterator[list[MPI.Request]]:
            for start in range(0, len(vector), CHUNK):
                yield [communicator.Ibcast(vector[start : start + CHUNK], root=root)]

        return self._ask(channel, Ticket(vector=vector), pieces())

    def reduce(self, channel: str, vector: Vector | None, value_type: ValueType = "float32") -> Ticket:
        """Overwrite ``vector`` (K,) float32 with the sum over all ranks, bit for bit the same on every rank.

        ``value_type``: of the values that travel, the same on all ranks. None: this rank has no vector, now or later.
        Then no rank gets a sum: every ``ticket.vector`` is empty. The ranks find that out first, so it costs a word and
        not a vector.
        """
        ticket = Ticket()
        return self._ask(channel, ticket, self._ring(self._communicators[channel], vector, value_type, ticket))

    def _ring(
        self, communicator: MPI.Intracomm, vector: Vector | None, value_type: ValueType, ticket: Ticket
    ) -> Iterator[list[MPI.Request]]:
        """Each turn a chunk goes to the next rank and one comes from the previous; see `algorithms.ring`.

        MPI's own `Iallreduce` is not used: for few ranks, or a number that is not a power of two, libraries choose
        algorithms that send more than a ring.
        """
        own = np.array([vector is None, 0 if vector is None else len(vector)], np.int64)
        own = np.append(own, -own[1])
        most = np.empty_like(own)
        yield [communicator.Iallreduce(own, most, MPI.MAX)]
        if vector is None or most[0]:
            return
        if most[1] != -most[2]:
            raise RuntimeError(f"a sum of vectors that differ in size: from {-most[2]} to {most[1]} entries")
        rank, size = self._rank, self._size
        bounds = chunk_bounds(len(vector), size)
        chunks = [vector[start:stop] for start, stop in pairwise(bounds)]
        longest_bytes = values_bytes(max(len(chunk) for chunk in chunks), value_type)
        streams = np.empty((2, longest_bytes), np.uint8)
        for turn in range(2 * (size - 1)):
            sent, received = chunks[chunk_sent(rank, turn, size)], chunks[chunk_sent(rank - 1, turn, size)]
            adding = turn < size - 1
            out = streams[0, : values_bytes(len(sent), value_type)]
            target = streams[1, : values_bytes(len(received), value_type)]
            if turn == size - 1:  # the sum of this chunk is complete: every rank has to see it alike
                sent[:] = rounded(sent, value_type)
            to_wire(sent, out, value_type)
            began_s = self._now_s()
            yield [communicator.Irecv(target, (rank - 1) % size), communicator.Isend(out, (rank + 1) % size)]
            arrived = from_wire(target, len(received), value_type, copy=False)
            if adding:
                received += arrived
            else:
                received[:] = arrived
            self._carried((rank + 1) % size, out.nbytes, 0, began_s)
            self._carried((rank - 1) % size, 0, target.nbytes, began_s)
        ticket.vector = vector

    def _ask(self, channel: str, ticket: Ticket, pieces: Iterator[list[MPI.Request]]) -> Ticket:
        self._queues[channel].append(_Operation(ticket, pieces))
        self._wake()
        return ticket

    def progress(self) -> bool:
        """Start and complete pieces, in the thread that owns MPI. True if anything moved."""
        moved = False
        for name, queue in self._queues.items():
            while queue:
                if not MPI.Request.Testall(self._requests[name]):
                    break
                moved = True
                self._requests[name] = next(queue[0].pieces, [])
                if not self._requests[name]:
                    queue.popleft().ticket.done = True
        return moved

    def free(self) -> None:
        """Free the communicators. Nothing may be in flight."""
        for communicator in self._communicators.values():
            communicator.Free()
