"""A seeded run of two ranks from equal weights, on whichever backend Keras has: `... backend_run FILE.npz`.

The whole movement is exchanged: how much a link can carry in a step depends on time.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import dlion_mpi
from dlion_mpi.strategies.dlion import Dlion

RANK = dlion_mpi.rank()


def rows(seed: int, count: int) -> tuple[Any, Any]:
    """Rows of 12 features with one of 4 classes."""
    x = np.random.default_rng([1, seed]).normal(size=(count, 12)).astype(np.float32)
    return x, (x @ np.random.default_rng(2).normal(size=(12, 4))).argmax(1)


def model() -> Any:
    """A model whose first weights do not come from the backend."""
    import keras

    dense = keras.layers.Dense
    parts = [dense(16, activation="tanh"), keras.layers.BatchNormalization(), dense(4)]
    made = keras.Sequential([keras.Input((12,)), *parts])
    random = np.random.default_rng(3)
    made.set_weights([random.uniform(0.1, 0.5, w.shape) * random.choice([-1, 1], w.shape) for w in made.get_weights()])
    parts[1].set_weights([np.ones(16), np.zeros(16), np.zeros(16), np.ones(16)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
    return made


if __name__ == "__main__":
    trained = model()
    summary = dlion_mpi.fit(
        trained,
        rows(RANK, 200),
        rows(9, 64),
        sync="sync",
        batching="fixed",
        global_batch="fixed",
        value_type="float32",
        strategy=Dlion(max_n=100.0),
        steps=30,
        seed=4,
        progress_every=0,
    )
    if RANK == 0:
        found = {f"weights {k}": value for k, value in enumerate(trained.get_weights())}
        np.savez(sys.argv[1], tests=[summary["val_loss_mean"], summary["accuracy_mean"]], **found)
