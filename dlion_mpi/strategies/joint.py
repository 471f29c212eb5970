"""The sum of all workers' messages of a step, for strategies that send the same entries to all peers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message


def joint(own: Entries, rank: int, messages: Sequence[Message]) -> Vector:
    """Add up what this worker, ``rank``, has sent and the ``messages`` of its peers, one of each: (P,) float32.

    In the order of ranks, so that the sum is the same bits on all workers.
    """
    parts = {rank: own} | {message.header.sender: message.entries for message in messages}
    total = np.zeros(own.size, np.float32)
    for sender in sorted(parts):
        parts[sender].add_to(total, 1.0)
    return total
