"""What a byte of the exchange costs this processor, measured once before training."""

from __future__ import annotations

import time

import numpy as np

from dlion_mpi import wire
from dlion_mpi.flat import Entries
from dlion_mpi.wire import ValueType

SIZE = 1 << 20
DENSITY = 0.05
REPEATS = 5


def seconds_per_byte(value_type: ValueType) -> float:
    """Processor seconds to pack and encode, decode and add one byte of a message, the fastest of a few times.

    Of a vector of SIZE entries DENSITY are sent: large enough that what a message costs however small it is
    does not count, and sparse as messages are. The time that MPI takes to move the byte is not in it.
    """
    size = SIZE
    generator = np.random.default_rng(0)
    vector = generator.standard_normal(size, dtype=np.float32)
    indices = np.flatnonzero(generator.random(size, dtype=np.float32) < DENSITY).astype(np.uint32)
    buffer = np.empty(wire.capacity_bytes(size), np.uint8)
    header = wire.Header(kind=wire.Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=0, acknowledged=0)
    best_s, length = float("inf"), wire.HEADER_BYTES
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        length = wire.encode(header, Entries(size, vector[indices], indices), buffer, value_type)
        wire.decode(buffer[:length], size=size).entries.add_to(vector, 0.5)
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s / length
