"""Collectives over a virtual network, as `mpi/collectives.py` has them over MPI.

Each collective sends the messages of the real one through the same streams as gradients, so they share the links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dlion_mpi.algorithms.ring import chunk_bounds, chunk_sent, ring_sum
from dlion_mpi.simulation.links import VirtualLinks
from dlion_mpi.simulation.network import Network
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import ValueType
from dlion_mpi.wire.format import values_bytes

CHUNK = 1 << 16
"""Entries of a broadcast in flight at a time; see `mpi.collectives.CHUNK`."""
LINEAR = 4
"""Up to this many workers a broadcast is sent from the root to all ranks; with more, along a binomial tree, like Open
MPI's non-blocking broadcast."""


@dataclass(slots=True)
class VirtualTicket:
    """See `loop.ports.Ticket`."""

    done: bool = False
    table: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    vector: Vector = field(default_factory=lambda: np.empty(0, np.float32))


class VirtualCollectives:
    """The collectives of one worker; see `mpi.collectives.Collectives`. ``operations``: those of all workers."""

    def __init__(self, rank: int, operations: Operations) -> None:
        self._rank = rank
        self._operations = operations
        self._asked: dict[str, int] = {}

    def gather(self, channel: str, record: Sequence[float]) -> VirtualTicket:
        """Gather the ``record`` of each rank on all ranks."""
        operation = self._operations.gather(channel, self._next(channel))
        return operation.ask(self._rank, record)

    def broadcast(self, channel: str, root: int, vector: Vector) -> VirtualTicket:
        """Copy rank ``root``'s ``vector``, (K,) float32, into the ``vector`` of all ranks, in chunks."""
        operation = self._operations.broadcast(channel, self._next(channel), root, len(vector))
        return operation.ask(self._rank, vector)

    def reduce(self, channel: str, vector: Vector | None, value_type: ValueType = "float32") -> VirtualTicket:
        """Replace ``vector``, (K,) float32, by the sum over all workers. None: no worker gets a sum, now or later."""
        operation = self._operations.sum(channel, self._next(channel))
        return operation.ask(self._rank, vector, value_type)

    def _next(self, channel: str) -> int:
        self._asked[channel] = self._asked.get(channel, 0) + 1
        return self._asked[channel]


class Operations:
    """The collectives in flight. ``links``: by rank, they count what sums move. ``wake``: called with a rank."""

    def __init__(self, network: Network, links: Sequence[VirtualLinks], wake: Callable[[int], None]) -> None:
        self.workers = len(links)
        self.network = network
        self.links = links
        self.wake = wake
        self._gathers: dict[tuple[str, int], _Gather] = {}
        self._broadcasts: dict[tuple[str, int], _Broadcast] = {}
        self._sums: dict[tuple[str, int], _Sum] = {}

    def gather(self, channel: str, number: int) -> _Gather:
        """The ``number``th operation of a channel, a gather."""
        key = (channel, number)
        if key not in self._gathers:
            self._gathers[key] = _Gather(self, lambda: self._gathers.pop(key))
        return self._gathers[key]

    def broadcast(self, channel: str, number: int, root: int, entries: int) -> _Broadcast:
        """The ``number``th operation of a channel, a broadcast."""
        key = (channel, number)
        if key not in self._broadcasts:
            self._broadcasts[key] = _Broadcast(self, root, entries, lambda: self._broadcasts.pop(key))
        return self._broadcasts[key]

    def sum(self, channel: str, number: int) -> _Sum:
        """The ``number``th operation of a channel, a sum."""
        key = (channel, number)
        if key not in self._sums:
            self._sums[key] = _Sum(self, lambda: self._sums.pop(key))
        return self._sums[key]


