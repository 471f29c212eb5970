"""The ring all-reduce: how a vector is cut into chunks, and what each rank moves. Pure.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
"""

from __future__ import annotations

from collections.abc import Sequence

from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import ValueType, rounded
from dlion_mpi.wire.format import values_bytes


def chunk_bounds(size: int, ranks: int) -> list[int]:
    """The bounds of ``ranks`` chunks of about equal length in a vector of ``size`` entries, (``ranks`` + 1,)."""
    return [size * chunk // ranks for chunk in range(ranks + 1)]


def chunk_sent(rank: int, turn: int, ranks: int) -> int:
    """The chunk that a rank sends to the next rank in a turn. The chunk that it receives is ``chunk_sent(rank - 1)``.

    Of 2 (n - 1) turns, the first n - 1 add what arrives to the rank's own chunk, the rest replace the chunk.
    """
    return (rank - turn) % ranks


def ring_sum(vectors: Sequence[Vector], value_type: ValueType) -> Vector:
    """Return the sum that a ring computes, (K,) float32, bit for bit the same on every rank.

    ``vectors``: of all ranks in order. Chunks travel as ``value_type``: each is rounded before it is sent, and added as
    float32 where it arrives.
    """
    ranks, total = len(vectors), vectors[0].copy()
    if ranks == 1:
        return total
    bounds = chunk_bounds(len(total), ranks)
    for chunk in range(ranks):  # begins at the rank of its number
        part = slice(bounds[chunk], bounds[chunk + 1])
        partial = vectors[chunk][part]
        for turn in range(1, ranks):
            partial = rounded(partial, value_type) + vectors[(chunk + turn) % ranks][part]
        total[part] = rounded(partial, value_type)
    return total


def ring_bytes(size: int, rank: int, ranks: int, value_type: ValueType = "float32") -> tuple[int, int]:
    """Bytes that a rank sends to the next rank, and receives from the previous one, to sum ``size`` entries."""
    bounds = chunk_bounds(size, ranks)

    def moved(sender: int) -> int:
        chunks = [chunk_sent(sender, turn, ranks) for turn in range(2 * (ranks - 1))]
        return sum(values_bytes(bounds[chunk + 1] - bounds[chunk], value_type) for chunk in chunks)

    return moved(rank), moved(rank - 1)
