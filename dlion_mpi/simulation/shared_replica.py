"""One Keras model that computes for many workers.

Every worker has a `VirtualReplica` with its own weights, statistics, random seeds and optimizer slots. They go into
the model's functions with every call and come out again. A gradient is therefore a pure function, and threads can
compute the gradients of several workers at the same time with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dlion_mpi.learner import backend
from dlion_mpi.learner.backend import Logs, Tensors
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.compiled import fitting
from dlion_mpi.learner.keras_model import KerasModel, flat, numbers, value_for_rank
from dlion_mpi.learner.replica import as_tests, named_as_tests
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, array, under

CHUNK = 2000
"""Test rows of one call: more than in `learner/evaluate.py`, since no training step waits for the call."""


class SharedReplica:
    """The model, and its functions of all that a worker keeps. Called by position: weights, state, slots.

    ``tests``: some test rows, to try the tests on; None: there are none.
    """

    def __init__(self, keras_model: KerasModel, *, tests: Batch | None = None) -> None:
        self.keras = keras_model
        self.layout: Layout = keras_model.layout
        self._functions = backend.stateless(keras_model)
        self.gradient = self._functions.gradient
        self.plain_rate = keras_model.plain_rate()
        """The learning rate if the optimizer does no more than ``w - rate g``, else None."""
        self.takes_gradients, self.normalises = not keras_model.own_step, keras_model.normalises
        averages = {id(variable) for variable in keras_model.averages}
        self.averages_at = [k for k, variable in enumerate(keras_model.slots) if id(variable) in averages]
        self.metric_names: tuple[str, ...] = ()
        if tests is not None:
            with fitting(tests):
                start = self.join_knowledge(self.weights(), self.state(0))
                self.metric_names = named_as_tests(self._functions.names(start, tests))

    def weights(self) -> Vector:
        """The weights that all workers start with, (P,) float32."""
        return flat([numbers(variable) for variable in self.keras.trainable])

    def state(self, rank: int) -> Tensors:
        """The model's non-trainable variables, with random seeds of this rank."""
        return [value_for_rank(variable, rank) for variable in self.keras.non_trainable]

    def slots(self) -> Tensors:
        """The optimizers' variables."""
        return [numbers(variable) for variable in self.keras.slots]

    def movement(
        self, weights: Vector, state: Tensors, slots: Tensors, batch: Batch
    ) -> tuple[Gradient, Tensors, Tensors]:
        """Loss and movement of a training step, with state and slots after it. Threads may call this at once."""
        if self.plain_rate is None:
            return self._functions.movement(weights, state, slots, batch)
        gradient, state = self.gradient(weights, state, batch)
        return Gradient(gradient.loss, -self.plain_rate * gradient.vector), state, slots

    def moved(self, weights: Vector, movement: Vector) -> Vector:
        """The weights after a movement; constrained variables are then put right."""
        after = weights + movement
        if self.keras.constrained:
            parts = self.layout.split(after)
            for variable, part in zip(self.keras.trainable, parts, strict=True):
                if getattr(variable, "constraint", None) is not None:
                    part[...] = np.asarray(variable.constraint(part))
        return after

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """Weights and slots after the optimizer got ``gradient``."""
        if self.plain_rate is not None:
            return weights - self.plain_rate * gradient, slots
        return self._functions.update(weights, slots, gradient)

    def finished(self, weights: Vector, slots: Tensors) -> Vector:
        """The weights with what the optimizer keeps for the end, such as their averages."""
        self._store(weights, slots)
        self.keras.finish()
        return self.weights()

    def save(self, weights: Vector, state: Tensors, path: Path) -> None:
        """Write the model with these values in Keras's format."""
        self._store(weights, self.slots())
        for variable, value in zip(self.keras.non_trainable, state, strict=True):
            variable.assign(value)
        self.keras.model.save(path)

    def _store(self, weights: Vector, slots: Tensors) -> None:
        """Put these values in the model's and the optimizers' variables."""
        variables = (*self.keras.trainable, *self.keras.slots)
        for variable, value in zip(variables, (*self.layout.split(weights), *slots), strict=True):
            variable.assign(value)

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """The metrics of a model with this knowledge on batches of test rows. Threads may call this at once."""
        return as_tests(self._functions.evaluate(knowledge, batches))

    def split_knowledge(self, knowledge: Vector, state: Tensors) -> tuple[Vector, Tensors]:
        """Knowledge as weights, and as the ``state`` with its statistics replaced."""
        keras = self.keras
        statistics = keras.knowledge_layout.split(knowledge)[len(keras.trainable) :]
        return knowledge[: self.layout.size].copy(), keras.state(statistics, state)

    def join_knowledge(self, weights: Vector, state: Tensors) -> Vector:
        """The inverse of `split_knowledge`, a copy."""
        return flat([weights, *(state[k] for k in self.keras.statistics_at)])


