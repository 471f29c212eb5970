"""Bytes from rank to rank by non-blocking MPI; see `loop.ports.Transport`.

Any thread calls `send`. Only the thread that owns MPI calls `progress` and `close`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dlion_mpi.errors import RunError
from dlion_mpi.loop.ports import Channel, Done
from dlion_mpi.mpi.startup import MPI
from dlion_mpi.wire import Bytes

SLACK_BYTES = 1 << 16
"""Room of a receive buffer beyond its limit, so that most parcels that are too long are found here: Open MPI 5.0 may
crash in a receive that it has to truncate."""


@dataclass(slots=True, eq=False)
class _Receive:
    """A receive that was posted. ``length``: of what has arrived, in bytes."""

    buffer: Bytes
    length: int | None = None


@dataclass(slots=True, eq=False)
class _Source:
    """A channel of one peer. ``posted``: its receives, in the order in which MPI matches them."""

    peer: int
    channel: Channel
    limit_bytes: int
    posted: deque[_Receive] = field(default_factory=deque)


class MpiTransport:
    """Moves bytes over ``communicator``, which has no other user. ``wake``: called when there is work to do."""

    def __init__(self, communicator: MPI.Intracomm, wake: Callable[[], None]) -> None:
        self._communicator = communicator
        self._peers = [peer for peer in range(communicator.Get_size()) if peer != communicator.Get_rank()]
        self._wake = wake
        self._deliver: Callable[[int, Channel, Bytes, Done], None] = lambda *parcel: None
        self._outbox: deque[tuple[int, Channel, Bytes, Done]] = deque()
        self._free: deque[tuple[_Source, Bytes]] = deque()
        """Buffers without a receive."""
        self._requests: list[MPI.Request] = []
        self._statuses: list[MPI.Status] = []
        self._on_complete: list[Callable[[MPI.Status], None]] = []
        self._cpu_s = 0.0

    def open(self, deliver: Callable[[int, Channel, Bytes, Done], None]) -> None:
        """Call ``deliver`` for each parcel that arrives."""
        self._deliver = deliver

    def expect(self, channel: Channel, size_bytes: int, buffers: int) -> None:
        """Prepare to receive parcels of at most ``size_bytes``; ``buffers`` per peer may be unread."""
        for source in (_Source(peer, channel, size_bytes) for peer in self._peers):
            self._free.extend((source, np.empty(size_bytes + SLACK_BYTES, np.uint8)) for _ in range(buffers))

    def send(self, peer: int, channel: Channel, parcel: Bytes, done: Done) -> None:
        """Queue a parcel. ``done`` is called when its memory may be reused."""
        self._outbox.append((peer, channel, parcel, done))
        self._wake()

    def cpu_s(self) -> float:
        """Processor seconds of the thread that owns MPI."""
        return self._cpu_s

    def progress(self) -> bool:
        """Post a receive for each free buffer, send what is queued, complete what is done. True if anything moved."""
        self._cpu_s = time.thread_time()
        while self._free:
            self._receive(*self._free.popleft())
        moved = bool(self._outbox)
        while self._outbox:
            peer, channel, parcel, done = self._outbox.popleft()
            request = self._communicator.Isend([parcel, MPI.BYTE], peer, channel)
            self._add(request, partial(_sent, done))
        return self._complete() or moved

    def close(self) -> None:
        """Take back the posted receives: a buffer belongs to MPI until its receive is done or cancelled."""
        for request in self._requests:
            request.Cancel()
        MPI.Request.Waitall(self._requests)
        self._requests, self._on_complete = [], []

    def _complete(self) -> bool:
        if not self._requests:
            return False
        while len(self._statuses) < len(self._requests):
            self._statuses.append(MPI.Status())
        try:
            done = MPI.Request.Testsome(self._requests, self._statuses) or []
        except MPI.Exception as error:
            raise RunError(
                f"MPI could not complete a message ({error}): its sender is gone, or sent more than any message of "
                "this run may hold"
            ) from error
        if not done:
            return False
        finished = [(self._on_complete[i], self._statuses[n]) for n, i in enumerate(done)]
        gone = set(done)
        self._requests = [r for i, r in enumerate(self._requests) if i not in gone]
        self._on_complete = [c for i, c in enumerate(self._on_complete) if i not in gone]
        for complete, status in finished:
            complete(status)
        return True

    def _add(self, request: MPI.Request, complete: Callable[[MPI.Status], None]) -> None:
        self._requests.append(request)
        self._on_complete.append(complete)

    def _receive(self, source: _Source, buffer: Bytes) -> None:
        receive = _Receive(buffer)
        source.posted.append(receive)
        request = self._communicator.Irecv([buffer, MPI.BYTE], source.peer, source.channel)
        self._add(request, partial(self._received, source, receive))

    def _received(self, source: _Source, receive: _Receive, status: MPI.Status) -> None:
        """Deliver a parcel, unless an earlier one of its channel is still arriving: then after that one."""
        receive.length = status.Get_count(MPI.BYTE)
        if receive.length > source.limit_bytes:
            raise RunError(
                f"rank {source.peer} sent {receive.length} bytes, more than any message of this run may hold: "
                "are all ranks of this version?"
            )
        while source.posted and source.posted[0].length is not None:
            first = source.posted.popleft()
            parcel = first.buffer[: first.length]
            self._deliver(source.peer, source.channel, parcel, partial(self._release, source, first.buffer))

    def _release(self, source: _Source, buffer: Bytes) -> None:
        self._free.append((source, buffer))
        self._wake()


def _sent(done: Done, status: MPI.Status) -> None:
    done()