class _Gather:
    """A gather in which each worker sends its record to all peers, like Open MPI's non-blocking allgather."""

    def __init__(self, operations: Operations, forget: Callable[[], object]) -> None:
        self._operations = operations
        self._forget = forget
        self._tickets: dict[int, VirtualTicket] = {}
        self._records: dict[int, Sequence[float]] = {}
        self._heard = [0] * operations.workers
        self._left = operations.workers
        self._table: npt.NDArray[np.float64] | None = None

    def ask(self, rank: int, record: Sequence[float], then: Callable[[int], None] | None = None) -> VirtualTicket:
        """Send rank ``rank``'s record. ``then``: called with the rank when it has all records, instead of `wake`."""
        self._tickets[rank] = ticket = VirtualTicket()
        self._then = then or self._operations.wake
        self._records[rank] = record
        for peer in range(self._operations.workers):
            if peer != rank:
                self._operations.network.stream(rank, peer).send(8 * len(record), self._hear, peer)
        self._hear(rank)
        return ticket

    def _hear(self, rank: int) -> None:
        """Count a record that has arrived at ``rank``, its own included."""
        self._heard[rank] += 1
        if self._heard[rank] == self._operations.workers:
            if self._table is None:
                self._table = np.array([self._records[r] for r in range(self._operations.workers)], dtype=np.float64)
            ticket = self._tickets[rank]
            ticket.table = self._table
            ticket.done = True
            self._then(rank)
            self._left -= 1
            if not self._left:
                self._forget()


class _Broadcast:
    """A broadcast in chunks down a tree. A worker requests the next chunk when its children have the current one.

    A parent sends a chunk when it has it and the child has requested it, as in MPI, where a long message waits for its
    receive.
    """

    def __init__(self, operations: Operations, root: int, entries: int, forget: Callable[[], object]) -> None:
        workers = operations.workers
        self._operations = operations
        self._forget = forget
        self._root = root
        self._chunks = [4 * min(CHUNK, entries - start) for start in range(0, entries, CHUNK)]
        self._parent, self._children = _tree(root, workers)
        self._tickets: dict[int, VirtualTicket] = {}
        self._chunk = [-1] * workers  # current chunk of each worker; -1 before it asks
        self._has = [False] * workers
        self._served = [0] * workers  # number of children that have the chunk
        self._begun = [-1] * workers  # last chunk that was sent to each worker
        self._left = workers

    def ask(self, rank: int, vector: Vector) -> VirtualTicket:
        self._tickets[rank] = ticket = VirtualTicket(vector=vector)
        self._want_next(rank)
        return ticket

    def _want_next(self, rank: int) -> None:
        self._chunk[rank] += 1
        if self._chunk[rank] == len(self._chunks):
            self._finish(rank)
            return
        self._has[rank] = rank == self._root
        self._served[rank] = 0
        self._begin(rank)
        for child in self._children[rank]:
            self._begin(child)
        self._move_on(rank)

    def _begin(self, child: int) -> None:
        """Send ``child`` the chunk that it has requested, if its parent has it."""
        chunk, parent = self._chunk[child], self._parent[child]
        if chunk > self._begun[child] and chunk == self._chunk[parent] and self._has[parent] and child != self._root:
            self._begun[child] = chunk
            self._operations.network.stream(parent, child).send(self._chunks[chunk], self._arrive, child)

    def _arrive(self, child: int) -> None:
        parent = self._parent[child]
        self._has[child] = True
        for grandchild in self._children[child]:
            self._begin(grandchild)
        self._move_on(child)
        self._served[parent] += 1
        self._move_on(parent)

    def _move_on(self, rank: int) -> None:
        if self._has[rank] and self._served[rank] == len(self._children[rank]):
            self._want_next(rank)

    def _finish(self, rank: int) -> None:
        self._has[rank] = False
        ticket = self._tickets[rank]
        if rank != self._root:
            ticket.vector[:] = self._tickets[self._root].vector
        ticket.done = True
        self._operations.wake(rank)
        self._left -= 1
        if not self._left:
            self._forget()


