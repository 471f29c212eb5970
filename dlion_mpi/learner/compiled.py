"""A model ready to be trained: compiled if it was not, tested by accuracy if it is a classifier, tried on two rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dlion_mpi.errors import DataError, UserError
from dlion_mpi.learner.batch import Batch

SURELY = 1e-3
"""Largest distance of a sum of probabilities from 1."""
_NOISE = re.compile(r"^(Exception encountered|Arguments received|in user code|Call arguments|  File |Traceback|•|$)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def prepared(model: Any, example: Batch, optimizer: Callable[[], Any], classes: int | None = None) -> Any:
    """The model, compiled. ``optimizer`` gives one for a model without. Raises UserError.

    ``classes``: their number, if it is known.

    A model that was not compiled gets the loss of a classifier or of a regression, by its outputs and the targets. A
    classifier that was compiled without metrics gets ``accuracy``.
    """
    import keras

    if not getattr(model, "compiled", False):
        loss = _loss_for(model, example, classes)
        model.compile(optimizer(), loss, metrics=[_accuracy_of(loss) or keras.metrics.MeanAbsoluteError(name="mae")])
    elif type(model).compile is keras.Model.compile and model._compile_metrics is None:
        accuracy = _accuracy_of(model.loss)
        if accuracy is not None:
            model.compile(
                model.optimizer,
                model.loss,
                loss_weights=model._compile_config.config["loss_weights"],
                metrics=[accuracy],
                run_eagerly=model.run_eagerly,
                jit_compile=model.jit_compile,
                auto_scale_loss=False,
            )
    return model


@contextmanager
def fitting(example: Batch) -> Iterator[None]:
    """Turn an error that a model raises on data into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except DataError as error:
        raise UserError(str(error)) from None
    except Exception as error:
        raise UserError(f"the model does not fit the data: {reason(error)} (a row: {example.kind()})") from error


def check_labels(model: Any, example: Batch, classes: int | None) -> None:
    """Raise UserError if a label, below ``classes``, is beyond the outputs of a classifier.

    No backend says so: TensorFlow fails at some step, the others continue with NaN.
    """
    loss = of_labels(getattr(model, "loss", None))
    if loss is None or classes is None or loss.ignore_class is not None:
        return
    with fitting(example):
        outputs = outputs_of(model, example.x)
    width = outputs.shape[-1]
    if width < classes:
        raise UserError(
            f"the model gives {width} outputs for each label, but the data has {classes} classes, 0 to {classes - 1}: "
            f"its last layer needs at least {classes} units"
        )


def outputs_of(model: Any, x: Any) -> Any:
    """The outputs as in a test, so that random layers draw nothing before the first step."""
    return model(x, training=False) if model._call_has_training_arg else model(x)


def reason(error: BaseException) -> str:
    """The line of an error of Keras or its backend that says what is wrong."""
    lines = [_ANSI.sub("", line).strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not _NOISE.match(line)]
    text = telling[0] if telling else type(error).__name__
    return text.rstrip(".:")


def _loss_for(model: Any, example: Batch, classes: int | None) -> Any:
    """Cross-entropy for class labels, over logits or probabilities; the squared error for numbers. Raises UserError."""
    import keras

    with fitting(example):
        outputs = outputs_of(model, example.x)
    targets, losses = example.y, keras.losses
    kind = getattr(getattr(targets, "dtype", None), "kind", "")
    if not kind or isinstance(outputs, list | tuple | dict):
        raise UserError(
            "the model is not compiled, and its loss cannot be guessed for several outputs or without targets: compile "
            "it with an optimizer and a loss"
        )
    values = np.asarray(keras.ops.convert_to_numpy(outputs), np.float64)
    if kind in "iub" and values.ndim == targets.ndim + 1 and values.shape[-1] > 1:
        is_softmax = values.min() >= 0 and np.abs(values.sum(-1) - 1).max() <= SURELY
        return losses.SparseCategoricalCrossentropy(from_logits=not is_softmax)
    last = getattr(model.layers[-1], "activation", None) if model.layers else None
    are_two = targets.min() >= 0 and targets.max() <= 1 and (classes is None or classes <= 2)
    if (
        kind in "iub"
        and are_two
        and values.shape[-1] == 1
        and last in (keras.activations.sigmoid, keras.activations.linear)
    ):
        return losses.BinaryCrossentropy(from_logits=last is keras.activations.linear)
    if kind == "f" and values.shape in (targets.shape, (*targets.shape, 1)):
        return losses.MeanSquaredError()
    raise UserError(
        f"the model is not compiled, and no loss fits outputs of {values.shape[1:]} and {targets.dtype} targets of "
        f"{targets.shape[1:]} a row: compile it with an optimizer and a loss"
    )


def of_labels(loss: Any) -> Any:
    """The loss of a classifier of labels as one of Keras's objects; None for another."""
    import keras

    found = _loss(loss)
    return found if isinstance(found, keras.losses.SparseCategoricalCrossentropy) else None


def _accuracy_of(loss: Any) -> Any:
    """The metric ``accuracy`` for the loss of a classifier; None for another loss."""
    import keras

    found, metrics = _loss(loss), keras.metrics
    if isinstance(found, keras.losses.SparseCategoricalCrossentropy):
        return metrics.SparseCategoricalAccuracy(name="accuracy")
    if isinstance(found, keras.losses.CategoricalCrossentropy | keras.losses.CategoricalFocalCrossentropy):
        return metrics.CategoricalAccuracy(name="accuracy")
    if isinstance(found, keras.losses.BinaryCrossentropy | keras.losses.BinaryFocalCrossentropy):
        return metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if found.from_logits else 0.5)
    return None


def _loss(loss: Any) -> Any:
    """A loss as one of Keras's objects where it is named by its class or function; else as it is."""
    import keras

    losses = keras.losses
    if isinstance(loss, str):
        try:
            loss = losses.get(loss)
        except ValueError:
            return loss
    by_function = {
        losses.sparse_categorical_crossentropy: losses.SparseCategoricalCrossentropy,
        losses.categorical_crossentropy: losses.CategoricalCrossentropy,
        losses.binary_crossentropy: losses.BinaryCrossentropy,
    }
    made = by_function.get(loss) if callable(loss) and not isinstance(loss, losses.Loss) else None
    return made() if made else loss
