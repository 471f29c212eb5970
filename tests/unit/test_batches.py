"""Batches of changing size: every row once per epoch, shuffled by seed, rank and epoch, restored exactly."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.batches import Batches
from dlion_mpi.learner.shards import Shard
from dlion_mpi.learner.source import Table


def shard(rows: int) -> Shard:
    """A shard in which both x and y hold the row's number."""
    x, y = np.zeros((rows, 2), np.float32), np.arange(rows, dtype=np.int32)
    x[:, 0] = y
    table = Table.of(Batch(x, y))
    return Shard(name="", source="", train=table, test=table, classes=rows, train_samples_global=rows)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), rows=st.integers(1, 17))
def test_batches_cover_every_row_once_per_epoch_whatever_their_sizes(sizes: list[int], rows: int) -> None:
    batches = Batches(shard(rows), seed=1, rank=2)
    seen: list[int] = []
    for size in sizes:
        x, y, _ = batches.take(size)
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((size, 2), np.float32, (size,), np.int32)
        np.testing.assert_array_equal(x[:, 0], y)
        seen += y.tolist()
    for start in range(0, len(seen), rows):
        epoch = seen[start : start + rows]
        assert len(set(epoch)) == len(epoch)


@given(
    before=st.lists(st.integers(1, 40), max_size=10),
    after=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    rows=st.integers(1, 17),
)
def test_restore_continues_exactly(before: list[int], after: list[int], rows: int) -> None:
    whole, resumed = Batches(shard(rows), seed=5, rank=1), Batches(shard(rows), seed=5, rank=1)
    for size in before:
        whole.take(size)
    resumed.take(3)  # what it did before it was restored must not matter
    resumed.restore(json.loads(json.dumps(whole.state())))
    for size in after:
        np.testing.assert_array_equal(whole.take(size)[1], resumed.take(size)[1])
    assert whole.state() == resumed.state()


def test_epochs_ranks_and_seeds_shuffle_differently() -> None:
    def epochs(seed: int, rank: int) -> list[tuple[int, ...]]:
        batches = Batches(shard(50), seed=seed, rank=rank)
        return [tuple(batches.take(50)[1].tolist()) for _ in range(2)]

    orders = [order for seed in (0, 1) for rank in (0, 1) for order in epochs(seed, rank)]
    assert len(set(orders)) == len(orders) == 8
    assert epochs(1, 1) == epochs(1, 1)


def test_a_size_below_one_is_a_bug_of_the_caller() -> None:
    for size in (0, -3):
        with pytest.raises(ValueError, match="at least 1 sample"):
            Batches(shard(3), seed=0, rank=0).take(size)


def test_an_empty_shard_gives_no_batches() -> None:
    with pytest.raises(UserError, match="no training rows to draw batches from"):
        Batches(shard(0), seed=0, rank=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 9}, "seed was 9, is now 0: resume with the same data, seed and ranks"),
        ({"rank": 1}, "rank was 1, is now 0"),
        ({"samples": 7}, "samples was 7, is now 5"),
        ({"position": 6}, "damaged: resume from another checkpoint"),
        ({"position": -1}, "damaged"),
        ({"epoch": 1.5}, "damaged"),
        ({"epoch": "1"}, "damaged"),
        ({"more": 1}, "damaged"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    batches = Batches(shard(5), seed=0, rank=0)
    with pytest.raises(UserError, match=message):
        batches.restore({**batches.state(), **change})
