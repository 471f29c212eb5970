"""Which models get padded batches, where a backend compiles for every size: those for which padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dlion_mpi.learner import backend
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.padding import padding_of
from tests.nets import ready

X = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
Y = np.arange(8) % 3


def net(*layers: Any) -> Any:
    import keras

    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)])


def compiled(model: Any, loss: Any = None, **more: Any) -> Any:
    import keras

    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, **more)
    return model


def lambda_layer() -> Any:
    import keras

    return keras.layers.Lambda(lambda x: x - keras.ops.mean(x, 0))


def residual() -> Any:
    import keras

    x = keras.Input((6,))
    return keras.Model(x, keras.layers.Dense(3)(x + keras.layers.Dense(6)(x)))


def centred() -> Any:
    import keras

    x = keras.Input((6,))
    return keras.Model(x, keras.layers.Dense(3)(x - keras.ops.mean(x, 0)))


def own_loss(y: Any, outputs: Any) -> Any:
    import keras

    return keras.ops.mean(outputs)


def sparse(reduction: str) -> Any:
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


PADDED: dict[str, Callable[[], Any]] = {
    "dense": lambda: compiled(net()),
    "by name": lambda: compiled(net(), "sparse_categorical_crossentropy"),
    "a sum": lambda: compiled(net(), sparse("sum")),
    "residual": lambda: compiled(residual()),
    "metrics": lambda: compiled(net(), metrics=["accuracy"]),
}
NOT_PADDED: dict[str, Callable[[], Any]] = {
    "batch normalisation": lambda: compiled(net(_layers().BatchNormalization())),
    "a layer of the user": lambda: compiled(net(lambda_layer())),
    "an operation over rows": lambda: compiled(centred()),
    "a loss on activations": lambda: compiled(net(_layers().ActivityRegularization(0.1))),
    "a loss of the user": lambda: compiled(net(), own_loss),
    "weighted metrics": lambda: compiled(net(), weighted_metrics=["accuracy"]),
    "a loss per token": lambda: compiled(net(_layers().Reshape((3, 2)))),
}


def _layers() -> Any:
    import keras

    return keras.layers


@pytest.mark.parametrize("name", [*PADDED, *NOT_PADDED])
def test_only_batches_of_independent_rows_are_padded(name: str) -> None:
    backend.start(1)
    model = (PADDED | NOT_PADDED)[name]()
    targets = np.zeros((8, 3), int) if name == "a loss per token" else Y
    found = padding_of(ready(model, Batch(X[:2], targets[:2])))
    assert (found is not None) == (name in PADDED)
    if found is not None:
        batch, rows = found.padded(Batch(X[:5], targets[:5]))
        assert (batch.rows, rows) == (6, 5)
        np.testing.assert_array_equal(batch.x[5], X[0])
