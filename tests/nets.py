"""Small models for tests, for images of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
            keras.layers.Dropout(0.1),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )
