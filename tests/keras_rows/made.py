"""Makers of small data: functions of a generator and a number of rows that return ``(x, y)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.keras_rows.row import Maker

VOCABULARY = 20
CLASSES = 4


def _normal(generator: np.random.Generator, *shape: int) -> Any:
    return generator.normal(size=shape).astype(np.float32)


def _rule(inputs: int, outputs: int) -> Any:
    """A matrix that tells targets from inputs, the same on all ranks."""
    return _normal(np.random.default_rng(3), inputs, outputs)


def _scores(x: Any, outputs: int) -> Any:
    flat = x.reshape(len(x), -1)
    return flat @ _rule(flat.shape[1], outputs) / np.float32(np.sqrt(flat.shape[1]))


def vectors(*shape: int) -> Maker:
    """Float rows of a shape (default: 12 features) with a class each, int64."""

    def make(generator: np.random.Generator, rows: int) -> Any:
        x = _normal(generator, rows, *(shape or (12,)))
        return x, _scores(x, CLASSES).argmax(1)

    return make


def one_hot(generator: np.random.Generator, rows: int) -> Any:
    """Rows of 12 features with a class each, as a float vector with one 1."""
    x, y = vectors()(generator, rows)
    return x, np.eye(CLASSES, dtype=np.float32)[y]


def numbers(outputs: int = 1, *, positive: bool = False) -> Maker:
    """Rows of 12 features with ``outputs`` numbers each."""

    def make(generator: np.random.Generator, rows: int) -> Any:
        x = _normal(generator, rows, 12)
        y = _scores(x, outputs)
        return x, np.exp(y) if positive else y

    return make


def labels(outputs: int = 1, dtype: str = "float32", *, low: int = 0, flat: bool = False) -> Maker:
    """Rows of 12 features with ``outputs`` labels each, ``low`` (0 or -1) or 1; ``flat``: y of shape (rows,)."""

    def make(generator: np.random.Generator, rows: int) -> Any:
        x = _normal(generator, rows, 12)
        y = np.where(_scores(x, outputs) > 0, 1, low).astype(dtype)
        return x, y[:, 0] if flat else y

    return make


def shares(generator: np.random.Generator, rows: int) -> Any:
    """Rows of 12 features with a distribution over classes each."""
    x = _normal(generator, rows, 12)
    y = np.exp(_scores(x, CLASSES))
    return x, y / y.sum(1, keepdims=True)


def tokens(length: int = 10, dtype: str = "int32") -> Maker:
    """Token ids, 0 for padding at the end, with a class each."""

    def make(generator: np.random.Generator, rows: int) -> Any:
        x = generator.integers(1, VOCABULARY, (rows, length))
        y = x.sum(1) % CLASSES
        x[np.arange(length) >= generator.integers(3, length + 1, rows)[:, None]] = 0
        return x.astype(dtype), y

    return make


def next_tokens(generator: np.random.Generator, rows: int) -> Any:
    """Token ids, and for each its successor."""
    text = np.cumsum(generator.integers(1, 4, (rows, 11)), 1) % VOCABULARY
    return text[:, :-1].astype(np.int32), text[:, 1:].astype(np.int32)


def images(*shape: int) -> Maker:
    """Float images (default: 8x8x3) with a class each."""
    return vectors(*(shape or (8, 8, 3)))


def bytes_of_images(generator: np.random.Generator, rows: int) -> Any:
    """uint8 images, 8x8x3, with a class each."""
    x, y = images()(generator, rows)
    return np.clip(128 + 40 * x, 0, 255).astype(np.uint8), y


def pixels(generator: np.random.Generator, rows: int) -> Any:
    """Float images, 8x8x1, with a class for each pixel, (8, 8)."""
    x = _normal(generator, rows, 8, 8, 1)
    return x, (x[..., 0] > 0).astype(np.int32) + (x[..., 0] > 1)


def masks(generator: np.random.Generator, rows: int) -> Any:
    """Float images, 8x8x1, with two masks of 0 and 1, (8, 8, 2)."""
    x, y = pixels(generator, rows)
    return x, np.eye(2, dtype=np.float32)[np.minimum(y, 1)]


def unaligned(generator: np.random.Generator, rows: int) -> Any:
    """Sequences of 10 steps with 3 features, and 3 symbols of 1 to 4 each."""
    return _normal(generator, rows, 10, 3), generator.integers(1, 5, (rows, 3)).astype(np.int32)


def themselves(*shape: int) -> Maker:
    """Float rows that are their own targets."""

    def make(generator: np.random.Generator, rows: int) -> Any:
        x = 1 / (1 + np.exp(-_normal(generator, rows, *(shape or (12,)))))
        return x, x

    return make


def without_targets(generator: np.random.Generator, rows: int) -> Any:
    """Float rows alone."""
    return (_normal(generator, rows, 12),)


def pair(generator: np.random.Generator, rows: int) -> Any:
    """Two inputs of 12 and 6 features in a list, with a class."""
    x, y = vectors()(generator, rows)
    return [x, _normal(generator, rows, 6)], y


def twins(generator: np.random.Generator, rows: int) -> Any:
    """Two inputs of 12 features, and whether they agree in sign."""
    a, b = _normal(generator, rows, 12), _normal(generator, rows, 12)
    return (a, b), ((a * b).sum(1, keepdims=True) > 0).astype(np.float32)


def mixed(generator: np.random.Generator, rows: int) -> Any:
    """A table in a dict: numbers, ids of categories, and a number to tell."""
    x = {"numbers": _normal(generator, rows, 6), "kind": generator.integers(0, 5, (rows, 1)).astype(np.int32)}
    return x, (x["numbers"].sum(1, keepdims=True) + x["kind"]).astype(np.float32)


def two_targets(names: Sequence[str] | None = None) -> Maker:
    """Rows of 12 features with a class and a number, in a list, or in a dict by these names."""

    def make(generator: np.random.Generator, rows: int) -> Any:
        x, y = vectors()(generator, rows)
        targets = [y, _scores(x, 1)]
        return x, dict(zip(names, targets, strict=True)) if names else targets

    return make


def weighted(make: Maker, *more: int) -> Maker:
    """Rows with sample weights from 0 to 2, of shape (rows, ``more``...)."""

    def make_weighted(generator: np.random.Generator, rows: int) -> Any:
        x, y = make(generator, rows)
        return x, y, generator.uniform(0, 2, (rows, *more)).astype(np.float32)

    return make_weighted
