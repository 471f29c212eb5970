"""One worker's copy of the model: movements or gradients out as one flat vector, those of all workers in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlion_mpi.learner import backend
from dlion_mpi.learner.backend import Logs
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.compiled import fitting
from dlion_mpi.learner.faults import check_numbers, labels_of
from dlion_mpi.learner.keras_model import KerasModel, facts, flat, numbers, value_for_rank
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, array

TRAINING = "the training data"


class Replica:
    """A `loop.ports.Replica` that trains the model's own variables.

    *Weights* are the trainable variables, (P,) float32. *Knowledge* is the weights followed by the *statistics*: other
    float variables that training changes, such as those of batch normalisation, (K,) float32 together. Integer state
    (dropout's generators) stays. ``tests``: some test rows, to try the tests on; None: there are none. ``guarded``: a
    movement that is not finite leaves everything as it was.
    """

    def __init__(
        self, keras_model: KerasModel, rank: int = 0, *, tests: Batch | None = None, guarded: bool = False
    ) -> None:
        self._keras, self._guarded = keras_model, guarded
        for variable in keras_model.others:
            variable.assign(value_for_rank(variable, rank))
        with fitting(keras_model.example):
            self._labels = labels_of(keras_model)
        self._backend = backend.in_place(keras_model, guarded=guarded)
        self.layout: Layout = keras_model.layout
        self.metric_names: tuple[str, ...] = ()
        if tests is not None:
            with fitting(tests):
                (tests,) = self._tests([tests])
                self.metric_names = named_as_tests(self._backend.names(self.knowledge(), tests))

    @property
    def model(self) -> Any:
        """The Keras model that is trained."""
        return self._keras.model

    @property
    def takes_gradients(self) -> bool:
        """Whether the gradient can be had: not if the model has its own ``train_step``."""
        return not self._keras.own_step

    @property
    def normalises(self) -> bool:
        """Whether the optimizer moves by about the same length whatever the noise of a batch, as Adam does."""
        return self._keras.normalises

    def trace(self, kind: str) -> None:
        """Compile what computes "movements", "gradients" or a step "alone". Raises UserError if that fails."""
        with fitting(self._keras.example):
            self._backend.trace("movements" if self._guarded and kind == "alone" else kind)

    def movement(self, batch: Batch) -> Gradient:
        """Loss and movement of a training step; weights as before, optimizer and statistics as after it."""
        return self._checked(batch, self._backend.movement)

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,) float32."""
        self._backend.move(movement)

    def gradient(self, batch: Batch) -> Gradient:
        """Loss and mean gradient over a batch; updates batch-norm statistics, not the weights.

        Zero if the loss was scaled too far: the next one is scaled by half.
        """
        found = self._checked(batch, self._backend.gradient)
        if not self._keras.is_overflow(found):
            return found
        scale = self._keras.loss_scale.dynamic_scale
        scale.assign(numbers(scale) / 2)
        return Gradient(found.loss, np.zeros_like(found.vector))

    def step_alone(self, batch: Batch) -> Gradient:
        """A training step, for a worker without peers.

        A guarded step whose loss or movement is not finite is left out, and its loss is NaN. The vector is empty.
        """
        if not self._guarded:
            return self._checked(batch, self._backend.step)
        moved = self._checked(batch, self._backend.movement)
        if moved.finite:
            self._backend.move(moved.vector)
        return moved.applied()

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
        return flat([self._backend.value(variable) for variable in self._keras.statistics])

    def set_statistics(self, statistics: Vector) -> None:
        """Replace the statistics, (K - P,) float32."""
        _assign(self._keras.statistics, statistics)

    def averages(self) -> Vector:
        """A copy of the averages of the weights that the optimizer keeps for the end (`use_ema`), or nothing."""
        return flat([self._backend.value(variable) for variable in self._keras.averages])

    def set_averages(self, averages: Vector) -> None:
        """Replace the averages of the weights."""
        _assign(self._keras.averages, averages)

    def frozen(self) -> Vector:
        """A copy of the float variables that training leaves alone, float32."""
        return flat([self._backend.value(variable) for variable in self._keras.frozen])

    def set_frozen(self, values: Vector) -> None:
        """Replace what `frozen` gives."""
        _assign(self._keras.frozen, values)

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """The metrics of a model with this knowledge on batches of test rows. The replica stays as it is."""
        return as_tests(self._backend.evaluate(knowledge, self._tests(batches)))

    def _tests(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._labels is not None:
                self._labels.check(batch, "the test data")
            yield batch

    def _checked(self, batch: Batch, compute: Callable[[Batch], Gradient]) -> Gradient:
        """The result of a batch. Raises DataError if the batch is at fault that there is none."""
        if self._labels is not None:
            self._labels.check(batch, TRAINING)
        found = compute(batch)
        if not found.finite and not self._guarded:
            check_numbers(batch, TRAINING)
        return found

    def finish(self) -> None:
        """After the last step: put in the weights what the optimizer keeps for the end, such as their averages."""
        self._keras.finish()

    def facts(self) -> str:
        """Facts that must be the same on all ranks, one a line."""
        return facts(self._keras)

    def describe(self) -> str:
        """Shapes of all variables and the optimizers' classes, to tell one model from another."""
        return self._keras.describe()

    def to_arrays(self) -> Arrays:
        """Weights, statistics, generators' states and the optimizers' variables, in arrays that do not change."""
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
            "optimizer": self._keras.slots,
        }
        return {f"{group}/{k}": v for group, variables in groups.items() for k, v in enumerate(variables)}

    def _numbers(self, variable: Any) -> Array:
        """A variable's value in a type that HDF5 has: truth values as bytes, bfloat16 as float32."""
        value = self._backend.value(variable)
        if value.dtype == np.bool_:
            return value.astype(np.uint8)
        return value.astype(np.float32) if variable.dtype == "bfloat16" else value


def as_tests(logs: Mapping[str, float]) -> Logs:
    """Keras's metrics of a test by our names."""
    return dict(zip(named_as_tests(logs), logs.values(), strict=True))


def named_as_tests(names: Iterable[str]) -> tuple[str, ...]:
    """Our names of Keras's metrics of a test: the loss is ``val_loss``, to tell it from that of training."""
    return tuple("val_loss" if name == "loss" else name for name in names)


def _assign(variables: list[Any], values: Vector) -> None:
    layout = Layout.of([v.shape for v in variables])
    for variable, value in zip(variables, layout.split(values), strict=True):
        variable.assign(value.astype(variable.dtype) if variable.dtype != "bfloat16" else value)
