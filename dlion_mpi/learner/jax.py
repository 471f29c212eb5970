"""Keras's JAX backend: pure functions of the training state, compiled once for each size of batch.

Compiling takes about a second, so batches are padded to a few sizes where `padding` finds that this changes nothing.
Other batches stay as they are, and each new size is compiled.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.backend import Logs, Tensors, as_logs, summed_logs, training_loss_of, with_values
from dlion_mpi.learner.batch import Batch, as_float32
from dlion_mpi.learner.keras_model import KerasModel
from dlion_mpi.learner.padding import Padding, padding_of
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array


def start(threads: int, concurrent: int, local_rank: int) -> None:
    """See `backend.start`. JAX has one pool of threads for everything, of ``concurrent`` threads."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if concurrent:
        os.environ.setdefault("NPROC", str(concurrent))
    if threads == 1 and "xla_cpu_multi_thread_eigen" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    import jax

    devices = jax.local_devices()
    if len(devices) > 1:
        jax.config.update("jax_default_device", devices[local_rank % len(devices)])


class _Functions:
    """Functions of values that training and tests are made of.

    Arguments of those that train are the values of the trainable variables, the others and the optimizer's, then the
    batch and the number of its real rows, which is None unless the batch was padded.
    """

    def __init__(self, keras_model: KerasModel) -> None:
        import jax

        if len(keras_model.optimizers) > 1:
            raise UserError(
                "the model has several optimizers, but Keras's training step on JAX keeps the state of one: set "
                "KERAS_BACKEND to tensorflow or torch"
            )
        self._jax, self._keras = jax, keras_model
        if not keras_model.model.optimizer.built:
            keras_model.model.optimizer.build(keras_model.trainable)
        self._compiling = threading.RLock()
        self._compiled: set[Any] = set()
        self._names: dict[str, list[str]] = {}
        keras_model.model.reset_metrics()
        self._counters = _values(keras_model.model.metrics_variables)
        self._padding: Padding | None = padding_of(keras_model)
        self._test, self._results = self._jit(self._tested), self._jit(self._metric_results)

    def names(self, knowledge: Vector, batch: Batch) -> tuple[str, ...]:
        """See `backend.Evaluating`. Without compiling: this number of rows may never come again."""
        with self._compiling:
            frozen = _values(self._keras.non_trainable)
            self._jax.eval_shape(self._tested, knowledge, frozen, self._counters, batch.map(as_float32))
            self._jax.eval_shape(self._metric_results, self._counters)
        return tuple(dict.fromkeys([*self._names["tests"], *self._names["results"]]))

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """See `backend.Evaluating`."""
        counters, logs = self._counters, []
        frozen = _values(self._keras.non_trainable)
        for batch in batches:
            values, counters = self._call(self._test, knowledge, frozen, counters, batch.map(as_float32))
            logs.append((batch.rows, self._named("tests", values)))
        with self._compiling:
            return summed_logs(logs) | self._named("results", self._results(counters))

    def _tested(self, knowledge: Any, state: Tensors, counters: Tensors, batch: Batch) -> tuple[Any, Tensors]:
        keras_model, weights = self._keras, len(self._keras.trainable)
        parts = self._split(knowledge, [*keras_model.trainable, *keras_model.statistics])
        values = parts[:weights], keras_model.state(parts[weights:], state), counters
        logs, (_, _, counters) = keras_model.model.test_step(values, keras_model.data(batch))
        return self._logs("tests", logs), counters

    def _metric_results(self, counters: Tensors) -> Any:
        model = self._keras.model
        with with_values(model.metrics_variables, counters):
            return self._logs("results", model.get_metrics_result())

    def _trained(self, values: Tensors, state: Tensors, slots: Tensors, batch: Batch, rows: Any) -> Any:
        """Logs of a training step as a vector, and the values after it."""
        keras_model = self._keras
        if rows is None:
            before = values, state, slots, self._counters
            logs, (values, state, slots, _) = keras_model.model.train_step(before, keras_model.data(batch))
            return self._logs("steps", logs), values, state, slots
        (_, (loss, outputs, state, _)), gradients = self._differentiated(values, state, slots, batch, rows)
        values, slots = keras_model.model.optimizer.stateless_apply(slots, gradients, values)
        assert self._padding is not None
        logs = {"loss": loss} | self._padding.metrics(batch, outputs, rows)
        return self._logs("steps", logs), values, state, slots

    def _differentiated(self, values: Tensors, state: Tensors, slots: Tensors, batch: Batch, rows: Any) -> Any:
        """The scaled loss with what comes with it, and its gradients."""
        if rows is not None:
            assert self._padding is not None
            batch = batch._replace(sample_weight=self._padding.weights(batch, rows))
        function = self._jax.value_and_grad(self._keras.model.compute_loss_and_updates, has_aux=True)
        return function(values, state, self._counters, *batch, training=True, optimizer_variables=slots)

    def _gradient(self, values: Tensors, state: Tensors, slots: Tensors, batch: Batch, rows: Any) -> Any:
        """Loss, gradient as a vector, and the state after it."""
        (_, (loss, _, state, _)), gradients = self._differentiated(values, state, slots, batch, rows)
        return loss, self._flat(gradients) / self._scale(slots), state

    def _updated(self, values: Tensors, slots: Tensors, gradient: Any) -> tuple[Tensors, Tensors]:
        """Values and slots after the optimizer got a gradient."""
        gradients = self._split(gradient * self._scale(slots), self._keras.trainable)
        updated: tuple[Tensors, Tensors] = self._keras.model.optimizer.stateless_apply(slots, gradients, values)
        return updated

    def _moved(self, values: Tensors, state: Tensors, slots: Tensors, batch: Batch, rows: Any) -> Any:
        """Logs, movement, and state and slots after a training step."""
        logs, after, state, slots = self._trained(values, state, slots, batch, rows)
        return logs, self._flat(after) - self._flat(values), state, slots

    def _scale(self, slots: Tensors) -> Any:
        """The factor of the loss that the optimizer takes out of gradients."""
        scaling = self._keras.loss_scale
        if scaling is None:
            return 1.0
        return next(v for s, v in zip(scaling.variables, slots, strict=True) if s is scaling.dynamic_scale)

    def _logs(self, kind: str, logs: Any) -> Any:
        """The values of what a step returns as a vector; notes their names."""
        numpy = self._jax.numpy
        logs = {name: numpy.mean(numpy.asarray(value, "float32")) for name, value in as_logs(logs).items()}
        self._names[kind] = list(logs)
        return numpy.stack(list(logs.values())) if logs else numpy.zeros(0)

    def _named(self, kind: str, values: Any) -> Logs:
        return dict(zip(self._names[kind], np.asarray(values).tolist(), strict=True))

    def _prepared(self, batch: Batch) -> tuple[Batch, Any]:
        """The batch as functions take it, and the number of its real rows if it was padded."""
        batch = batch.map(as_float32)
        return (batch, None) if self._padding is None or self._keras.eager else self._padding.padded(batch)

    def _jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self._keras.eager else self._jax.jit(function)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a compiled function of a batch. Layers keep notes while Keras is traced: one thread at a time."""
        leaves, structure = self._jax.tree.flatten(arguments[-2:])
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (function, structure, shapes)
        with contextlib.nullcontext() if key in self._compiled else self._compiling:
            result = function(*arguments)
            if not self._keras.eager:
                self._compiled.add(key)
        return result

    def _flat(self, values: Sequence[Any]) -> Any:
        return self._jax.numpy.concatenate([value.ravel().astype("float32") for value in values])

    def _split(self, vector: Any, variables: Sequence[Any]) -> Tensors:
        """A vector as values of these variables' shapes and types."""
        ends = np.cumsum([int(np.prod(v.shape)) for v in variables])[:-1]
        parts = self._jax.numpy.split(vector, ends)
        return [part.reshape(v.shape).astype(v.dtype) for part, v in zip(parts, variables, strict=True)]


