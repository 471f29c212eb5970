"""Ways to build a model, and what can be set for its training."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from tests.keras_rows import made
from tests.keras_rows.nets import classifier, compiled, perceptron, sgd
from tests.keras_rows.row import Rows, training

ROWS = Rows("models")
row = ROWS.add


@row("several inputs, in a list", made.pair)
def several_inputs() -> Any:
    a, b = keras.Input((12,)), keras.Input((6,))
    h = layers.Concatenate()([layers.Dense(6, activation="tanh")(a), b])
    return compiled(keras.Model([a, b], layers.Dense(4)(h)))


@row("inputs in a dict, of several types (a table)", made.mixed)
def dict_inputs() -> Any:
    numbers, kind = keras.Input((6,), name="numbers"), keras.Input((1,), name="kind", dtype="int32")
    h = layers.Concatenate()([numbers, layers.Flatten()(layers.Embedding(5, 3)(kind))])
    model = keras.Model({"numbers": numbers, "kind": kind}, layers.Dense(1)(layers.Dense(6, activation="tanh")(h)))
    return compiled(model, sgd(0.02), "mse", ["mae"])


def _two_heads() -> tuple[Any, Any, Any]:
    x = keras.Input((12,))
    h = layers.Dense(8, activation="tanh")(x)
    return x, layers.Dense(4, activation="softmax", name="kind")(h), layers.Dense(1, name="size")(h)


@row("several outputs in a list: list of losses, `loss_weights`", made.two_targets())
def several_outputs() -> Any:
    x, kind, size = _two_heads()
    losses = ["sparse_categorical_crossentropy", "mse"]
    return compiled(keras.Model(x, [kind, size]), loss=losses, metrics=[["accuracy"], ["mae"]], loss_weights=[1, 0.2])


@row("outputs in a dict: dicts of losses, weights, metrics", made.two_targets(("kind", "size")))
def dict_outputs() -> Any:
    x, kind, size = _two_heads()
    losses = {"kind": "sparse_categorical_crossentropy", "size": "huber"}
    weights, metrics = {"kind": 1.0, "size": 0.3}, {"kind": ["accuracy"], "size": ["mae"]}
    model = keras.Model(x, {"kind": kind, "size": size})
    return compiled(model, loss=losses, metrics=metrics, loss_weights=weights)


@row("a model within a model", made.vectors())
def nested() -> Any:
    inner = keras.Sequential([keras.Input((12,)), layers.Dense(8, activation="tanh"), layers.BatchNormalization()])
    return classifier((12,), inner, layers.Dense(6, activation="tanh"))


@row("a block that is built twice (variables of one name)", made.vectors())
def block_twice() -> Any:
    def block() -> Any:
        x = keras.Input((12,))
        return keras.Model(x, layers.Dense(12, activation="tanh", name="fc")(x))

    return classifier((12,), block(), block())


@row("a shared model (Siamese)", made.twins)
def shared() -> Any:
    a, b = keras.Input((12,)), keras.Input((12,))
    encode = keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(4)])
    likeness = layers.Dot(1, normalize=True)([encode(a), encode(b)])
    model = keras.Model((a, b), layers.Dense(1, activation="sigmoid")(likeness))
    return compiled(model, loss="binary_crossentropy", metrics=["binary_accuracy"])


class Subclassed(keras.Model):
    """Two layers that get their weights with the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = layers.Dense(8, activation="tanh"), layers.Dense(4)
        self.drop = layers.Dropout(0.2, seed=1)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.last(self.drop(self.hidden(x), training=training))


@row("a subclass of `Model`, built", made.vectors())
def subclass_built() -> Any:
    model = Subclassed()
    model(training(made.vectors(), 0)[0][:2])
    return compiled(model)


@row("a subclass of `Model`, not yet built", made.vectors())
def subclass_unbuilt() -> Any:
    return compiled(Subclassed())


@row("`Sequential` without an input, not yet built", made.vectors())
def sequential_unbuilt() -> Any:
    return compiled(keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(4)]))


