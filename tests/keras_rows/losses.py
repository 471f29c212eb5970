"""Losses, as they can be given to `compile`."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, losses, ops

from tests.keras_rows import made
from tests.keras_rows.nets import compiled, perceptron
from tests.keras_rows.row import Rows

ROWS = Rows("losses")
row = ROWS.add


def logits(reduction: str | None = "sum_over_batch_size") -> Any:
    return losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


@row("by name, on probabilities", made.vectors())
def loss_by_name() -> Any:
    return compiled(perceptron(4, "softmax"), "sgd", "sparse_categorical_crossentropy", ["accuracy"])


@row("a function of Keras", made.numbers(2))
def loss_function() -> Any:
    return compiled(perceptron(2), loss=keras.losses.mean_squared_error)


@row("your own function", made.numbers(2))
def own_loss_function() -> Any:
    def fourth(y: Any, prediction: Any) -> Any:
        return ops.mean((y - prediction) ** 4, -1)

    return compiled(perceptron(2), loss=fourth, metrics=["mae"])


@row("a subclass of `Loss`", made.numbers(2))
def own_loss_class() -> Any:
    class Pinball(losses.Loss):
        def call(self, y_true: Any, y_pred: Any) -> Any:
            return ops.maximum(0.9 * (y_true - y_pred), 0.1 * (y_pred - y_true))

    return compiled(perceptron(2), loss=Pinball())


@row("an object, logits", made.vectors())
def loss_object() -> Any:
    return compiled(perceptron(), loss=logits(), metrics=["accuracy"])


@row("`reduction=None`", made.vectors(), backends=("tensorflow",), note="Keras wants a scalar loss there")
def reduction_none() -> Any:
    return compiled(perceptron(), loss=logits(None), metrics=["accuracy"])


@row('`reduction="sum"`', made.vectors())
def reduction_sum() -> Any:
    return compiled(perceptron(), keras.optimizers.SGD(0.01), logits("sum"), ["accuracy"])


@row("regression: mean squared error", made.numbers())
def mean_squared_error() -> Any:
    return compiled(perceptron(1), loss="mse", metrics=["mae", keras.metrics.R2Score()])


@row("regression: mean absolute error", made.numbers())
def mean_absolute_error() -> Any:
    return compiled(perceptron(1), loss="mae", metrics=[keras.metrics.RootMeanSquaredError(name="rmse")])


@row("regression: `Huber`", made.numbers(2))
def huber() -> Any:
    return compiled(perceptron(2), loss=losses.Huber(0.5), metrics=["mape"])


@row("`Poisson` (counts)", made.numbers(1, positive=True))
def poisson() -> Any:
    return compiled(perceptron(1, "softplus"), loss="poisson")


@row("binary, one sigmoid, labels (b,)", made.labels(dtype="int64", flat=True))
def binary() -> Any:
    return compiled(perceptron(1, "sigmoid"), loss="binary_crossentropy", metrics=["accuracy", "auc"])


@row("binary by logits, `BinaryFocalCrossentropy`", made.labels())
def focal() -> Any:
    return compiled(perceptron(1), loss=losses.BinaryFocalCrossentropy(from_logits=True))


@row("multi-label", made.labels(3))
def multi_label() -> Any:
    metrics = [keras.metrics.AUC(multi_label=True, name="auc"), "binary_accuracy"]
    return compiled(perceptron(3, "sigmoid"), loss="binary_crossentropy", metrics=metrics)


@row("one-hot with label smoothing", made.one_hot)
def label_smoothing() -> Any:
    loss = losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    return compiled(perceptron(), loss=loss, metrics=["accuracy"])


@row("`Hinge` (labels -1 and 1)", made.labels(1, low=-1))
def hinge() -> Any:
    return compiled(perceptron(1, "tanh"), loss="hinge", metrics=["hinge"])


@row("`KLDivergence`, `CosineSimilarity` (distributions)", made.shares)
def divergence() -> Any:
    return compiled(perceptron(4, "softmax"), loss="kl_divergence", metrics=["cosine_similarity"])


@row("segmentation: a class per pixel", made.pixels)
def segmentation() -> Any:
    parts = layers.Conv2D(4, 3, padding="same", activation="tanh"), layers.Conv2D(3, 1)
    return compiled(keras.Sequential([keras.Input((8, 8, 1)), *parts]))


@row("`Dice` (segmentation, one-hot masks)", made.masks)
def dice() -> Any:
    parts = layers.Conv2D(4, 3, padding="same", activation="tanh"), layers.Conv2D(2, 1, activation="softmax")
    return compiled(keras.Sequential([keras.Input((8, 8, 1)), *parts]), loss="dice")


@row("language model: a token per token", made.next_tokens)
def language_model() -> Any:
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(made.VOCABULARY, 8)(ids)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True))
    model = keras.Model(ids, layers.Dense(made.VOCABULARY)(x))
    return compiled(model, metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")])


@row("`CTC` (sequences that are not aligned)", made.unaligned)
def ctc() -> Any:
    model = keras.Sequential([keras.Input((10, 3)), layers.GRU(6, return_sequences=True), layers.Dense(5)])
    return compiled(model, loss="ctc")
