"""Models: the built-in one, those that a user's function builds, and the optimizer for models without one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dlion_mpi import plugins
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.learner import networks
from dlion_mpi.learner.backend import quiet
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.compiled import check_labels, fitting, prepared
from dlion_mpi.learner.keras_model import KerasModel
from dlion_mpi.learner.shards import Shard


def cipher(input_shape: Any, classes: int | None, *, scale: bool = False) -> Any:
    """The CNN of the DLion experiments, about 1 M parameters on 28x28x1.

    Three 5x5 convolutions with 10, 20 and 100 kernels, two 2x2 poolings, dense 200, dense ``classes`` (logits).
    Input: images (H, W, C) or (H, W). ``scale``: divide the input by 255, for images of bytes. Raises UserError for
    other data, images below 4x4, or targets that are not classes.
    """
    import keras

    other = "give a model that takes it (--model PACKAGE.MODULE:FUNCTION)"
    is_image = isinstance(input_shape, tuple) and len(input_shape) in (2, 3)
    if not is_image or not all(isinstance(size, int) for size in input_shape) or min(input_shape[:2]) < 4:
        raise UserError(f"--model cipher wants images of at least 4x4, but the data is {input_shape}: {other}")
    if classes is None:
        raise UserError(f"--model cipher wants one class label per row, counted from 0, but the data has none: {other}")
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            *([layers.Rescaling(1 / 255)] if scale else []),
            *([layers.Reshape((*input_shape, 1))] if len(input_shape) == 2 else []),
            layers.Conv2D(10, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(20, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(100, 5, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(200, activation="relu"),
            layers.Dense(classes),
        ],
        name="cipher",
    )


def _built_in(spec: str) -> Callable[[Batch, Any, int | None], Any] | None:
    """A built-in model, as a function of example rows, the shape of a row's input, and the number of classes."""
    return {
        "cipher": lambda rows, shape, classes: cipher(shape, classes, scale=rows.x.dtype == np.uint8),
        "resnet20": lambda rows, shape, classes: networks.residual(rows, classes, blocks=3, width=16),
        "resnet18": lambda rows, shape, classes: networks.residual(rows, classes, blocks=2, width=64),
        "transformer": lambda rows, shape, classes: networks.transformer(rows, depth=4, width=128, heads=4),
        "transformer-large": lambda rows, shape, classes: networks.transformer(rows, depth=6, width=256, heads=8),
        "mlp": lambda rows, shape, classes: networks.mlp(rows, classes),
    }.get(spec)


NAMES = "cipher, resnet20, resnet18, transformer, transformer-large, mlp"


def build(spec: str, shard: Shard, seed: int) -> Any:
    """The Keras model that ``--model`` names, with initial weights from ``seed``. Raises UserError.

    ``spec``: a built-in model, or the PACKAGE.MODULE:FUNCTION of a function that returns a Keras model. It is called
    with the shape of a row's input (a structure of shapes for several inputs) and the number of classes (None if the
    targets are not classes), or without arguments if it takes none.
    """
    import keras

    built_in = _built_in(spec)
    own = None if built_in else plugins.load("--model", spec, built_in=NAMES, kind="function")
    with quiet():  # Keras imports TensorFlow here, whatever its backend
        keras.utils.set_random_seed(seed)
    if built_in:
        return built_in(shard.example(), shard.input_shape, shard.classes)
    assert own is not None
    arguments = (shard.input_shape, shard.classes) if inspect.signature(own).parameters else ()
    model = plugins.call("--model", spec, own, *arguments)
    if not isinstance(model, keras.Model):
        raise UserError(f"--model {spec}: returned {type(model).__name__}, but must return a keras.Model")
    return model


def optimizer(name: str, learning_rate: float, momentum: float) -> Any:
    """The Keras optimizer of ``--optimizer``."""
    import keras

    if name == "sgd":
        return keras.optimizers.SGD(learning_rate, momentum=momentum)
    return {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[name](learning_rate)


def trainable(config: Config, shard: Shard, model: Any = None) -> KerasModel:
    """The model to train: ``model``, or the one that the Config names; compiled if it was not. Raises UserError."""
    import keras

    example = shard.example()
    if model is None:
        model = build(config.model, shard, config.seed)
    if not isinstance(model, keras.Model):
        raise UserError(f"the model is {type(model).__name__}, but must be a keras.Model")
    made = partial(optimizer, config.optimizer, config.learning_rate, config.momentum)
    model = prepared(model, example, made, shard.classes)
    with fitting(example):
        keras_model = KerasModel(model, example)
    check_labels(model, example, shard.classes)
    return keras_model
