"""Models: the built-in one, those that a user's function builds, and the optimizer for models without one."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from dlion_mpi import plugins
from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.learner.backend import quiet
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


def build(spec: str, shard: Shard, seed: int) -> Any:
    """The Keras model that ``--model`` names, with initial weights from ``seed``. Raises UserError.

    ``spec``: ``cipher``, or the PACKAGE.MODULE:FUNCTION of a function (input_shape, classes) -> Keras model.
    """
    import keras

    input_shape, classes = shard.input_shape, shard.classes
    if spec == "cipher":
        is_bytes = getattr(shard.example().x, "dtype", None) == np.uint8
        builder = partial(cipher, scale=is_bytes)
    else:
        builder = plugins.load("--model", spec, built_in="cipher", kind="function")
    with quiet():  # Keras imports TensorFlow here, whatever its backend
        keras.utils.set_random_seed(seed)
    model = builder(input_shape, classes)
    if not isinstance(model, keras.Model):
        raise UserError(f"--model {spec}: returned {type(model).__name__}, but must return a keras.Model")
    if not model.built:
        model.build((None, *input_shape))
    wanted = (None, *input_shape)
    if tuple(model.input_shape) != wanted:
        raise UserError(f"--model {spec}: takes input {model.input_shape}, but the data gives {wanted}")
    if tuple(model.output_shape) != (None, classes):
        raise UserError(
            f"--model {spec}: gives output {model.output_shape}, but the data has {classes} classes: "
            f"it must be (None, {classes})"
        )
    return model


def optimizer(name: str, learning_rate: float, momentum: float) -> Any:
    """The Keras optimizer of ``--optimizer``."""
    import keras

    if name == "sgd":
        return keras.optimizers.SGD(learning_rate, momentum=momentum)
    return keras.optimizers.Adam(learning_rate)


def trainable(config: Config, shard: Shard, model: Any = None) -> tuple[Any, Any]:
    """The model to train, and its optimizer: ``model`` and its own if it was compiled, else those of the Config."""
    if model is None:
        model = build(config.model, shard, config.seed)
    own = getattr(model, "optimizer", None)
    return model, own if own is not None else optimizer(config.optimizer, config.learning_rate, config.momentum)
