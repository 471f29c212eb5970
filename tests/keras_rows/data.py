"""Kinds of data, as `keras.Model.fit` takes them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

from tests.keras_rows import made
from tests.keras_rows.nets import classifier, compiled, perceptron
from tests.keras_rows.row import Data, Rows, arrays, of_rank, testing, training

ROWS = Rows("data")
row = ROWS.add
BATCH = 5
"""Rows in a batch of a source; the ranks train on batches of another size."""


@row("arrays, whole numbers as labels", made.vectors())
def arrays_() -> Any:
    return compiled(perceptron())


@row("a sample weight per row", made.weighted(made.vectors()))
def sample_weights() -> Any:
    return compiled(perceptron(), weighted_metrics=["accuracy"])


@row("a sample weight per token", made.weighted(made.next_tokens, 10))
def sample_weights_of_tokens() -> Any:
    ids = keras.Input((10,), dtype="int32")
    return compiled(keras.Model(ids, layers.Dense(made.VOCABULARY)(layers.Embedding(made.VOCABULARY, 8)(ids))))


@row("`class_weight`", arrays(made.vectors(), class_weight={0: 0.5, 1: 2.0, 2: 1.0, 3: 3.0}))
def class_weight() -> Any:
    return compiled(perceptron())


@row("one-hot labels", made.one_hot)
def one_hot() -> Any:
    return compiled(perceptron(4, "softmax"), loss="categorical_crossentropy", metrics=["accuracy"])


@row("bytes (uint8 images), scaled by the model", made.bytes_of_images)
def uint8_images() -> Any:
    return classifier((8, 8, 3), layers.Rescaling(1 / 255), layers.Conv2D(4, 3), layers.Flatten(), dtype="uint8")


@row("token ids, int64", made.tokens(dtype="int64"))
def token_ids() -> Any:
    parts = layers.Embedding(made.VOCABULARY, 6), layers.GlobalAveragePooling1D()
    return classifier((10,), *parts, dtype="int64")


def _windows(data: Any, targets: Any) -> Any:
    return keras.utils.timeseries_dataset_from_array(data, targets, 6, batch_size=BATCH)


@of_rank
def series(rank: int) -> Data:
    """Windows of a series of 60 values."""
    generator = np.random.default_rng([5, rank])
    values = np.cumsum(generator.normal(size=(60, 2)), 0).astype(np.float32) / 8
    return Data(_windows(values[:-6], values[6:, :1]), _windows(values[:24], values[6:30, :1]))


@row("a time series: `timeseries_dataset_from_array`", series, needs=("tensorflow",))
def time_series() -> Any:
    model = keras.Sequential([keras.Input((6, 2)), layers.GRU(6), layers.Dense(1)])
    return compiled(model, loss="mse", metrics=["mae"])


def _dataset(x: Any, y: Any) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


@of_rank
def datasets(rank: int) -> Data:
    """`tf.data.Dataset` of batches."""
    return Data(_dataset(*training(made.vectors(), rank)), _dataset(*testing(made.vectors())))


@row("`tf.data.Dataset`", datasets, needs=("tensorflow",))
def tf_data() -> Any:
    return compiled(perceptron())


@of_rank
def datasets_of_dicts(rank: int) -> Data:
    """`tf.data.Dataset` of batches whose x is a dict."""
    return Data(_dataset(*training(made.mixed, rank)), _dataset(*testing(made.mixed)))


@row("`tf.data.Dataset` of dicts", datasets_of_dicts, needs=("tensorflow",))
def tf_data_of_dicts() -> Any:
    numbers, kind = keras.Input((6,), name="numbers"), keras.Input((1,), name="kind", dtype="int32")
    h = layers.Concatenate()([numbers, layers.Flatten()(layers.Embedding(5, 3)(kind))])
    return compiled(keras.Model({"numbers": numbers, "kind": kind}, layers.Dense(1)(h)), None, "mse")


class Sequence(keras.utils.PyDataset):
    """Batches of arrays."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return -(-len(self.x) // BATCH)

    def __getitem__(self, index: int) -> Any:
        part = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[part], self.y[part]


@of_rank
def sequences(rank: int) -> Data:
    """`keras.utils.PyDataset` of batches."""
    return Data(Sequence(*training(made.vectors(), rank)), Sequence(*testing(made.vectors())))


@row("`keras.utils.PyDataset`", sequences)
def py_dataset() -> Any:
    return compiled(perceptron())


def _endless(x: Any, y: Any) -> Iterator[Any]:
    while True:
        for start in range(0, len(x), BATCH):
            yield x[start : start + BATCH], y[start : start + BATCH]


@of_rank
def generators(rank: int) -> Data:
    """An endless generator of batches, and arrays for the test."""
    return Data(_endless(*training(made.vectors(), rank)), testing(made.vectors()), {"steps_per_epoch": 4})


@row("a generator of batches", generators)
def generator() -> Any:
    return compiled(perceptron())


def _loader(x: Any, y: Any) -> Any:
    import torch

    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)), BATCH)


@of_rank
def loaders(rank: int) -> Data:
    """torch's `DataLoader`."""
    return Data(_loader(*training(made.vectors(), rank)), _loader(*testing(made.vectors())))


@row("torch's `DataLoader`", loaders, needs=("torch",))
def data_loader() -> Any:
    return compiled(perceptron())


@of_rank
def mapped(rank: int) -> Data:
    """Memory-mapped arrays."""
    x, y = training(made.vectors(), rank)
    with tempfile.TemporaryDirectory() as folder:  # the mapping outlives the name
        np.save(f"{folder}/x.npy", x)
        return Data((np.load(f"{folder}/x.npy", mmap_mode="r"), y), testing(made.vectors()))


@row("memory-mapped `.npy`", mapped)
def memory_mapped() -> Any:
    return compiled(perceptron())


@row("no validation data", arrays(made.vectors(), validated=False))
def no_validation() -> Any:
    return compiled(perceptron())
