"""The same computations on whichever backend Keras has: `python -m tests.contract.trajectory FILE.npz`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from dlion_mpi.learner import backend
from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.models import optimizer
from dlion_mpi.learner.replica import Replica
from dlion_mpi.simulation.shared_replica import SharedReplica, VirtualReplica
from tests.nets import ready

SIZES = (33, 40, 1)
"""Batch sizes, in this order: some are padded on JAX."""


def models() -> dict[str, Any]:
    """Models without random numbers: their initial weights and dropout are not equal on two backends."""
    import keras

    layers = keras.layers
    start = [keras.Input((8, 8, 1)), layers.Rescaling(1 / 255), layers.Flatten()]
    return {
        "plain": keras.Sequential([*start, layers.Dense(16, activation="relu"), layers.Dense(10)]),
        "regularised": keras.Sequential([*start, layers.Dense(10, kernel_regularizer="l2", bias_regularizer="l1")]),
        "activity": keras.Sequential([*start, layers.Dense(10, activity_regularizer="l2")]),
        "normalised": keras.Sequential([*start, layers.Dense(16), layers.BatchNormalization(), layers.Dense(10)]),
        "summed": _compiled(
            keras.Sequential([*start, layers.Dense(10)]),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
        ),
        "by name": _compiled(
            keras.Sequential([*start, layers.Dense(10, activation="softmax")]), "sparse_categorical_crossentropy"
        ),
    }


def _compiled(model: Any, loss: Any) -> Any:
    model.compile(optimizer("adam", 0.003, 0.0), loss)
    return model


def batch(number: int, size: int) -> Batch:
    """Rows that depend on their number alone."""
    random = np.random.default_rng(number)
    x = random.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8)
    return Batch(x, random.integers(0, 10, size).astype(np.int32))


def trajectory() -> dict[str, np.ndarray]:
    """Losses, gradients, movements, weights and tests of a few steps, for each model and both kinds of replica."""
    backend.start(1)
    found: dict[str, np.ndarray] = {}
    for name, model in models().items():
        rows = batch(0, 2)
        keras_model = ready(model, rows, optimizer("adam", 0.003, 0.0))
        real = Replica(keras_model, tests=rows)
        start = np.random.default_rng(1).normal(0, 0.05, len(real.knowledge())).astype(np.float32) ** 2
        real.set_knowledge(start)
        found |= {f"{name}, real, {what}": value for what, value in _steps(real).items()}
        if name in ("plain", "normalised"):
            real.set_knowledge(start)
            shared = SharedReplica(keras_model, tests=rows)
            found |= {f"{name}, virtual, {what}": value for what, value in _steps(VirtualReplica(shared, 0)).items()}
    return found


def _steps(replica: Replica | VirtualReplica) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {"losses": []}
    for number, size in enumerate(SIZES):
        gradient = replica.gradient(batch(number, size))
        found["losses"].append(gradient.loss)
        found[f"gradient of {size}"] = np.array(gradient.vector)
        replica.apply(gradient.vector)
        found[f"movement of {size}"] = np.array(replica.movement(batch(number, size)).vector)
        found["losses"].append(replica.step_alone(batch(number, size)).loss)
    found["knowledge"] = replica.knowledge()
    tested = replica.evaluate(replica.knowledge(), [batch(99, 333), batch(98, 40)])
    found["tests"] = [tested[name] for name in sorted(tested)]
    return {name: np.asarray(value) for name, value in found.items()}


if __name__ == "__main__":
    np.savez(sys.argv[1], **trajectory())  # type: ignore[arg-type]
