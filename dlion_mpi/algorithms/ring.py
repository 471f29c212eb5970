"""The ring all-reduce: how a vector is cut into chunks, and what each rank moves. Pure.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
"""

from __future__ import annotations


def chunk_bounds(size: int, ranks: int) -> list[int]:
    """The bounds of ``ranks`` chunks of about equal length in a vector of ``size`` entries, (``ranks`` + 1,)."""
    return [size * chunk // ranks for chunk in range(ranks + 1)]


def chunk_sent(rank: int, turn: int, ranks: int) -> int:
    """The chunk that a rank sends to the next rank in a turn. The chunk that it receives is ``chunk_sent(rank - 1)``.

    Of 2 (n - 1) turns, the first n - 1 add what arrives to the rank's own chunk, the rest replace the chunk.
    """
    return (rank - turn) % ranks


def ring_bytes(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Bytes that a rank sends to the next rank, and receives from the previous one, to sum ``size`` float32."""
    bounds = chunk_bounds(size, ranks)

    def moved(sender: int) -> int:
        chunks = [chunk_sent(sender, turn, ranks) for turn in range(2 * (ranks - 1))]
        return 4 * sum(bounds[chunk + 1] - bounds[chunk] for chunk in chunks)

    return moved(rank), moved(rank - 1)
