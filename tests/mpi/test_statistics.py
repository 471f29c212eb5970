"""Batch normalisation over MPI: every rank ends with the mean of all ranks' moving averages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import dlion_mpi

MOST_RANKS = 3

STEPS = 50
"""Two rounds in the background, after 20 and 40 steps, and the last one."""


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        {"batching": "fixed", "global_batch": "fixed"},
        {"batching": "fixed", "global_batch": "fixed", "sync": "sync"},
        {"strategy": "allreduce"},
        {"batching": "auto"},
    ],
)
def test_statistics_of_unequal_ranks_end_as_their_mean(world: MPI.Intracomm, options: dict[str, Any]) -> None:
    """Rank r has rows of the value r alone, so its moving average after k steps would be r (1 - 0.99^k)."""
    import keras

    rank, size = world.Get_rank(), world.Get_size()
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(momentum=0.99), keras.layers.Dense(2)])
    x, y = np.full((64, 3), rank, np.float32), np.arange(64) % 2
    dlion_mpi.fit(model, (x, y), (x, y), steps=STEPS, progress_every=0, **options)
    normalisation = model.layers[0]
    moved = 1 - 0.99**STEPS
    if options.get("batching") != "auto":  # else ranks count by their batches
        # Outside lockstep ranks take a mean at unequal steps, and what they have moved since decays unequally.
        exact = "sync" in options or "strategy" in options
        np.testing.assert_allclose(
            normalisation.moving_mean, moved * (size - 1) / 2, rtol=1e-4 if exact else 0.05, atol=1e-6
        )
    np.testing.assert_allclose(normalisation.moving_variance, 1 - moved, rtol=1e-4)
    own = np.concatenate([np.ravel(w) for w in model.get_weights()[2:4]]).astype(np.float32)
    assert len({values.tobytes() for values in world.allgather(own)}) == 1