class InPlace(_Functions):
    """See `backend.InPlace`. The variables are read before a call and written after it."""

    def __init__(self, keras_model: KerasModel, *, guarded: bool) -> None:
        super().__init__(keras_model)
        numpy = self._jax.numpy

        def movement(values: Tensors, state: Tensors, slots: Tensors, batch: Batch, rows: Any) -> Any:
            logs, moved, *after = self._moved(values, state, slots, batch, rows)
            if guarded:  # what is not finite must not stay in the optimizer either
                finite = numpy.isfinite(logs.sum() + numpy.linalg.norm(moved))
                after = self._jax.tree.map(lambda new, old: numpy.where(finite, new, old), after, [state, slots])
            return logs, moved, *after

        self._functions = {
            "movements": self._jit(movement),
            "alone": self._jit(self._trained),
            "gradients": self._jit(self._gradient),
        }
        self._update, self._read, self._add = self._jit(self._updated), self._jit(self._flat), self._jit(self._added)

    def trace(self, kind: str) -> None:
        """See `backend.InPlace`. Without compiling: the example's number of rows may never come again."""
        with self._compiling:
            self._jax.eval_shape(self._functions[kind], *self._values(), self._keras.example.map(as_float32), None)

    def movement(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        logs, moved, state, slots = self._run("movements", batch)
        _assign(self._keras.non_trainable, state)
        _assign(self._keras.slots, slots)
        return self._computed(logs, np.asarray(moved))

    def step(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        logs, values, state, slots = self._run("alone", batch)
        _assign(self._keras.trainable, values)
        _assign(self._keras.non_trainable, state)
        _assign(self._keras.slots, slots)
        return self._computed(logs, np.empty(0, np.float32))

    def gradient(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        loss, vector, state = self._run("gradients", batch)
        _assign(self._keras.non_trainable, state)
        return Gradient(float(loss), np.asarray(vector))

    def apply(self, gradient: Vector) -> None:
        """See `backend.InPlace`."""
        keras_model = self._keras
        values, slots = self._update(_values(keras_model.trainable), _values(keras_model.slots), gradient)
        self._jax.block_until_ready(values)  # it may still read the gradient, which belongs to the caller
        _assign(keras_model.trainable, values)
        _assign(keras_model.slots, slots)

    def move(self, movement: Vector) -> None:
        """See `backend.InPlace`."""
        trainable = self._keras.trainable
        values = self._add(_values(trainable), movement)
        self._jax.block_until_ready(values)
        _assign(trainable, values)

    def read(self, *, statistics: bool) -> Vector:
        """See `backend.InPlace`."""
        more = self._keras.statistics if statistics else []
        return np.array(self._read(_values([*self._keras.trainable, *more])))

    def write(self, vector: Vector) -> None:
        """See `backend.InPlace`."""
        keras_model = self._keras
        layout, variables = keras_model.layout, keras_model.trainable
        if len(vector) > layout.size:
            layout, variables = keras_model.knowledge_layout, [*variables, *keras_model.statistics]
        _assign(variables, layout.split(vector.copy()))  # JAX may keep the memory that it is given

    def value(self, variable: Any) -> Array:
        """See `backend.InPlace`. No copy: JAX's arrays never change."""
        return np.asarray(variable.value)

    def _added(self, values: Tensors, movement: Any) -> Tensors:
        parts = self._split(movement, self._keras.trainable)
        after = [value + part for value, part in zip(values, parts, strict=True)]
        constraints = [getattr(variable, "constraint", None) for variable in self._keras.trainable]
        return [value if c is None else c(value) for value, c in zip(after, constraints, strict=True)]

    def _values(self) -> tuple[Tensors, Tensors, Tensors]:
        return _values(self._keras.trainable), _values(self._keras.non_trainable), _values(self._keras.slots)

    def _run(self, kind: str, batch: Batch) -> Any:
        return self._call(self._functions[kind], *self._values(), *self._prepared(batch))

    def _computed(self, logs: Any, vector: Vector) -> Gradient:
        named = self._named("steps", logs)
        return Gradient(training_loss_of(named), vector, named)


class Stateless(_Functions):
    """See `backend.Stateless`."""

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)

        def of_weights(function: Callable[..., Any]) -> Callable[..., Any]:
            return self._jit(lambda weights, *others: function(self._split(weights, keras_model.trainable), *others))

        def update(values: Tensors, slots: Tensors, gradient: Any) -> tuple[Any, Tensors]:
            values, slots = self._updated(values, slots, gradient)
            return self._flat(values), slots

        self._movement_at, self._gradient_at = of_weights(self._moved), of_weights(self._gradient)
        self._update_at = of_weights(update)

    def movement(
        self, weights: Vector, state: Tensors, slots: Tensors, batch: Batch
    ) -> tuple[Gradient, Tensors, Tensors]:
        """See `backend.Stateless`."""
        logs, moved, state, slots = self._call(self._movement_at, weights, state, slots, *self._prepared(batch))
        named = self._named("steps", logs)
        return Gradient(training_loss_of(named), np.asarray(moved), named), state, slots

    def gradient(self, weights: Vector, state: Tensors, batch: Batch) -> tuple[Gradient, Tensors]:
        """See `backend.Stateless`."""
        slots = _values(self._keras.slots)
        loss, vector, after = self._call(self._gradient_at, weights, state, slots, *self._prepared(batch))
        return Gradient(float(loss), np.asarray(vector)), after

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """See `backend.Stateless`."""
        after, slots = self._update_at(weights, slots, gradient)
        return np.array(after), slots


def _values(variables: Sequence[Any]) -> Tensors:
    return [variable.value for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
