"""Batches of changing size, drawn from a rank's shard."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch as Batch
from dlion_mpi.learner.batch import RowNumbers
from dlion_mpi.learner.shards import Shard


class Batches:
    """An endless source of batches of changing size from a shard.

    Every epoch visits the shard in a new permutation, derived from (seed, rank, epoch) alone. A batch that
    crosses the border takes the rest of one epoch and the start of the next.
    """

    def __init__(self, shard: Shard, *, seed: int, rank: int) -> None:
        if shard.samples == 0:
            raise UserError("the shard has no training rows to draw batches from: give each rank some")
        self._shard = shard
        self._seed = seed
        self._rank = rank
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Continue with the first row of this epoch."""
        # A spawn key keeps this stream apart from the partition's, which the bare seed starts.
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._rank, epoch))
        self._order = np.random.default_rng(sequence).permutation(self._shard.train.rows)
        self._epoch = epoch
        self._position = 0

    def take(self, size: int) -> Batch:
        """The next ``size`` rows; ``size`` may exceed the shard. Raises ValueError unless size >= 1."""
        if size < 1:
            raise ValueError(f"a batch needs at least 1 sample, not {size}")
        rows = self._next_rows(size)
        missing = size - len(rows)
        while missing:
            self.start_epoch(self._epoch + 1)
            more = self._next_rows(missing)
            rows = np.concatenate([rows, more])
            missing -= len(more)
        return self._shard.train.read(rows)

    def _next_rows(self, size: int) -> RowNumbers:
        """At most ``size`` rows: fewer where the epoch ends."""
        rows = self._order[self._position : self._position + size]
        self._position += len(rows)
        return rows

    def state(self) -> dict[str, int]:
        """The position in the data, for ``restore``; JSON-able."""
        return {
            "seed": self._seed,
            "rank": self._rank,
            "samples": self._shard.train.rows,
            "epoch": self._epoch,
            "position": self._position,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken.

        Raises UserError when the state is damaged or belongs to another seed, rank or shard size.
        """
        here = self.state()
        intact = set(state) == set(here) and all(type(n) is int and n >= 0 for n in state.values())
        if not intact or state["position"] > state["samples"]:
            raise UserError("the saved position in the data is damaged: resume from another checkpoint")
        for key in ("seed", "rank", "samples"):
            if (saved := state[key]) != here[key]:
                raise UserError(f"{key} was {saved}, is now {here[key]}: resume with the same data, seed and ranks")
        self.start_epoch(state["epoch"])
        self._position = state["position"]
