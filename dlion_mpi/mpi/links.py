"""Point-to-point MPI: one link per peer, its buffers, bytes, acknowledgements and bandwidth.

`Links` has two sides. The worker's loop calls `view`, `post` and `poll`, which never call MPI. The thread that
owns MPI calls `progress`, which posts what was queued, completes what has arrived, and acknowledges it at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from dlion_mpi import wire
from dlion_mpi.algorithms.bandwidth import LinkRate
from dlion_mpi.errors import RunError
from dlion_mpi.loop.ports import LinkTotals, Stamp, link_views
from dlion_mpi.metrics.timeline import MessageLog, Unlogged
from dlion_mpi.strategies.contract import LinkView, Outgoing

Buffer = npt.NDArray[np.uint8]

DATA, ACK, REPORT = 1, 2, 3
"""MPI tags. A peer's DATA messages arrive in the order of their sequence numbers, since MPI does not overtake."""
RECEIVES = 2
"""Receives posted per peer and tag."""
RECEIVE_BUFFERS = 3
"""Buffers per peer for what arrives: those posted and those waiting in `poll`. When none is free nothing is
received or acknowledged, so the sender's window closes: a slow reader slows its writers and no queue grows."""
SLACK_BYTES = 1 << 16
"""By so much a receive buffer is longer than any message, so that one which is too long is mostly found out here: Open
MPI 5.0 may crash in a receive that it has to cut off."""


