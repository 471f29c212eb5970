"""Non-blocking collectives, each kind on a communicator of its own so that kinds may overtake one another.

The worker's loop asks for a gather or a broadcast and gets a ticket; the thread that owns MPI starts and
completes them in order. All ranks must ask for the same sequence on a channel, at their own pace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from dlion_mpi.flat import Vector

CHUNK = 1 << 16
"""Entries (4 bytes each) of a broadcast in flight at a time, so that gradients pass between the chunks."""

Table = npt.NDArray[np.float64]


@dataclass(slots=True)
class Ticket:
    """A collective under way. ``table``: (n, k) of a gather, row r from rank r; ``vector``: of a broadcast."""

    done: bool = False
    table: Table = field(default_factory=lambda: np.empty((0, 0)))
    vector: Vector = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(slots=True)
class _Operation:
    ticket: Ticket
    start: Callable[[], MPI.Request | None]
    """Starts the next piece, or returns None when there is none left."""


class Collectives:
    """The channels of one worker, by name."""

    def __init__(self, communicator: MPI.Intracomm, channels: Sequence[str], wake: Callable[[], None]) -> None:
        self._size = communicator.Get_size()
        self._communicators = {name: communicator.Dup() for name in channels}
        self._queues: dict[str, deque[_Operation]] = {name: deque() for name in channels}
        self._requests: dict[str, MPI.Request | None] = dict.fromkeys(channels)
        self._wake = wake

    def gather(self, channel: str, record: Sequence[float]) -> Ticket:
        """Everyone's ``record`` to everyone (`Iallgather`); all records have the same length."""
        communicator = self._communicators[channel]
        own = np.array(record, dtype=np.float64)
        table = np.empty((self._size, len(own)), dtype=np.float64)
        pieces = iter([lambda: communicator.Iallgather(own, table)])
        return self._ask(channel, Ticket(table=table), pieces)

    def broadcast(self, channel: str, root: int, vector: Vector) -> Ticket:
        """Rank ``root``'s ``vector`` (K,) float32 to everyone, in chunks (`Ibcast`), into the others' ``vector``."""
        communicator = self._communicators[channel]

        def piece(start: int) -> Callable[[], MPI.Request]:
            return lambda: communicator.Ibcast(vector[start : start + CHUNK], root=root)

        pieces = (piece(start) for start in range(0, len(vector), CHUNK))
        return self._ask(channel, Ticket(vector=vector), pieces)

    def _ask(self, channel: str, ticket: Ticket, pieces: object) -> Ticket:
        iterator = iter(pieces)  # type: ignore[call-overload]

        def start() -> MPI.Request | None:
            begin = next(iterator, None)
            return begin() if begin is not None else None

        self._queues[channel].append(_Operation(ticket, start))
        self._wake()
        return ticket

    def progress(self) -> bool:
        """Start and complete what can be. True if anything moved. Called by the thread that owns MPI."""
        moved = False
        for name, queue in self._queues.items():
            while queue:
                request = self._requests[name]
                if request is not None and not request.Test():
                    break
                moved = True
                self._requests[name] = queue[0].start()
                if self._requests[name] is None:
                    queue.popleft().ticket.done = True
        return moved

    def free(self) -> None:
        """Free the channels' communicators; nothing may be under way."""
        for communicator in self._communicators.values():
            communicator.Free()
