"""One Keras model that computes for many workers.

Every worker has a `VirtualReplica` with its own weights, statistics, random seeds and optimizer slots. They go into
the model's functions with every call and come out again. A gradient is therefore a pure function, and threads can
compute the gradients of several workers at the same time with the same result.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.learner import backend
from dlion_mpi.learner.backend import Tensors
from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.keras_model import KerasModel, value_for_rank
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, array, under

CHUNK = 2000
"""Test rows of one call: more than in `learner/evaluate.py`, since no training step waits for the call."""


class SharedReplica:
    """The model, and its functions of all that a worker keeps. Called by position: weights, state, slots."""

    def __init__(self, model: Any, optimizer: Any, input_dtype: npt.DTypeLike) -> None:
        self.keras = KerasModel(model, optimizer, input_dtype)
        self.layout: Layout = self.keras.layout
        self._functions = backend.stateless(self.keras)
        self._updating = threading.Lock()  # the backend updates its own variables
        self.gradient, self.evaluate = self._functions.gradient, self._functions.evaluate
        self.takes_gradients = True
        self.plain_rate = self.keras.plain_rate()
        """The learning rate if the optimizer does no more than ``w - rate g``, else None."""

    def weights(self) -> Vector:
        """The weights that all workers start with, (P,) float32."""
        return _flat([variable.numpy() for variable in self.keras.trainable])

    def state(self, rank: int) -> Tensors:
        """The model's non-trainable variables, with random seeds of this rank."""
        return [value_for_rank(variable, rank) for variable in self.keras.non_trainable]

    def slots(self) -> Tensors:
        """The optimizer's variables."""
        return [variable.numpy() for variable in self.keras.optimizer.variables]

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """Weights and slots after the optimizer got ``gradient``."""
        if self.plain_rate is not None:
            return weights - self.plain_rate * gradient, slots
        with self._updating:
            return self._functions.update(weights, slots, gradient)

    def finished(self, weights: Vector, slots: Tensors) -> Vector:
        """The weights with what the optimizer keeps for the end, such as their averages."""
        self._store(weights, slots)
        self.keras.optimizer.finalize_variable_values(self.keras.trainable)
        return self.weights()

    def save(self, weights: Vector, state: Tensors, path: Path) -> None:
        """Write the model with these values in Keras's format."""
        self._store(weights, self.slots())
        for variable, value in zip(self.keras.non_trainable, state, strict=True):
            variable.assign(value)
        self.keras.model.save(path)

    def _store(self, weights: Vector, slots: Tensors) -> None:
        """Put these values in the model's and the optimizer's variables."""
        variables = (*self.keras.trainable, *self.keras.optimizer.variables)
        for variable, value in zip(variables, (*self.layout.split(weights), *slots), strict=True):
            variable.assign(value)

    def accuracy(self, knowledge: Vector, batch: Batch) -> float:
        """Share of the rows that a model with this knowledge classifies correctly. Threads may call this at once."""
        rows = len(batch.y)
        parts = (batch.part(k, k + CHUNK) for k in range(0, rows, CHUNK))
        return sum(self.evaluate(knowledge, part.x, part.y) for part in parts) / rows

    def split_knowledge(self, knowledge: Vector, state: Tensors) -> tuple[Vector, Tensors]:
        """Knowledge as weights, and as the ``state`` with its statistics replaced."""
        keras = self.keras
        statistics = keras.knowledge_layout.split(knowledge)[len(keras.trainable) :]
        return knowledge[: self.layout.size].copy(), keras.state(statistics, [state[k] for k in keras.others_at])

    def join_knowledge(self, weights: Vector, state: Tensors) -> Vector:
        """The inverse of `split_knowledge`, a copy."""
        return _flat([weights, *(state[k] for k in self.keras.statistics_at)])


def _flat(parts: Sequence[Any]) -> Vector:
    return np.concatenate([np.ravel(part) for part in parts])


