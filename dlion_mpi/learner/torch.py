"""Keras's torch backend: steps run as they are written, on the model's own variables."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dlion_mpi.learner.backend import (
    Logs,
    Tensors,
    as_logs,
    light,
    quiet,
    summed_logs,
    training_loss_of,
    values_after,
    with_values,
)
from dlion_mpi.learner.batch import Batch, as_float32
from dlion_mpi.learner.keras_model import KerasModel, numbers
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array


def start(threads: int, concurrent: int, local_rank: int) -> None:
    """See `backend.start`. torch's threads of one operation and of several are the same on a CPU."""
    with quiet(), light():
        import torch
    if threads:
        torch.set_num_threads(threads)
        with contextlib.suppress(RuntimeError):  # the program has started torch already
            torch.set_num_interop_threads(max(1, concurrent))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


class _Testing:
    """The parts that all functions share, and the function that tests."""

    def __init__(self, keras_model: KerasModel) -> None:
        import torch

        self._torch, self._keras = torch, keras_model
        _seed_all(keras_model.model)
        self._testing = [*keras_model.trainable, *keras_model.statistics]
        self._counters = list(keras_model.model.metrics_variables)
        keras_model.model.reset_metrics()
        self._zero = [_copy(variable) for variable in self._counters]

    def names(self, knowledge: Vector, batch: Batch) -> tuple[str, ...]:
        """See `backend.Evaluating`."""
        return tuple(self.evaluate(knowledge, [batch]))

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """See `backend.Evaluating`. Variables have other values in this thread only."""
        model = self._keras.model
        values = self._parts(knowledge, self._testing)
        counters, logs = self._zero, []
        with self._torch.no_grad():
            for batch in batches:
                with with_values([*self._testing, *self._counters], [*values, *counters]) as scope:
                    found = model.test_step(self._keras.data(self._tensors(batch)))
                logs.append((batch.rows, _floats(found)))
                counters = values_after(scope, self._counters, counters)
            with with_values(self._counters, counters):
                return summed_logs(logs) | _floats(model.get_metrics_result())

    def _tensors(self, batch: Batch) -> Batch:
        """The batch on the model's device."""
        return batch.map(self._tensor)

    def _tensor(self, value: Any) -> Any:
        """An array as a tensor on the model's device."""
        import keras

        array = as_float32(value)
        return keras.ops.convert_to_tensor(array if array.flags.writeable else array.copy())

    def _parts(self, vector: Vector, variables: Sequence[Any]) -> Tensors:
        """A vector as tensors of these variables' shapes and types."""
        parts = self._tensor(vector).split([v.value.numel() for v in variables])
        return [part.view(v.value.shape).to(v.value.dtype) for part, v in zip(parts, variables, strict=True)]


