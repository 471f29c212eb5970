"""Few entries of a vector: the largest, and how they leave a memory as the receiver will see them. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from dlion_mpi.vector.layout import Entries, Indices, Vector
from dlion_mpi.wire import ValueType, rounded_entries


def largest(vector: Vector, segments: Iterable[slice], share: float) -> npt.NDArray[np.intp]:
    """Find the largest magnitudes of each segment: their places in ``vector``, ascending.

    ``share``: of a segment's entries, in (0, 1]; at least one entry of each. Exact, unlike a threshold from a sample.
    """
    found = [np.empty(0, np.intp)]
    for segment in segments:
        magnitudes = np.abs(vector[segment])
        count = min(len(magnitudes), math.ceil(share * len(magnitudes)))
        places = np.argpartition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count :]
        found.append(np.sort(places) + segment.start)
    return np.concatenate(found)


def take_out(memory: Vector, indices: Indices | None, value_type: ValueType) -> Entries:
    """Take entries out of a memory, (P,) float32, as the receiver will see them; rounding errors stay in it.

    ``indices``: (K,) uint32, ascending, or None for all.
    """
    places = slice(None) if indices is None else indices.astype(np.intp)
    values = memory[places]
    entries = Entries(len(memory), values, indices)
    received = rounded_entries(entries, value_type)
    if received is entries:
        if indices is None:
            received = Entries(len(memory), values.copy())
        memory[places] = 0
    else:
        memory[places] = values - received.values
    return received
