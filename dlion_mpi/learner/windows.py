"""Files that are larger than memory: read in windows, in an order that is nearly a shuffle.

The rows are cut into blocks. Every epoch permutes the blocks, reads them in windows of several blocks, and shuffles the
rows inside a window. The order depends on (seed, rank, epoch) alone, so that a resumed run reads from its window on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.source import Table

MEMORY_SHARE = 0.25
"""Largest share of a machine's memory for the data of all its ranks. A shard above it is read in windows."""
WINDOWS_IN_MEMORY = 5
"""Windows that exist at the same time: two wait, one is in use, one is read and one is shuffled."""
BLOCKS_IN_WINDOW = 16
LARGEST_BLOCK_BYTES = 1 << 20
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
VARIABLE = "DLION_DATA_MEMORY"


def memory_bytes(local_ranks: int) -> int:
    """Most bytes of data that a rank may keep: its part of a quarter of the machine's memory, or `VARIABLE` megabytes.

    Raises UserError for a variable that is not a positive number.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return int(MEMORY_SHARE * _machine_bytes() / local_ranks)
    try:
        megabytes = float(given)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < float("inf"):
        raise UserError(f"{VARIABLE}={given}: must be a number of megabytes above 0")
    return int(megabytes * 1e6)


def _machine_bytes() -> int:
    """Memory of the machine, or of the container that this is."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(installed, int(CGROUP_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such limit, or "max"
        return installed


class Windows:
    """The rows of a table in windows of at most a part of ``memory`` bytes. See `stream.Stream`."""

    def __init__(self, table: Table, memory: int, where: str) -> None:
        self.table, self.where = table, where
        window_rows = max(1, memory // WINDOWS_IN_MEMORY // max(1, table.row_bytes))
        most = max(1, LARGEST_BLOCK_BYTES // max(1, table.row_bytes))
        self._block = max(1, min(most, window_rows // BLOCKS_IN_WINDOW))
        self._blocks_in_window = max(1, window_rows // self._block)

    @property
    def rows(self) -> int:
        """See `stream.Stream`."""
        return self.table.rows

    def example(self) -> Batch:
        """See `stream.Stream`."""
        return self.table.read(np.arange(min(2, self.table.rows)))

    def pieces(self, order: np.random.Generator, skip: int) -> Iterator[Batch]:
        """See `stream.Stream`. A window that is skipped is not read."""
        blocks = order.permutation(-(-self.table.rows // self._block))
        for start in range(0, len(blocks), self._blocks_in_window):
            chosen = np.sort(blocks[start : start + self._blocks_in_window])
            rows = (chosen[:, None] * self._block + np.arange(self._block)).reshape(-1)
            rows = rows[rows < self.table.rows]
            shuffled = order.permutation(len(rows))
            if skip < len(rows):
                window, shuffled = self.table.read(rows), shuffled[skip:]
                yield window.map(lambda array, shuffled=shuffled: array[shuffled])  # type: ignore[misc]
            skip = max(0, skip - len(rows))