@row("frozen layers, also of batch normalisation", made.vectors())
def frozen() -> Any:
    body = keras.Sequential([keras.Input((12,)), layers.Dense(8, activation="tanh"), layers.BatchNormalization()])
    body.trainable = False
    return classifier((12,), body)


@row("LoRA: `enable_lora` of `Dense` and `Embedding`", made.tokens())
def lora() -> Any:
    parts = [layers.Embedding(made.VOCABULARY, 8), layers.Flatten(), layers.Dense(8, activation="tanh")]
    model = classifier((10,), *parts, dtype="int32")
    for part in (parts[0], parts[2]):
        part.enable_lora(2)
    return compiled(model)


@row("`mixed_float16` with loss scaling", made.vectors(), tolerance=2e-3)
def mixed_float16() -> Any:
    return _of_policy("mixed_float16")


@row("`mixed_bfloat16`", made.vectors(), tolerance=2e-2)
def mixed_bfloat16() -> Any:
    return _of_policy("mixed_bfloat16")


def _of_policy(policy: str) -> Any:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        last = layers.Dense(4, activation="softmax", dtype="float32")
        model = keras.Sequential([keras.Input((12,)), layers.Dense(8, activation="tanh"), last])
        return compiled(model, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    finally:
        keras.config.set_dtype_policy(before)


@row("regularisers, `ActivityRegularization`", made.vectors())
def regularised() -> Any:
    dense = layers.Dense(8, activation="tanh", kernel_regularizer="l2", bias_regularizer="l1")
    return classifier((12,), dense, layers.ActivityRegularization(l2=0.01))


@row("constraints on weights", made.vectors())
def constrained() -> Any:
    return classifier((12,), layers.Dense(8, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.8)))


class Activity(layers.Layer):
    """Adds a loss of its input."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


@row("your own layer with `add_loss`", made.vectors())
def add_loss() -> Any:
    return classifier((12,), layers.Dense(8, activation="tanh"), Activity())


@row("no targets: an `add_loss` alone", made.without_targets)
def without_targets() -> Any:
    model = keras.Sequential([keras.Input((12,)), layers.Dense(8), Activity()])
    model.compile(sgd())
    return model


@row("an autoencoder (targets are the inputs)", made.themselves())
def autoencoder() -> Any:
    return compiled(perceptron(12, "sigmoid"), loss="binary_crossentropy", metrics=["mse"])


class OwnLoss(keras.Model):
    """Computes its loss itself."""

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        return ops.mean(ops.square(ops.subtract(y, y_pred))) + 0.01 * ops.mean(ops.abs(y_pred))


@row("`compute_loss` overridden", made.numbers(2))
def compute_loss() -> Any:
    x = keras.Input((12,))
    model = OwnLoss(x, layers.Dense(2)(layers.Dense(8, activation="tanh")(x)))
    model.compile(sgd(), metrics=["mae"])
    return model


class OwnMetric(keras.Model):
    """Adds a metric of its own to those that it was compiled with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.spread = keras.metrics.Mean(name="spread")

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        self.spread.update_state(ops.std(y_pred, 1))
        return super().compute_metrics(x, y, y_pred, sample_weight)


@row("`compute_metrics` overridden", made.vectors())
def compute_metrics() -> Any:
    x = keras.Input((12,))
    return compiled(OwnMetric(x, layers.Dense(4)(layers.Dense(8, activation="tanh")(x))))


@row("`run_eagerly=True`", made.vectors())
def run_eagerly() -> Any:
    return compiled(perceptron(), run_eagerly=True)


@row(
    "`jit_compile=True`",
    made.vectors(),
    backends=("tensorflow", "jax"),
    note="ignored; Keras would ask for a C++ compiler",
)
def jit_compile() -> Any:
    return compiled(perceptron(), jit_compile=True)


@row("`weighted_metrics`", made.weighted(made.vectors()))
def weighted_metrics() -> Any:
    return compiled(perceptron(), metrics=["accuracy"], weighted_metrics=["sparse_categorical_crossentropy"])