class VirtualReplica:
    """The values that one worker keeps of the shared model; a `loop.ports.Replica`."""

    def __init__(self, shared: SharedReplica, rank: int) -> None:
        self.layout: Layout = shared.layout
        self.metric_names, self.takes_gradients = shared.metric_names, shared.takes_gradients
        self.normalises = shared.normalises
        self._shared = shared
        self._weights = shared.weights()
        self._state = shared.state(rank)
        self._slots = shared.slots()

    def gradient(self, batch: Batch) -> Gradient:
        """Loss and mean gradient over a batch; updates the statistics. May run in a thread, one per worker.

        Zero if the loss was scaled too far: the next one is scaled by half.
        """
        gradient, self._state = self._shared.gradient(self._weights, self._state, batch)
        if not self._shared.keras.is_overflow(gradient):
            return gradient
        scale, slots = self._shared.keras.loss_scale.dynamic_scale, self._shared.keras.slots
        half = numbers(scale) / 2
        scale.assign(half)
        self._slots = [half if own is scale else value for own, value in zip(slots, self._slots, strict=True)]
        return Gradient(gradient.loss, np.zeros_like(gradient.vector))

    def movement(self, batch: Batch) -> Gradient:
        """Loss and movement of a training step; optimizer and statistics as after it. May run in a thread.

        A movement that is not finite leaves everything as it was.
        """
        moved, state, slots = self._shared.movement(self._weights, self._state, self._slots, batch)
        if moved.finite:
            self._state, self._slots = state, slots
        return moved

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,) float32."""
        self._weights = self._shared.moved(self._weights, movement)

    def step_alone(self, batch: Batch) -> Gradient:
        """A training step, which is left out unless it is finite: then its loss is NaN. The vector is empty."""
        moved = self.movement(batch)
        if moved.finite:
            self.move(moved.vector)
        return moved.applied()

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
        return flat([self._state[k] for k in self._shared.keras.statistics_at])

    def set_statistics(self, statistics: Vector) -> None:
        """Replace the statistics, (K - P,) float32."""
        self.set_knowledge(np.concatenate([self._weights, statistics]))

    def averages(self) -> Vector:
        """A copy of the averages of the weights that the optimizer keeps for the end, or nothing."""
        return flat([self._slots[k] for k in self._shared.averages_at])

    def set_averages(self, averages: Vector) -> None:
        """Replace the averages of the weights."""
        places = self._shared.averages_at
        parts = Layout.of([np.shape(self._slots[k]) for k in places]).split(averages)
        replaced = {k: part.astype(np.asarray(self._slots[k]).dtype) for k, part in zip(places, parts, strict=True)}
        self._slots = [replaced.get(k, slot) for k, slot in enumerate(self._slots)]

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """The metrics of a model with this knowledge on batches of test rows."""
        return self._shared.evaluate(knowledge, batches)

    def finish(self) -> None:
        """After the last step: put in the weights what the optimizer keeps for the end, such as their averages."""
        self._weights = self._shared.finished(self._weights, self._slots)

    def describe(self) -> str:
        """Shapes of all variables and the optimizer's name, to tell one model from another."""
        return self._shared.keras.describe()

    def to_arrays(self) -> Arrays:
        """Weights, state and slots, in arrays that do not change."""
        tensors = {**under("state", dict(enumerate(self._state))), **under("slots", dict(enumerate(self._slots)))}
        return {"weights": self._weights, **{name: _storable(np.asarray(value)) for name, value in tensors.items()}}

    def from_arrays(self, arrays: Mapping[str, Array], *, generators: bool = True) -> None:
        """Restore what `to_arrays` gave. Raises StateError, and then changes nothing."""
        found = {name: array(arrays, name, own.dtype, *own.shape) for name, own in self.to_arrays().items()}
        kept = () if generators else self._shared.keras.others_at
        self._state = [own if k in kept else found[f"state/{k}"] for k, own in enumerate(self._state)]
        self._slots = [found[f"slots/{k}"].astype(np.asarray(own).dtype) for k, own in enumerate(self._slots)]
        self._weights = found["weights"]

    def save(self, path: Path) -> None:
        """Write the model in Keras's format."""
        self._shared.save(self._weights, self._state, path)


def _storable(value: Array) -> Array:
    """Truth values as bytes: HDF5 has no others."""
    return value.astype(np.uint8) if value.dtype == np.bool_ else value
