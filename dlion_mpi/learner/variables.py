"""Variables that a loop of the user's trains, as a replica: it sees what they have moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.keras_model import flat, moving, numbers
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, vector


class Variables:
    """A `loop.ports.Replica` of Keras variables that code outside the training loop updates.

    The weights of the training loop are a separate vector. `moved` compares the variables with them, `show` puts
    them into the variables. Statistics stay in the variables. ``given``: Keras models and variables.
    """

    takes_gradients = False
    normalises = False  # what moves them is not known

    def __init__(self, given: Any, metric_names: Sequence[str] = ()) -> None:
        self._trainable, self._statistics = _variables_of(given)
        self.metric_names = tuple(metric_names)
        self.layout = Layout.of([v.shape for v in self._trainable])
        self._weights = self._read()
        self._is_shown = True

    def moved(self) -> Vector:
        """The movement of the variables since `show`, (P,) float32."""
        return self._read() - self._weights

    def keep(self, are_kept: bool) -> None:
        """Take the variables' values as the weights; or, if not ``are_kept``, set them back with the next `show`."""
        if are_kept:
            self._weights = self._read()
        self._is_shown = are_kept

    def show(self) -> None:
        """Put the weights into the variables."""
        if not self._is_shown:
            _assign(self._trainable, self._weights, self.layout)
            self._is_shown = True

    def weights(self) -> Vector:
        """A copy of the weights, (P,) float32."""
        return self._weights.copy()

    def set_weights(self, weights: Vector) -> None:
        """Replace the weights, (P,) float32."""
        self._weights = weights.copy()
        self._is_shown = False

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,) float32."""
        self.set_weights(self._weights + movement)

    def knowledge(self) -> Vector:
        """A copy of weights and statistics, (K,) float32."""
        return np.concatenate([self._weights, self.statistics()])

    def set_knowledge(self, knowledge: Vector) -> None:
        """Replace weights and statistics, (K,) float32."""
        self.set_weights(knowledge[: self.layout.size])
        self.set_statistics(knowledge[self.layout.size :])

    def statistics(self) -> Vector:
        """A copy of the statistics, (K - P,) float32."""
        return flat([numbers(v) for v in self._statistics])

    def set_statistics(self, statistics: Vector) -> None:
        """Replace the statistics, (K - P,) float32."""
        _assign(self._statistics, statistics, Layout.of([v.shape for v in self._statistics]))

    def averages(self) -> Vector:
        """None: the optimizer is the user's."""
        return np.empty(0, np.float32)

    def set_averages(self, averages: Vector) -> None:
        """Nothing: there are none."""

    def evaluate(self, knowledge: Vector, batches: Iterable[Any]) -> dict[str, float]:
        """Nothing: the user's loop tests."""
        return {}

    def finish(self) -> None:
        """Nothing: the optimizer is the user's."""

    def describe(self) -> str:
        """Shapes and types of all variables."""
        return str([(tuple(v.shape), v.dtype) for v in (*self._trainable, *self._statistics)])

    def to_arrays(self) -> Arrays:
        """Weights and statistics."""
        return {"weights": self.weights(), "statistics": self.statistics()}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        """Restore what `to_arrays` gave. Raises StateError."""
        self.set_weights(vector(arrays, "weights", self.layout.size))
        self.set_statistics(vector(arrays, "statistics", len(self.statistics())))

    def movement(self, batch: Any) -> Gradient:
        """Not here: the user's loop computes."""
        raise NotImplementedError

    step_alone = gradient = movement

    def apply(self, gradient: Vector) -> None:
        """Not here: the optimizer is the user's."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Not here: the model is the user's."""
        raise NotImplementedError

    def _read(self) -> Vector:
        return flat([numbers(v) for v in self._trainable])


def _assign(variables: Sequence[Any], values: Vector, layout: Layout) -> None:
    for variable, value in zip(variables, layout.split(values), strict=True):
        variable.assign(value)


def _variables_of(given: Any) -> tuple[list[Any], list[Any]]:
    """The variables to train and the statistics of models and variables. Raises UserError."""
    import keras

    trainable: list[Any] = []
    statistics: list[Any] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        if isinstance(item, keras.Model | keras.layers.Layer):
            trainable += item.trainable_variables
            statistics += [v for v in item.non_trainable_variables if id(v) in moving(item)]
        elif isinstance(item, keras.Variable):
            (trainable if item.trainable else statistics).append(item)
        else:
            raise UserError(
                f"Exchange was given a {type(item).__name__}: give a Keras model, or a list of models and variables"
            )
    trainable, statistics = (
        [v for v in {id(v): v for v in found}.values() if "float" in v.dtype] for found in (trainable, statistics)
    )
    if not trainable:
        raise UserError("Exchange was given no trainable variables: build the model first, by calling it on some rows")
    return trainable, statistics
