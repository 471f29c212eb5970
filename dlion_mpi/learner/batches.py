"""Batches of changing size, drawn from a rank's shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch as Batch
from dlion_mpi.learner.batch import RowNumbers
from dlion_mpi.learner.shard import Shard
from dlion_mpi.learner.source import Table
from dlion_mpi.learner.sources import Once
from dlion_mpi.learner.stream import Prefetcher, Stream, Waiting, epoch_seed, unwatched
from dlion_mpi.log import say

UNKNOWN = -1
"""Stands in the state for a number of rows that is not known."""


class Batches:
    """An endless source of batches of changing size from a shard.

    Every epoch visits the shard in a new permutation, derived from (seed, rank, epoch) alone; a stream gives its rows
    in its own order. A batch that crosses the border takes the rest of one epoch and the start of the next.
    ``waiting``: watches waits for a stream's rows; see `stream.Prefetcher`.
    """

    def __init__(self, shard: Shard, *, seed: int, rank: int, waiting: Waiting = unwatched) -> None:
        if shard.samples == 0:
            raise UserError("the shard has no training rows to draw batches from: give each rank some")
        self._seed, self._rank, self._samples = seed, rank, shard.samples
        train = shard.train
        self._feed: _Feed = (
            _Permuted(train, seed, rank) if isinstance(train, Table) else _Streamed(train, seed, rank, waiting)
        )

    def start_epoch(self, epoch: int) -> None:
        """Continue with the first row of this epoch."""
        self._feed.seek(epoch, 0)

    def take(self, size: int) -> Batch:
        """The next ``size`` rows; ``size`` may exceed the shard.

        Raises ValueError unless size >= 1, and RunError if the source of a stream fails.
        """
        if size < 1:
            raise ValueError(f"a batch needs at least 1 sample, not {size}")
        return self._feed.take(size)

    def close(self) -> None:
        """End the thread that reads a stream."""
        self._feed.close()

    def state(self) -> dict[str, int]:
        """The position in the data, for ``restore``; JSON-able."""
        epoch, position = self._feed.where()
        samples = UNKNOWN if self._samples is None else self._samples
        return {"seed": self._seed, "rank": self._rank, "samples": samples, "epoch": epoch, "position": position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken. A generator starts from its beginning, others read up to the position.

        Raises UserError when the state is damaged or belongs to another seed, rank or shard size.
        """
        here = self.state()
        intact = set(state) == set(here) and all(type(n) is int and n >= UNKNOWN for n in state.values())
        if not intact or min(state["epoch"], state["position"]) < 0 or self._feed.is_beyond(state["position"]):
            raise UserError("the saved position in the data is damaged: resume from another checkpoint")
        for key in ("seed", "rank", "samples"):
            if (saved := state[key]) != here[key]:
                raise UserError(f"{key} was {saved}, is now {here[key]}: resume with the same data, seed and ranks")
        if self._rank == 0 and self._feed.starts_over() and state["epoch"] + state["position"]:
            say("dlion: the training data is a generator: it starts from its beginning, not where the checkpoint was")
        self._feed.seek(state["epoch"], state["position"])


class _Feed(Protocol):
    """Rows in the order in which batches take them."""

    def take(self, size: int) -> Batch:
        """The next ``size`` rows."""

    def seek(self, epoch: int, position: int) -> None:
        """Continue with this row of this epoch."""

    def where(self) -> tuple[int, int]:
        """Epoch, and the rows of it that were taken."""

    def is_beyond(self, position: int) -> bool:
        """Whether no epoch has that many rows."""

    def starts_over(self) -> bool:
        """Whether `seek` cannot skip rows."""

    def close(self) -> None:
        """Release what reads the rows."""


class _Permuted:
    """Rows that can be read by number, in a new permutation every epoch."""

    def __init__(self, table: Table, seed: int, rank: int) -> None:
        self._table, self._seed, self._rank = table, seed, rank
        self.seek(0, 0)

    def take(self, size: int) -> Batch:
        rows = self._next_rows(size)
        missing = size - len(rows)
        while missing:
            self.seek(self._epoch + 1, 0)
            more = self._next_rows(missing)
            rows = np.concatenate([rows, more])
            missing -= len(more)
        return self._table.read(rows)

    def _next_rows(self, size: int) -> RowNumbers:
        """At most ``size`` rows: fewer where the epoch ends."""
        rows = self._order[self._position : self._position + size]
        self._position += len(rows)
        return rows

    def seek(self, epoch: int, position: int) -> None:
        order = np.random.default_rng(epoch_seed(self._seed, self._rank, epoch))
        self._order = order.permutation(self._table.rows)
        self._epoch, self._position = epoch, position

    def where(self) -> tuple[int, int]:
        return self._epoch, self._position

    def is_beyond(self, position: int) -> bool:
        return position > self._table.rows

    def starts_over(self) -> bool:
        return False

    def close(self) -> None:
        pass


class _Streamed:
    """Rows that a thread reads in advance. The thread starts with the first batch."""

    def __init__(self, stream: Stream, seed: int, rank: int, waiting: Waiting) -> None:
        self._stream, self._seed, self._rank = stream, seed, rank
        self._waiting = waiting
        self._reader: Prefetcher | None = None
        self._start = (0, 0)

    def take(self, size: int) -> Batch:
        if self._reader is None:
            self._reader = Prefetcher(self._stream, self._seed, self._rank, *self._start, self._waiting)
        return self._reader.take(size)

    def seek(self, epoch: int, position: int) -> None:
        self.close()
        self._start = (epoch, position)

    def where(self) -> tuple[int, int]:
        return self._start if self._reader is None else (self._reader.epoch, self._reader.position)

    def is_beyond(self, position: int) -> bool:
        return False

    def starts_over(self) -> bool:
        return isinstance(self._stream, Once)

    def close(self) -> None:
        if self._reader is not None:
            self._start = self.where()
            self._reader.close()
            self._reader = None
