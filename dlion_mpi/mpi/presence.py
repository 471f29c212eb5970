"""Notices of ranks that wait: a rank that waits long says so to all others once a second.

A rank that is stopped, dead, cut off or busy says nothing, so those that wait know for whom. While no rank waits long,
nothing is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlion_mpi.mpi.startup import MPI

EVERY_S, FRESH_S = 1.0, 3.0
"""Seconds between two notices, and for how long one counts."""
NOTICE, TEXT = 1, 2
"""Tags."""
MOST_TEXT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Notice:
    """A peer's notice. ``step``: steps that it has done, -1 before the first. ``ends``: it has waited too long for rank
    ``peer`` and ends the run."""

    heard_s: float
    step: int
    ends: bool
    peer: int


class Presence:
    """Notices of waiting, over ``communicator``, which has no other user.

    Only the thread that owns MPI calls `progress` and the methods after it; other threads set ``waits`` and ``step``.
    """

    def __init__(self, communicator: MPI.Intracomm, now_s: Callable[[], float] = time.monotonic) -> None:
        self._communicator, self._now_s = communicator, now_s
        self._rank, self._size = communicator.Get_rank(), communicator.Get_size()
        self.waits = False
        """Whether this rank has waited long."""
        self.step = -1
        self.notices: dict[int, Notice] = {}
        """The newest of each peer that has sent one."""
        self._sending: dict[int, MPI.Request] = {}
        self._sent, self._received = np.zeros(self._size, np.int64), np.zeros(self._size, np.int64)
        self._said_s = -EVERY_S
        self._ends_for: int | None = None
        self._is_closing = False

    def waiting(self) -> set[int]:
        """Return the peers that have just said that they wait."""
        now_s = self._now_s()
        return {peer for peer, notice in dict(self.notices).items() if now_s - notice.heard_s < FRESH_S}

    def progress(self) -> bool:
        """Tell and hear, if this rank waits. Returns False: a notice is not what a rank waits for."""
        if self.waits:
            if self._now_s() - self._said_s >= EVERY_S and not self._is_closing:
                self.tell()
            self.hear()
        return False

    def tell(self, ends_for: int | None = None) -> None:
        """Send every peer a notice, unless the one before has not been sent.

        ``ends_for``: the rank for which this one has waited too long; all later notices say so too.
        """
        self._said_s = self._now_s()
        if ends_for is not None:
            self._ends_for = ends_for
        ends = self._ends_for is not None
        record = np.array([self.step, ends, self._ends_for if ends else -1], np.float64)
        for peer in range(self._size):
            before = self._sending.get(peer)
            if peer != self._rank and (before is None or before.Test()):
                self._sending[peer] = self._communicator.Isend(record.copy(), peer, NOTICE)
                self._sent[peer] += 1

    def hear(self) -> None:
        """Receive the notices that have arrived."""
        status = MPI.Status()
        while self._communicator.Iprobe(MPI.ANY_SOURCE, NOTICE, status):
            self._receive(status.Get_source())

    def _receive(self, peer: int) -> None:
        record = np.zeros(3)
        self._communicator.Recv(record, peer, NOTICE)
        self._received[peer] += 1
        step, ends, waited_for = record.tolist()
        self.notices[peer] = Notice(self._now_s(), int(step), bool(ends), int(waited_for))

    def tell_text(self, text: str) -> None:
        """Send every peer a text. Never waits for one that does not receive."""
        parcel = np.frombuffer(text.encode(), np.uint8)
        for peer in range(self._size):
            if peer != self._rank:
                self._communicator.Isend([parcel, MPI.BYTE], peer, TEXT)

    def hear_texts(self) -> list[tuple[int, str]]:
        """Return the texts that have arrived, each with its sender."""
        found = []
        status = MPI.Status()
        while self._communicator.Iprobe(MPI.ANY_SOURCE, TEXT, status):
            parcel = np.empty(min(status.Get_count(MPI.BYTE), MOST_TEXT_BYTES), np.uint8)
            self._communicator.Recv([parcel, MPI.BYTE], status.Get_source(), TEXT)
            found.append((status.Get_source(), parcel.tobytes().decode(errors="replace")))
        return found

    def close(self, done: Callable[[MPI.Request], None]) -> None:
        """Receive all notices and free the communicator, on all ranks together. ``done``: waits for a request."""
        self._is_closing = True
        expected = np.empty_like(self._sent)
        done(self._communicator.Ialltoall(self._sent, expected))
        self.hear()
        for peer in range(self._size):
            while self._received[peer] < expected[peer]:
                self._receive(peer)
        for request in self._sending.values():
            done(request)
        self._communicator.Free()