class _Sum:
    """A sum in a ring. In each turn a worker sends a chunk to the next one, and waits for that and for its own chunk.

    First the workers gather whether each has a vector. If one has none, no worker gets a sum.
    See `mpi.collectives.Collectives.reduce`.
    """

    def __init__(self, operations: Operations, forget: Callable[[], object]) -> None:
        workers = operations.workers
        self._operations = operations
        self._forget = forget
        self._vectors: dict[int, Vector | None] = {}
        self._tickets: dict[int, VirtualTicket] = {}
        self._present = _Gather(operations, lambda: None)
        self._bytes: list[int] = []  # of every chunk
        self._total: Vector | None = None
        self._turn = [-1] * workers  # -1: the gather is not complete
        self._began_s = [0.0] * workers
        self._delivered = [0] * workers  # chunks that have reached the next worker
        self._arrived = [0] * workers
        self._left = workers

    def ask(self, rank: int, vector: Vector | None, value_type: ValueType) -> VirtualTicket:
        """Take part with rank ``rank``'s vector, or None. ``value_type``: of the values that travel."""
        self._vectors[rank] = vector
        self._value_type = value_type
        self._tickets[rank] = ticket = VirtualTicket()
        self._present.ask(rank, [-1.0 if vector is None else len(vector)], self._begin)
        return ticket

    def _begin(self, rank: int) -> None:
        """Start the ring at a worker that has the gathered table."""
        vectors = [vector for _, vector in sorted(self._vectors.items()) if vector is not None]
        workers = self._operations.workers
        if len(vectors) < workers:
            self._finish(rank)
            return
        if self._total is None:
            if any(len(vector) != len(vectors[0]) for vector in vectors):
                raise ValueError(f"a sum of vectors that differ in size: {[len(vector) for vector in vectors]}")
            bounds = chunk_bounds(len(vectors[0]), workers)
            self._bytes = [values_bytes(stop - start, self._value_type) for start, stop in pairwise(bounds)]
            self._total = ring_sum(vectors, self._value_type)
        self._next_turn(rank)

    def _next_turn(self, rank: int) -> None:
        workers = self._operations.workers
        self._turn[rank] += 1
        if self._turn[rank] == 2 * (workers - 1):
            vector, total = self._vectors[rank], self._total
            assert vector is not None
            assert total is not None
            vector[:] = total
            self._tickets[rank].vector = vector
            self._finish(rank)
            return
        self._began_s[rank] = self._operations.links[rank].now_s()
        stream = self._operations.network.stream(rank, (rank + 1) % workers)
        stream.send(self._bytes[chunk_sent(rank, self._turn[rank], workers)], self._arrive, rank)

    def _arrive(self, sender: int) -> None:
        """Count a chunk that has arrived at the worker after ``sender``."""
        receiver = (sender + 1) % self._operations.workers
        self._delivered[sender] += 1
        self._arrived[receiver] += 1
        for rank in (sender, receiver):
            if 0 <= self._turn[rank] < min(self._delivered[rank], self._arrived[rank]):
                self._count(rank)
                self._next_turn(rank)

    def _count(self, rank: int) -> None:
        """Add the bytes of a turn to the worker's links."""
        workers, turn = self._operations.workers, self._turn[rank]
        links, began_s = self._operations.links[rank], self._began_s[rank]
        links.carried((rank + 1) % workers, self._bytes[chunk_sent(rank, turn, workers)], 0, began_s)
        links.carried((rank - 1) % workers, 0, self._bytes[chunk_sent(rank - 1, turn, workers)], began_s)

    def _finish(self, rank: int) -> None:
        self._tickets[rank].done = True
        self._operations.wake(rank)
        self._left -= 1
        if not self._left:
            self._forget()


def _tree(root: int, workers: int) -> tuple[list[int], list[list[int]]]:
    """Return the parent (the root's is itself) and the children of every rank."""
    parent = [root] * workers
    children: list[list[int]] = [[] for _ in range(workers)]
    for place in range(1, workers):  # counted from the root
        above = 0 if workers <= LINEAR else place - (1 << (place.bit_length() - 1))
        rank, parent_rank = (place + root) % workers, (above + root) % workers
        parent[rank] = parent_rank
        children[parent_rank].append(rank)
    return parent, children