@dataclass(slots=True)
class _Link:
    """One peer. Guarded by the lock of `Links` where both threads touch it."""

    peer: int
    rate: LinkRate = field(default_factory=LinkRate)
    free_send: deque[Buffer] = field(default_factory=deque)
    free_receive: deque[Buffer] = field(default_factory=deque)
    posted: int = 0  # receives of DATA
    sequence: int = 0
    received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Links:
    """All links of one worker. ``size``: entries of the gradient vector (P); ``now_s``: the run's common clock.

    ``log``: is told of every message, by the loop's side only.
    """

    def __init__(
        self,
        communicator: MPI.Intracomm,
        *,
        size: int,
        window: int,
        now_s: Callable[[], float],
        wake: Callable[[], None],
        log: MessageLog | None = None,
    ) -> None:
        self.rank = communicator.Get_rank()
        self._communicator = communicator
        self._size = size
        self._window = window
        self._now_s = now_s
        self._wake = wake
        self._log = log or Unlogged()
        self._lock = threading.Lock()
        self._capacity_bytes = wire.capacity_bytes(size)
        self._outbox: deque[tuple[_Link, Buffer, int]] = deque()
        self._arrivals: deque[tuple[_Link, Buffer, int, float]] = deque()
        self._requests: list[MPI.Request] = []
        self._statuses: list[MPI.Status] = []
        self._on_complete: list[Callable[[MPI.Status], None]] = []
        self._pieces: deque[tuple[int, int, int, float, float]] = deque()
        self._quiet = False
        self._report_length = 0
        self._reports_out: deque[tuple[_Link, Buffer]] = deque()
        self._reporting = False
        self.reports: dict[int, npt.NDArray[np.float64]] = {}
        """The newest report of every peer that has sent one; see `report`."""
        self._cpu_s = 0.0
        self._links: dict[int, _Link] = {}
        for peer in range(communicator.Get_size()):
            if peer != self.rank:
                self._links[peer] = link = _Link(peer)
                link.free_send.extend(np.empty(self._capacity_bytes, np.uint8) for _ in range(window))
                room = self._capacity_bytes + SLACK_BYTES
                link.free_receive.extend(np.empty(room, np.uint8) for _ in range(RECEIVE_BUFFERS))

    # The loop's side: no MPI here.

    def view(self, peers: Iterable[int], step_s: float) -> dict[int, LinkView]:
        """Of every peer whether its link has room in its window, and what it can carry in ``step_s`` seconds."""
        now_s = self._now_s()
        with self._lock:
            return link_views({peer: self._links[peer].rate for peer in peers}, self._window, step_s, now_s)

    def post(self, messages: dict[int, Outgoing], stamp: Stamp) -> dict[int, int]:
        """Encode a message per peer and queue it. Returns the bytes of each."""
        sizes = {}
        encoded: dict[tuple[int, str, wire.Kind], Buffer] = {}  # what goes to several peers is encoded once
        for peer, message in messages.items():
            link = self._links[peer]
            buffer = self._send_buffer(link, message)
            with self._lock:
                link.sequence += 1
                link.messages_sent += 1
                header = self._header(link, _kind(message), stamp, message.quality)
            content = (id(message.entries), message.value_type, header.kind)
            if content in encoded:
                length = wire.encode_again(header, encoded[content], buffer)
            else:
                length = wire.encode(header, message.entries, buffer, message.value_type)
                encoded[content] = buffer[:length]
            posted_s = self._now_s()
            with self._lock:
                link.bytes_sent += length
                link.rate.posted(header.sequence, length, posted_s)
            self._log.sent(peer, header, length, posted_s)
            self._outbox.append((link, buffer, length))
            sizes[peer] = length
        self._wake()
        return sizes

    def announce(self, kind: wire.Kind, stamp: Stamp) -> None:
        """Tell every peer that this worker leaves (CLOSE) or that the run must stop (STOP)."""
        self.post({peer: Outgoing(kind=kind) for peer in self._links}, stamp)

    def poll(self) -> list[wire.Message]:
        """The messages that have arrived, decoded. Raises RunError for one that is malformed, naming its sender."""
        messages = []
        while self._pieces:
            self._log.piece(*self._pieces.popleft())
        while self._arrivals:
            link, buffer, length, arrived_s = self._arrivals.popleft()
            try:
                message = wire.decode(buffer[:length], size=self._size)
            except wire.WireError as error:
                raise RunError(f"rejected a message from rank {link.peer}: {error}") from None
            if message.header.sender != link.peer:
                raise RunError(
                    f"rejected a message from rank {link.peer}: it says it is from rank {message.header.sender}"
                )
            with self._lock:
                link.free_receive.append(buffer)
            self._log.arrived(link.peer, message.header.sequence, arrived_s)
            messages.append(message)
        if messages:
            self._wake()
        return messages

    def expect_reports(self, length: int) -> None:
        """Keep every peer's newest report, of so many numbers. Before `start`."""
        self._report_length = length

    def report(self, peer: int, numbers: npt.NDArray[np.float64]) -> None:
        """Tell a peer, which expects it, how it goes here; what counts for the training has nothing to do with it.

        It takes no room in the link's window, and none is sent while the one before it is still under way.
        """
        link, buffer = self._links[peer], numbers.astype("<f8").view(np.uint8)
        with self._lock:
            if self._quiet or self._reporting:
                return
            self._reporting = True
            link.messages_sent += 1
            link.bytes_sent += len(buffer)
        self._reports_out.append((link, buffer))
        self._wake()

    def totals(self) -> dict[int, LinkTotals]:
        """What every link has carried so far."""
        now_s = self._now_s()
        with self._lock:
            return {
                peer: LinkTotals(link.bytes_sent, link.bytes_received, link.rate.bytes_per_s(now_s) or 0.0)
                for peer, link in self._links.items()
            }

    def carried(self, peer: int, sent_bytes: int, received_bytes: int, began_s: float | None = None) -> None:
        """Count what went over a link beside its messages; ``began_s``: from when until now, if that is known."""
        if peer == self.rank:
            return
        link = self._links[peer]
        with self._lock:
            link.bytes_sent += sent_bytes
            link.bytes_received += received_bytes
        if began_s is not None:
            self._pieces.append((peer, sent_bytes, received_bytes, began_s, self._now_s()))

    def fall_silent(self) -> list[int]:
        """Send nothing more, acknowledgements included. Returns how many messages went to every rank."""
        with self._lock:
            self._quiet = True
            counts = [0] * self._communicator.Get_size()
            for peer, link in self._links.items():
                counts[peer] = link.messages_sent
            return counts

    def received_counts(self) -> list[int]:
        """How many messages have come from every rank."""
        counts = [0] * self._communicator.Get_size()
        for peer, link in self._links.items():
            counts[peer] = link.messages_received
        return counts

    def _send_buffer(self, link: _Link, message: Outgoing) -> Buffer:
        if message.entries is None:
            return np.empty(wire.HEADER_BYTES, np.uint8)
        try:
            return link.free_send.popleft()
        except IndexError:  # in sync a message may be posted before the one before it is acknowledged
            return np.empty(self._capacity_bytes, np.uint8)

    def _header(self, link: _Link, kind: wire.Kind, stamp: Stamp, quality: float = 0.0) -> wire.Header:
        return wire.Header(
            kind=kind,
            sender=self.rank,
            epoch=stamp.epoch,
            step=stamp.step,
            sequence=link.sequence,
            acknowledged=link.received,
            lbs=stamp.lbs,
            gbs=stamp.gbs,
            quality=quality,
            computed_at=stamp.computed_at,
        )

    def cpu_s(self) -> float:
        """Processor seconds of the thread that owns MPI."""
        return self._cpu_s

    # The side of the thread that owns MPI.

    def start(self) -> None:
        """Post the receives."""
        for link in self._links.values():
            for _ in range(RECEIVES):
                self._receive_ack(link, np.empty(wire.HEADER_BYTES, np.uint8))
            if self._report_length:
                self._receive_report(link, np.empty(self._report_length, "<f8"))
        self._receive_where_free()

    def progress(self) -> bool:
        """Post what is queued, complete what is done. True if anything moved."""
        self._cpu_s = time.thread_time()
        moved = False
        while self._outbox:
            link, buffer, length = self._outbox.popleft()
            self._send(link, DATA, buffer, length)
            moved = True
        while self._reports_out:
            self._send_report(*self._reports_out.popleft())
            moved = True
        self._receive_where_free()
        if not self._requests:
            return moved
        statuses = self._statuses
        while len(statuses) < len(self._requests):
            statuses.append(MPI.Status())
        try:
            done = MPI.Request.Testsome(self._requests, statuses) or []
        except MPI.Exception as error:
            raise RunError(
                f"MPI could not complete a message ({error}): its sender is gone, or sent more than any message of "
                "this run may hold"
            ) from error
        if not done:
            return moved
        finished = [(self._on_complete[i], statuses[n]) for n, i in enumerate(done)]
        gone = set(done)
        self._requests = [r for i, r in enumerate(self._requests) if i not in gone]
        self._on_complete = [c for i, c in enumerate(self._on_complete) if i not in gone]
        for complete, status in finished:
            complete(status)
        return True

    def cancel(self) -> None:
        """Take back the posted receives: a buffer belongs to MPI until its receive is done or cancelled."""
        for request in self._requests:
            request.Cancel()
        MPI.Request.Waitall(self._requests)
        self._requests, self._on_complete = [], []

    def _add(self, request: MPI.Request, complete: Callable[[MPI.Status], None]) -> None:
        self._requests.append(request)
        self._on_complete.append(complete)

    def _send(self, link: _Link, tag: int, buffer: Buffer, length: int) -> None:
        def complete(status: MPI.Status) -> None:
            if len(buffer) == self._capacity_bytes and len(link.free_send) < self._window:
                link.free_send.append(buffer)

        self._add(self._communicator.Isend([buffer, length, MPI.BYTE], link.peer, tag), complete)

    def _receive_where_free(self) -> None:
        for link in self._links.values():
            # Of RECEIVE_BUFFERS at most RECEIVES are posted at a time; the rest waits in `poll`.
            while link.free_receive and link.posted < RECEIVES:
                link.posted += 1
                self._receive_data(link, link.free_receive.popleft())

    def _receive_data(self, link: _Link, buffer: Buffer) -> None:
        def complete(status: MPI.Status) -> None:
            length = status.Get_count(MPI.BYTE)
            if length > self._capacity_bytes:
                raise RunError(
                    f"rank {link.peer} sent {length} bytes, more than any message of this run may hold: "
                    "are all ranks of this version?"
                )
            link.posted -= 1
            with self._lock:
                link.received += 1
                link.messages_received += 1
                link.bytes_received += length
            arrived_s = self._now_s()
            self._arrivals.append((link, buffer, length, arrived_s))
            self._acknowledge(link, arrived_s)

        self._add(self._communicator.Irecv([buffer, MPI.BYTE], link.peer, DATA), complete)

    def _acknowledge(self, link: _Link, arrived_s: float) -> None:
        with self._lock:
            if self._quiet:
                return
            link.messages_sent += 1
            link.bytes_sent += wire.HEADER_BYTES
            header = self._header(link, wire.Kind.ACK, Stamp(0, 0, 0, 0, arrived_s))
        buffer = np.empty(wire.HEADER_BYTES, np.uint8)
        self._send(link, ACK, buffer, wire.encode(header, None, buffer))

    def _receive_ack(self, link: _Link, buffer: Buffer) -> None:
        def complete(status: MPI.Status) -> None:
            length = status.Get_count(MPI.BYTE)
            header = wire.decode(buffer[:length], size=self._size).header
            with self._lock:
                link.messages_received += 1
                link.bytes_received += length
                link.rate.acknowledged(header.acknowledged, header.computed_at)
            self._receive_ack(link, buffer)

        self._add(self._communicator.Irecv([buffer, MPI.BYTE], link.peer, ACK), complete)

    def _send_report(self, link: _Link, buffer: Buffer) -> None:
        def complete(status: MPI.Status) -> None:
            self._reporting = False

        self._add(self._communicator.Isend([buffer, MPI.BYTE], link.peer, REPORT), complete)

    def _receive_report(self, link: _Link, numbers: npt.NDArray[np.float64]) -> None:
        def complete(status: MPI.Status) -> None:
            length = status.Get_count(MPI.BYTE)
            if length != numbers.nbytes:
                raise RunError(f"rejected a report of {length} bytes from rank {link.peer}, expected {numbers.nbytes}")
            with self._lock:
                link.messages_received += 1
                link.bytes_received += length
            self.reports[link.peer] = numbers.astype(np.float64)
            self._receive_report(link, numbers)

        self._add(self._communicator.Irecv([numbers.view(np.uint8), MPI.BYTE], link.peer, REPORT), complete)


def _kind(message: Outgoing) -> wire.Kind:
    """A message without entries still tells the sender's step, unless it says something else."""
    bare = message.entries is None and message.kind is wire.Kind.GRADIENT
    return wire.Kind.PROGRESS if bare else message.kind
