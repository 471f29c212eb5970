"""One worker's copy of the model: gradients out as one flat vector, effective gradients in through the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.learner import backend
from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.keras_model import KerasModel, value_for_rank
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, array


class Replica:
    """A `loop.ports.Replica` that trains the model's own variables.

    *Weights* are the trainable variables, (P,) float32. *Knowledge* is the weights followed by the float
    non-trainable variables such as batch-norm statistics, (K,) float32: those are updated by the local batches
    alone, and travel with knowledge transfer and with evaluation. Integer state (dropout's generators) stays.
    """

    metric_names: tuple[str, ...] = ("accuracy",)

    def __init__(self, model: Any, optimizer: Any, input_dtype: npt.DTypeLike, rank: int = 0) -> None:
        self._keras = KerasModel(model, optimizer, input_dtype)
        for variable in self._keras.others:
            variable.assign(value_for_rank(variable, rank))
        self._backend = backend.in_place(self._keras)
        self.layout: Layout = self._keras.layout

    def gradient(self, batch: Batch) -> Gradient:
        """Loss and mean gradient over a batch; updates batch-norm statistics, not the weights."""
        return self._backend.gradient(batch.x, batch.y)

    @property
    def takes_gradients(self) -> bool:
        """Whether the model can give its gradient."""
        return True

    def movement(self, batch: Batch) -> Gradient:
        """Compute what a training step adds to the weights, which stay as they are. Slots and statistics move."""
        gradient = self.gradient(batch)
        if not gradient.finite:
            return gradient
        before = self.weights()
        self.apply(gradient.vector)
        moved = self.weights() - before
        self.set_weights(before)
        return Gradient(gradient.loss, moved)

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,) float32."""
        self.set_weights(self.weights() + movement)

    def step_alone(self, batch: Batch) -> tuple[float, bool]:
        """Gradient and update at once, for a worker without peers.

        An update whose loss or gradient is not finite is left out. Returns the loss and whether both are finite.
        """
        return self._backend.step(batch.x, batch.y)

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer an effective gradient, (P,) float32."""
        self._backend.apply(gradient)

    def weights(self) -> Vector:
        """A copy of the weights, (P,) float32."""
        return self._backend.read(statistics=False)

    def set_weights(self, weights: Vector) -> None:
        """Replace the weights, (P,) float32."""
        self._backend.write(weights)

    def knowledge(self) -> Vector:
        """A copy of weights and statistics, (K,) float32."""
        return self._backend.read(statistics=True)

    def set_knowledge(self, knowledge: Vector) -> None:
        """Replace weights and statistics, (K,) float32. Optimizer slots stay as they are."""
        self._backend.write(knowledge)

    def statistics(self) -> Vector:
        """A copy of the statistics, (K - P,) float32."""
        return self.knowledge()[self.layout.size :]

    def set_statistics(self, statistics: Vector) -> None:
        """Replace the statistics, (K - P,) float32."""
        self.set_knowledge(np.concatenate([self.weights(), statistics]))

    def evaluate(self, knowledge: Vector, batch: Batch) -> int:
        """Count the rows that a model with this knowledge classifies correctly. The replica stays as it is."""
        return self._backend.evaluate(knowledge, batch.x, batch.y)

    def finish(self) -> None:
        """After the last step: put in the weights what the optimizer keeps for the end, such as their averages."""
        self._keras.optimizer.finalize_variable_values(self._keras.trainable)

    def describe(self) -> str:
        """Shapes of all variables and the optimizer's name, to tell one model from another."""
        return self._keras.describe()

    def to_arrays(self) -> Arrays:
        """Weights, statistics, generators' states and the optimizer's variables, in arrays that do not change."""
        return {name: self._numbers(variable) for name, variable in self._variables().items()}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        """Restore what `to_arrays` gave, except the learning rate. Raises StateError, and then changes nothing.

        ``generators``: also the states of random generators; not those of another rank, or both drop the same units.
        """
        kept = self._variables()
        found = {name: array(arrays, name, self._numbers(v).dtype, *v.shape) for name, v in kept.items()}
        for name, variable in kept.items():
            if variable.name != "learning_rate" and (generators or not name.startswith("others/")):
                variable.assign(found[name].astype(variable.dtype))

    def save(self, path: Path) -> None:
        """Write the model in Keras's format. Raises OSError, ValueError or RuntimeError for a disk that is full."""
        self._keras.model.save(path)

    def _variables(self) -> dict[str, Any]:
        groups = {
            "weights": self._keras.trainable,
            "statistics": self._keras.statistics,
            "others": self._keras.others,
            "optimizer": self._keras.optimizer.variables,
        }
        return {f"{group}/{k}": v for group, variables in groups.items() for k, v in enumerate(variables)}

    def _numbers(self, variable: Any) -> Array:
        """A variable's value; truth values as bytes."""
        value = self._backend.value(variable)
        return value.astype(np.uint8) if value.dtype == np.bool_ else value
