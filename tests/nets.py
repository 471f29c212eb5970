"""Small models for tests, for images of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.compiled import prepared
from dlion_mpi.learner.keras_model import KerasModel


def ready(model: Any, example: Batch, optimizer: Any = None) -> KerasModel:
    """A model that can be trained on rows like these; ``optimizer``: of a model that is not compiled."""
    return KerasModel(prepared(model, example, lambda: optimizer), example)


def dense(input_shape: Sequence[int], classes: int) -> Any:
    """Two dense layers over the flattened input."""
    import keras

    return keras.Sequential(
        [
            keras.Input(tuple(input_shape)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(classes),
        ]
    )


def normalised(input_shape: Sequence[int], classes: int) -> Any:
    """Dense layers with batch normalisation and dropout, and a softmax at the end."""
    import keras

    return keras.Sequential(
        [
            keras.Input(tuple(input_shape)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(32),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.1, seed=1),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )


def failing(input_shape: Any, classes: int) -> Any:
    """A function that fails."""
    raise ValueError("no such width")
