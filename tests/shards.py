"""Shard files with random samples, and whatever is to be wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np


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
