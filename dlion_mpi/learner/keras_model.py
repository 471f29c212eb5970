"""A Keras model with its optimizer and loss, in terms of Keras alone: what every backend computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.vector.layout import Layout
from dlion_mpi.vector.named_arrays import Array


class KerasModel:
    """The model's variables in groups, and its loss and test as functions for a backend to compile.

    ``trainable``: the variables that are trained, all float32; their entries are the *weights*, (P,).
    ``statistics``: other float variables, such as those of batch normalisation. Weights and statistics together are
    the *knowledge*, (K,). ``others``: integer variables, such as the states of random generators.
    A *state* is a list with the values of all non-trainable variables, in Keras's order.
    """

    def __init__(self, model: Any, optimizer: Any, input_dtype: npt.DTypeLike) -> None:
        self.model, self.optimizer = model, optimizer
        self.input_dtype: np.dtype[Any] = np.dtype(input_dtype)
        self.trainable = list(model.trainable_variables)
        if not self.trainable:
            raise UserError("the model has no trainable variables: there is nothing to train")
        if any(v.dtype != "float32" for v in self.trainable):
            raise UserError("the model has trainable variables that are not float32: build it with float32 weights")
        self.non_trainable = list(model.non_trainable_variables)
        # By place, never by path: a block that is built twice gives two variables of one path.
        self.statistics_at = [k for k, v in enumerate(self.non_trainable) if "float" in v.dtype]
        self.others_at = [k for k, v in enumerate(self.non_trainable) if "float" not in v.dtype]
        self.statistics = [self.non_trainable[k] for k in self.statistics_at]
        self.others = [self.non_trainable[k] for k in self.others_at]
        optimizer.build(self.trainable)
        self.layout = Layout.of([v.shape for v in self.trainable])
        self.knowledge_layout = Layout.of([v.shape for v in (*self.trainable, *self.statistics)])
        self._loss = _loss_function(model)

    def describe(self) -> str:
        """Shapes of all variables and the optimizer's name, to tell one model from another."""
        shapes = [list(v.shape) for v in (*self.trainable, *self.statistics, *self.others)]
        return f"{shapes}, {type(self.optimizer).__name__}"

    def state(self, statistics: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """A state of these values of the ``statistics`` and of the ``others``."""
        values = dict(zip((*self.statistics_at, *self.others_at), (*statistics, *others), strict=True))
        return [values[place] for place in range(len(self.non_trainable))]

    def loss(self, y: Any, outputs: Any, losses: Sequence[Any], rows: Any = None) -> Any:
        """The mean loss of a batch; ``losses``: the layers' own, such as regularisation.

        ``rows``: the number of real rows; the rows after them are padding and do not count.
        """
        loss = self._loss(y, outputs, rows)
        return loss + sum(losses) if losses else loss

    def hits(self, y: Any, outputs: Any, rows: Any = None) -> Any:
        """Count the rows of a batch, or of its first ``rows``, that are classified correctly."""
        from keras import ops

        found = ops.equal(ops.cast(ops.argmax(outputs, 1), "int32"), y)
        if rows is not None:
            found = ops.logical_and(found, ops.arange(y.shape[0]) < rows)
        return ops.sum(ops.cast(found, "int32"))

    def inputs(self, x: Any) -> Any:
        """The rows as they are; bytes as float32."""
        from keras import ops

        return ops.cast(x, "float32") if self.input_dtype == np.uint8 else x

    def plain_rate(self) -> np.float32 | None:
        """The learning rate of an optimizer that does no more than ``w - rate g``, else None."""
        config = self.optimizer.get_config()
        rate = config.get("learning_rate")
        if type(self.optimizer).__name__ != "SGD" or not isinstance(rate, float | np.floating):
            return None
        plain = type(self.optimizer)(rate).get_config() | {"name": config["name"]}
        constrained = any(getattr(v, "constraint", None) is not None for v in self.trainable)
        return np.float32(rate) if config == plain and not constrained else None


def value_for_rank(variable: Any, rank: int) -> Array:
    """The variable's value on this rank. A random generator's state (seed, counter) gets a seed of the rank's own.

    Ranks start from equal weights, but must not drop the same units.
    """
    value = np.array(variable.numpy())
    if variable.name == "seed_generator_state" and value.shape == (2,) and value.dtype.kind in "iu":
        value += np.array([rank, 0], value.dtype)
    return value


def _loss_function(model: Any) -> Callable[[Any, Any, Any], Any]:
    """The model's own loss if it was compiled with one, else cross-entropy over its logits or softmax."""
    import keras

    if getattr(model, "compiled", False) and model.loss is not None:
        loss = keras.losses.get(model.loss)
    else:
        last = model.layers[-1] if model.layers else None
        activation = getattr(last, "activation", None)
        is_softmax = isinstance(last, keras.layers.Softmax) or activation is keras.activations.softmax
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not is_softmax)
    if isinstance(loss, keras.losses.Loss):
        is_sum = loss.reduction == "sum"
        return lambda y, outputs, rows: loss(y, outputs, sample_weight=_row_weights(y, rows, is_sum))

    def mean(y: Any, outputs: Any, rows: Any) -> Any:
        each, weights = loss(y, outputs), _row_weights(y, rows, False)
        return keras.ops.mean(each if weights is None else each * weights)

    return mean


def _row_weights(y: Any, rows: Any, is_sum: bool) -> Any:
    """Weights (b,) that leave padding out of the loss: of its sum, or of its mean over all b rows."""
    if rows is None:
        return None
    from keras import ops

    size = y.shape[0]
    counted = ops.cast(ops.arange(size) < rows, "float32")
    return counted if is_sum else counted * (size / ops.cast(rows, "float32"))