class InPlace(_Testing):
    """See `backend.InPlace`."""

    def __init__(self, keras_model: KerasModel, *, guarded: bool) -> None:
        super().__init__(keras_model)
        self._guarded = guarded
        self._before = [(variable, _copy(variable)) for variable in keras_model.trainable]

    def trace(self, kind: str) -> None:
        """See `backend.InPlace`. Nothing is compiled: the function runs once, and everything is put back."""
        functions: dict[str, Callable[[Batch], Gradient]] = {
            "movements": self.movement,
            "alone": self.step,
            "gradients": self.gradient,
        }
        with self.unchanged():
            functions[kind](self._keras.example)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put back all variables. Those that an optimizer makes in between get their first values."""
        keras_model = self._keras
        variables = [*keras_model.trainable, *keras_model.non_trainable, *keras_model.slots]
        kept = [(variable, _copy(variable)) for variable in variables]
        unbuilt = [optimizer for optimizer in keras_model.optimizers if not optimizer.built]
        yield
        self._assign(kept)
        for optimizer in unbuilt:
            if optimizer.built:
                fresh = type(optimizer).from_config(optimizer.get_config())
                fresh.build(optimizer._trainable_variables)
                self._assign(zip(optimizer.variables, (_copy(v) for v in fresh.variables), strict=True))

    def movement(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        keras_model, torch = self._keras, self._torch
        with torch.no_grad():
            for variable, value in self._before:
                value.copy_(variable.value)
        others = [(v, _copy(v)) for v in (*keras_model.non_trainable, *keras_model.slots)] if self._guarded else []
        logs = self._train_step(batch)
        with torch.no_grad():
            moved = torch.empty(keras_model.layout.size, device=self._before[0][1].device)
            parts = moved.split([value.numel() for _, value in self._before])
            for (variable, value), part in zip(self._before, parts, strict=True):
                torch.sub(variable.value.float(), value.float(), out=part.view(value.shape))
            self._assign(self._before)
        found = Gradient(training_loss_of(logs), moved.cpu().numpy(), logs)
        if self._guarded and not found.finite:  # what is not finite must not stay in the optimizer either
            self._assign(others)
        return found

    def step(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        logs = self._train_step(batch)
        return Gradient(training_loss_of(logs), np.empty(0, np.float32), logs)

    def gradient(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        torch, scaling = self._torch, self._keras.loss_scale
        loss = self._keras.training_loss(self._tensors(batch))
        scaled = loss if scaling is None else scaling.scale_loss(loss)
        sources = [variable.value for variable in self._keras.trainable]
        found = torch.autograd.grad(scaled, sources, allow_unused=True)
        dense = [torch.zeros_like(s) if g is None else g for g, s in zip(found, sources, strict=True)]
        vector = torch.cat([gradient.reshape(-1).float() for gradient in dense])
        if scaling is not None:
            vector /= scaling.dynamic_scale.value
        return Gradient(float(loss.detach()), vector.cpu().numpy())

    def apply(self, gradient: Vector) -> None:
        """See `backend.InPlace`."""
        keras_model, scaling = self._keras, self._keras.loss_scale
        with self._torch.no_grad():
            gradients = self._parts(gradient, keras_model.trainable)
            if scaling is not None:
                gradients = [g * scaling.dynamic_scale.value for g in gradients]
            keras_model.model.optimizer.apply(gradients, keras_model.trainable)

    def move(self, movement: Vector) -> None:
        """See `backend.InPlace`."""
        trainable = self._keras.trainable
        with self._torch.no_grad():
            for variable, part in zip(trainable, self._parts(movement, trainable), strict=True):
                variable.value.add_(part)
            for variable in self._keras.constrained:
                variable.assign(variable.constraint(variable))

    def read(self, *, statistics: bool) -> Vector:
        """See `backend.InPlace`."""
        variables = self._testing if statistics else self._keras.trainable
        with self._torch.no_grad():
            vector: Vector = self._torch.cat([v.value.reshape(-1).float() for v in variables]).cpu().numpy()
        return vector

    def write(self, vector: Vector) -> None:
        """See `backend.InPlace`."""
        variables = self._keras.trainable if len(vector) == self._keras.layout.size else self._testing
        self._assign(zip(variables, self._parts(vector, variables), strict=True))

    def value(self, variable: Any) -> Array:
        """See `backend.InPlace`."""
        return numbers(variable)

    def _train_step(self, batch: Batch) -> Logs:
        """Run Keras's ``train_step``; its logs, of this batch alone."""
        model = self._keras.model
        model.reset_metrics()
        for variable in self._keras.trainable:
            variable.value.grad = None  # Keras forgets one of two variables of one path
        return _floats(model.train_step(self._keras.data(self._tensors(batch))))

    def _assign(self, values: Iterable[tuple[Any, Any]]) -> None:
        with self._torch.no_grad():
            for variable, value in values:
                variable.value.copy_(value)


class Stateless(_Testing):
    """See `backend.Stateless`. The model's variables take each worker's values in turn."""

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)
        self._in_place = InPlace(keras_model, guarded=False)
        self._turn = threading.Lock()
        if keras_model.own_step:
            self._in_place.trace("movements")  # makes the optimizers' variables

    def movement(
        self, weights: Vector, state: Tensors, slots: Tensors, batch: Batch
    ) -> tuple[Gradient, Tensors, Tensors]:
        """See `backend.Stateless`."""
        with self._turn:
            self._take(weights, state, slots)
            moved = self._in_place.movement(batch)
            return moved, self._values(self._keras.non_trainable), self._values(self._keras.slots)

    def gradient(self, weights: Vector, state: Tensors, batch: Batch) -> tuple[Gradient, Tensors]:
        """See `backend.Stateless`."""
        with self._turn:
            self._take(weights, state)
            return self._in_place.gradient(batch), self._values(self._keras.non_trainable)

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """See `backend.Stateless`."""
        with self._turn:
            self._take(weights, slots=slots)
            self._in_place.apply(gradient)
            return self._in_place.read(statistics=False), self._values(self._keras.slots)

    def _take(self, weights: Vector, state: Tensors | None = None, slots: Tensors | None = None) -> None:
        """Put a worker's values in the variables."""
        self._in_place.write(weights)
        for variables, values in ((self._keras.non_trainable, state), (self._keras.slots, slots)):
            for variable, value in zip(variables, values, strict=True) if values is not None else ():
                variable.assign(value)

    def _values(self, variables: Sequence[Any]) -> Tensors:
        return [numbers(variable) for variable in variables]


def _seed_all(model: Any) -> None:
    """Let layers without a seed draw from their generators, as on other backends, instead of from torch's global one.

    Then ranks drop different units, and a resumed run continues with the same numbers.
    """
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            if generator._initial_seed is None:
                generator._initial_seed = int(numbers(generator.state)[0])


def _copy(variable: Any) -> Any:
    return variable.value.detach().clone()


def _floats(logs: Any) -> Logs:
    """The logs of a step, as numbers."""
    import keras

    return {name: float(np.mean(keras.ops.convert_to_numpy(value))) for name, value in as_logs(logs).items()}