class VirtualReplica:
    """The values that one worker keeps of the shared model; a `loop.ports.Replica`."""

    metric_names: tuple[str, ...] = ("accuracy",)

    def __init__(self, shared: SharedReplica, rank: int) -> None:
        self.layout: Layout = shared.layout
        self._shared = shared
        self._weights = shared.weights()
        self._state = shared.state(rank)
        self._slots = shared.slots()

    def gradient(self, batch: Batch) -> Gradient:
        """Loss and mean gradient over a batch; updates the statistics. May run in a thread, one per worker."""
        gradient, self._state = self._shared.gradient(self._weights, self._state, batch.x, batch.y)
        return gradient

    @property
    def takes_gradients(self) -> bool:
        """Whether the model can give its gradient."""
        return self._shared.takes_gradients

    def movement(self, batch: Batch) -> Gradient:
        """Compute what a training step adds to the weights, which stay as they are. Slots and statistics move."""
        gradient = self.gradient(batch)
        if not gradient.finite:
            return gradient
        if self._shared.plain_rate is not None:
            return Gradient(gradient.loss, -self._shared.plain_rate * gradient.vector)
        after, self._slots = self._shared.update(self._weights, self._slots, gradient.vector)
        return Gradient(gradient.loss, after - self._weights)

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,) float32."""
        self._weights = self._weights + movement

    def step_alone(self, batch: Batch) -> tuple[float, bool]:
        """Gradient and update, which is left out unless loss and gradient are finite. Returns the loss and whether."""
        gradient = self.gradient(batch)
        if gradient.finite:
            self.apply(gradient.vector)
        return gradient.loss, gradient.finite

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer an effective gradient, (P,) float32."""
        self._weights, self._slots = self._shared.update(self._weights, self._slots, gradient)

    def weights(self) -> Vector:
        """A copy of the weights, (P,) float32."""
        return self._weights.copy()

    def set_weights(self, weights: Vector) -> None:
        """Replace the weights, (P,) float32."""
        self._weights = weights.copy()

    def knowledge(self) -> Vector:
        """A copy of weights and statistics, (K,) float32."""
        return self._shared.join_knowledge(self._weights, self._state)

    def set_knowledge(self, knowledge: Vector) -> None:
        """Replace weights and statistics, (K,) float32. Optimizer slots stay as they are."""
        self._weights, self._state = self._shared.split_knowledge(knowledge, self._state)

    def statistics(self) -> Vector:
        """A copy of the statistics, (K - P,) float32."""
        return self.knowledge()[self.layout.size :]

    def set_statistics(self, statistics: Vector) -> None:
        """Replace the statistics, (K - P,) float32."""
        self.set_knowledge(np.concatenate([self._weights, statistics]))

    def evaluate(self, knowledge: Vector, batch: Batch) -> int:
        """Count the rows that a model with this knowledge classifies correctly."""
        return self._shared.evaluate(knowledge, batch.x, batch.y)

    def finish(self) -> None:
        """After the last step: put in the weights what the optimizer keeps for the end, such as their averages."""
        self._weights = self._shared.finished(self._weights, self._slots)

    def describe(self) -> str:
        """Shapes of all variables and the optimizer's name, to tell one model from another."""
        return self._shared.keras.describe()

    def to_arrays(self) -> Arrays:
        """Weights, state and slots, in arrays that do not change."""
        tensors = {**under("state", dict(enumerate(self._state))), **under("slots", dict(enumerate(self._slots)))}
        return {"weights": self._weights, **{name: np.asarray(value) for name, value in tensors.items()}}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        """Restore what `to_arrays` gave. Raises StateError, and then changes nothing."""
        found = {name: array(arrays, name, own.dtype, *own.shape) for name, own in self.to_arrays().items()}
        kept = () if generators else self._shared.keras.others_at
        self._state = [own if k in kept else found[f"state/{k}"] for k, own in enumerate(self._state)]
        self._slots = [found[f"slots/{k}"] for k in range(len(self._slots))]
        self._weights = found["weights"]

    def save(self, path: Path) -> None:
        """Write the model in Keras's format."""
        self._shared.save(self._weights, self._state, path)
