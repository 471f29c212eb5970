"""Short ways to small compiled models."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, losses


def sgd(rate: float = 0.1) -> Any:
    """Plain SGD."""
    return keras.optimizers.SGD(rate)


def classifier(shape: tuple[int | None, ...], *parts: Any, optimizer: Any = None, dtype: str | None = None) -> Any:
    """Layers, then dense logits of four classes; SGD, cross-entropy, accuracy."""
    return compiled(keras.Sequential([keras.Input(shape, dtype=dtype), *parts, layers.Dense(4)]), optimizer)


def compiled(model: Any, optimizer: Any = None, loss: Any = None, metrics: Any = None, **more: Any) -> Any:
    """Compile, by default as a classifier by logits."""
    if loss is None:
        loss, metrics = losses.SparseCategoricalCrossentropy(from_logits=True), metrics or ["accuracy"]
    model.compile(optimizer or sgd(), loss, metrics=metrics, **more)
    return model


def perceptron(outputs: int = 4, activation: str | None = None) -> Any:
    """Two dense layers on 12 features, not compiled. Smooth, so that no gradient is zero by chance."""
    return keras.Sequential(
        [keras.Input((12,)), layers.Dense(8, activation="tanh"), layers.Dense(outputs, activation=activation)]
    )
