"""One clock for all ranks."""

from __future__ import annotations

import time

import numpy as np

from dlion_mpi.mpi.ranks import Ranks

ROUND_TRIPS = 10
"""Messages to and fro per rank; the fastest places its clock."""
TAG = 1


class CommonClock:
    """Seconds of rank 0's clock since training began, on every rank. Before `start`: since the clock was made."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._offset_s = _offset_to_root_s(ranks)
        self._start_s = time.monotonic()

    def start(self, at_s: float = 0.0) -> None:
        """Begin on all ranks together, at ``at_s`` of rank 0: 0, or where a checkpoint ended."""
        self._ranks.barrier()
        origin = np.array([time.monotonic() - at_s])
        self._ranks.wait(self._ranks.communicator.Ibcast(origin, root=0))
        self._start_s = float(origin[0]) - self._offset_s

    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s


def _offset_to_root_s(ranks: Ranks) -> float:
    """Measure what to add to this rank's `time.monotonic` to read rank 0's, from the fastest of some round trips."""
    offset_s = 0.0
    word = np.zeros(1, dtype=np.float64)
    communicator = ranks.communicator
    for rank in range(1, ranks.size):
        best_s = float("inf")
        for _ in range(ROUND_TRIPS):
            if ranks.rank == 0:
                ranks.wait(communicator.Irecv(word, rank, TAG))
                word[0] = time.monotonic()
                ranks.wait(communicator.Isend(word, rank, TAG))
            elif ranks.rank == rank:
                sent_s = time.monotonic()
                ranks.wait(communicator.Isend(word, 0, TAG))
                ranks.wait(communicator.Irecv(word, 0, TAG))
                round_trip_s = time.monotonic() - sent_s
                if round_trip_s < best_s:
                    best_s = round_trip_s
                    offset_s = float(word[0]) - (sent_s + round_trip_s / 2)
    return offset_s
