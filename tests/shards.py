"""Shard files with random samples, and whatever is to be wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.given import shard_of_fit
from dlion_mpi.learner.shards import Shard


def write_shard(path: Path, rows: int = 60, **changes: Any) -> None:
    generator = np.random.default_rng(1)
    arrays = {
        "x_train": generator.random((rows, 8, 8, 1), dtype=np.float32),
        "y_train": generator.integers(0, 10, rows),
        "x_test": generator.random((30, 8, 8, 1), dtype=np.float32),
        "y_test": generator.integers(0, 10, 30),
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def byte_shard(shape: tuple[int, ...] = (8, 8, 1), rows: int = 20) -> Shard:
    """Random bytes of this shape, in ten classes."""
    generator = np.random.default_rng(2)
    x, y = generator.integers(0, 256, (rows, *shape), dtype=np.uint8), np.arange(rows) % 10
    return shard_of_fit((x, y), (x, y))


def whole_of(shard: Shard) -> tuple[Batch, Batch]:
    """All training rows and all test rows of a shard."""
    table = shard.table()
    (test,) = shard.tests(1 << 30)
    return table.read(np.arange(table.rows)), test
