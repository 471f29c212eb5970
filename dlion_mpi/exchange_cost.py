"""What a byte of the exchange costs this processor, measured once before training."""

from __future__ import annotations

import time

import numpy as np

from dlion_mpi import wire
from dlion_mpi.flat import Entries, Layout
from dlion_mpi.select import nested, relative_magnitude
from dlion_mpi.wire import ValueType

SIZE = 1 << 20
DENSITY = 0.05
REPEATS = 5


def seconds_per_byte(value_type: ValueType) -> float:
    """Processor seconds to select, encode, decode and add one byte of a message, the fastest of a few times.

    Of a vector of SIZE entries about DENSITY are sent: sparse, as messages are, and large enough that what a
    message costs however small it is does not count. The time that MPI takes to move the byte is not in it.
    """
    vector = np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)
    layout = Layout.of([(SIZE,)])
    scratch = np.empty(SIZE, np.float32)
    buffer = np.empty(wire.capacity_bytes(SIZE), np.uint8)
    header = wire.Header(kind=wire.Kind.GRADIENT, sender=0, epoch=0, step=0, sequence=0, acknowledged=0)
    budget_bytes = wire.bytes_for_count(int(DENSITY * SIZE), SIZE, value_type)
    best_s, length = float("inf"), budget_bytes
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        relative = relative_magnitude(vector, layout, scratch)
        (selection,) = nested(relative, [budget_bytes], n_min=1e-3, value_type=value_type)
        length = wire.encode(header, Entries(SIZE, vector[selection.indices], selection.indices), buffer, value_type)
        wire.decode(buffer[:length], size=SIZE).entries.add_to(vector, 0.0)
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s / length
