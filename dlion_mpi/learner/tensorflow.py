"""Keras's TensorFlow backend: graphs that are traced once for each kind of batch.

A graph takes batches of any number of rows. Calling a concrete function skips the search for a fitting trace, half a
millisecond. XLA is not used: it would compile again for every number of rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import optree

from dlion_mpi.errors import UserError
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


def load() -> Any:
    """Import TensorFlow, quietly. Raises UserError."""
    try:
        with quiet(), light():
            import tensorflow as tf
    except ImportError:
        raise UserError(
            "TensorFlow is not installed: pip install tensorflow-cpu, or 'tensorflow[and-cuda]' where there are GPUs"
        ) from None
    return tf


def start(threads: int, concurrent: int, local_rank: int) -> None:
    """See `backend.start`."""
    tf = load()
    with contextlib.suppress(RuntimeError):  # the program has started TensorFlow already, as it wants it
        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(concurrent)
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            mine = gpus[local_rank % len(gpus)]
            tf.config.set_visible_devices(mine, "GPU")
            tf.config.experimental.set_memory_growth(mine, True)


class _OfBatches:
    """A function of tensors and a batch, as a graph for each kind of batch.

    Batches are of one kind if they differ in the number of rows alone. Where more sizes differ, such as the length of
    sequences, the graph leaves them open. ``fixed``: the specifications of the tensors before the batch.
    """

    def __init__(self, tf: Any, function: Callable[..., Any], fixed: Sequence[Any], *, eager: bool) -> None:
        self._tf, self._function, self._fixed, self._eager = tf, function, list(fixed), eager
        self._graphs: dict[Any, tuple[list[tuple[int | None, ...]], Any]] = {}
        self._tracing = threading.Lock()

    def trace(self, batch: Batch) -> None:
        """Trace the graph for batches of this kind, before the first of them is computed."""
        if not self._eager:
            self._graph_of(*self._leaves(batch))

    def __call__(self, fixed: Sequence[Any], batch: Batch) -> Any:
        leaves, structure = self._leaves(batch)
        tensors = [self._tf.convert_to_tensor(value) for value in (*fixed, *leaves)]
        if self._eager:
            return self._function(*tensors[: len(fixed)], optree.tree_unflatten(structure, tensors[len(fixed) :]))
        return self._graph_of(leaves, structure)(*tensors)

    def _leaves(self, batch: Batch) -> tuple[list[Any], Any]:
        leaves, structure = optree.tree_flatten(cast(Any, batch))
        return [as_float32(leaf) for leaf in leaves], structure

    def _graph_of(self, leaves: Sequence[Any], structure: Any) -> Any:
        key = (structure, *((leaf.dtype, leaf.ndim) for leaf in leaves))
        shapes, graph = self._graphs.get(key, ([], None))
        if graph is not None and all(
            size in (None, own)
            for shape, leaf in zip(shapes, leaves, strict=True)
            for size, own in zip(shape, leaf.shape[1:], strict=True)
        ):
            return graph
        with self._tracing:
            wanted = [tuple(leaf.shape[1:]) for leaf in leaves]
            if graph is not None:
                wanted = [
                    tuple(a if a == b else None for a, b in zip(old, new, strict=True))
                    for old, new in zip(shapes, wanted, strict=True)
                ]
            specs = [
                self._tf.TensorSpec((None, *shape), leaf.dtype) for shape, leaf in zip(wanted, leaves, strict=True)
            ]
            graph = self._traced(specs, structure)
            self._graphs[key] = wanted, graph
        return graph

    def _traced(self, specs: Sequence[Any], structure: Any) -> Any:
        """The graph. It runs as it is written, as in Keras's `fit`: AutoGraph would rewrite its `if` and `for`."""
        count = len(self._fixed)

        @self._tf.function(input_signature=[*self._fixed, *specs], autograph=False)
        def graph(*tensors: Any) -> Any:
            return self._function(*tensors[:count], optree.tree_unflatten(structure, tensors[count:]))

        return graph.get_concrete_function()


class _Graphs:
    """The parts that graphs are made of, and the graphs that test."""

    def __init__(self, keras_model: KerasModel) -> None:
        self._tf, self._keras = load(), keras_model
        self._testing = [*keras_model.trainable, *keras_model.statistics]
        self._counters = list(keras_model.model.metrics_variables)
        keras_model.model.reset_metrics()
        self._zero = [numbers(variable) for variable in self._counters]
        self._test_names: list[str] = []
        self._result_names: list[str] = []
        specs = [self._tf.TensorSpec(v.shape, v.dtype) for v in self._counters]
        self._test = self._of_batches(self._test_step, self._vector(keras_model.knowledge_layout.size), *specs)
        self._results = self._graph(*specs)(self._metric_results)

    def names(self, knowledge: Vector, batch: Batch) -> tuple[str, ...]:
        """See `backend.Evaluating`."""
        return tuple(self.evaluate(knowledge, [batch]))

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """See `backend.Evaluating`."""
        knowledge = self._tf.convert_to_tensor(knowledge)
        counters: Tensors = list(self._zero)
        logs = []
        for batch in batches:
            values, counters = self._test([knowledge, *counters], batch)
            logs.append((batch.rows, dict(zip(self._test_names, np.asarray(values).tolist(), strict=True))))
        results = np.asarray(self._results(*self._tensors(*counters))).tolist()
        return summed_logs(logs) | dict(zip(self._result_names, results, strict=True))

    def _test_step(self, knowledge: Any, *rest: Any) -> tuple[Any, Tensors]:
        """Logs of Keras's ``test_step`` for a batch, and its metrics' variables after it."""
        counters, batch = rest[:-1], rest[-1]
        values = [*self._split(knowledge, self._testing), *counters]
        with with_values([*self._testing, *self._counters], values) as scope:
            logs = self._keras.model.test_step(self._keras.data(batch))
        self._test_names, vector = self._logs(logs)
        return vector, values_after(scope, self._counters, counters)

    def _metric_results(self, *counters: Any) -> Any:
        with with_values(self._counters, counters):
            self._result_names, vector = self._logs(self._keras.model.get_metrics_result())
        return vector

    def _train_step(self, batch: Batch) -> Any:
        """Run Keras's ``train_step``; its logs, of this batch alone, as a vector."""
        self._keras.model.reset_metrics()
        self._log_names, vector = self._logs(self._keras.model.train_step(self._keras.data(batch)))
        return vector

    def _logs(self, logs: Any) -> tuple[list[str], Any]:
        """Names and values of what a step returns, the values as one vector."""
        tf = self._tf
        logs = as_logs(logs)
        values = [tf.reduce_mean(tf.cast(tf.convert_to_tensor(value), tf.float32)) for value in logs.values()]
        return list(logs), tf.stack(values) if values else tf.zeros((0,))

    def _computed(self, logs: Any, vector: Vector) -> Gradient:
        """The result of a training step, given its logs as `_train_step` returns them."""
        named = dict(zip(self._log_names, np.asarray(logs).tolist(), strict=True))
        return Gradient(training_loss_of(named), vector, named)

    def _of_batches(self, function: Callable[..., Any], *fixed: Any) -> _OfBatches:
        return _OfBatches(self._tf, function, fixed, eager=self._keras.eager)

    def _graph(self, *signature: Any) -> Any:
        """Decorate a function that a graph is made of."""
        return self._tf.function(input_signature=signature, autograph=False)

    def _tensors(self, *values: Any) -> Tensors:
        return [self._tf.convert_to_tensor(value) for value in values]

    def _vector(self, size: int) -> Any:
        return self._tf.TensorSpec((size,), self._tf.float32)

    def _flatten(self, tensors: Sequence[Any]) -> Any:
        """Tensors as one vector; inside a graph."""
        tf = self._tf
        return tf.concat([tf.reshape(tf.cast(t, tf.float32), (-1,)) for t in tensors], 0)

    def _split(self, vector: Any, variables: Sequence[Any]) -> Tensors:
        """A vector as tensors of these variables' shapes and types; inside a graph."""
        parts = self._tf.split(vector, [int(np.prod(v.shape)) for v in variables])
        return [self._tf.cast(self._tf.reshape(p, v.shape), v.dtype) for p, v in zip(parts, variables, strict=True)]

    def _gradients(self, loss_of: Callable[[], Any], sources: Sequence[Any]) -> tuple[Any, Tensors]:
        """A loss, and its gradients; zero where the loss does not depend on a source."""
        tf, scaling = self._tf, self._keras.loss_scale
        with tf.GradientTape() as tape:
            tape.watch(sources)
            loss = loss_of()
            scaled = loss if scaling is None else scaling.scale_loss(loss)
        found = tape.gradient(scaled, sources)
        dense = [
            tf.zeros(v.shape) if g is None else tf.convert_to_tensor(g) for g, v in zip(found, sources, strict=True)
        ]
        if scaling is not None:
            dense = [g / scaling.dynamic_scale.value for g in dense]
        return loss, dense

    def _apply(self, gradients: Sequence[Any]) -> None:
        """Give the optimizer unscaled gradients; inside a graph."""
        scaling = self._keras.loss_scale
        if scaling is not None:
            gradients = [g * scaling.dynamic_scale.value for g in gradients]
        self._keras.model.optimizer.apply(list(gradients), self._keras.trainable)


class InPlace(_Graphs):
    """See `backend.InPlace`."""

    def __init__(self, keras_model: KerasModel, *, guarded: bool) -> None:
        super().__init__(keras_model)
        self._guarded = guarded
        self._movement = self._of_batches(self._moved)
        self._alone = self._of_batches(self._train_step)
        self._gradient = self._of_batches(self._loss_and_gradient)
        self._optimize = self._graph(self._vector(keras_model.layout.size))(self._optimized)
        self._move = self._graph(self._vector(keras_model.layout.size))(self._added)
        self._compile_copying()

    def trace(self, kind: str) -> None:
        """See `backend.InPlace`."""
        chosen = {"movements": self._movement, "alone": self._alone, "gradients": self._gradient}[kind]
        chosen.trace(self._keras.example)

    def movement(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        logs, vector = self._movement([], batch)
        # The tensor's own memory, no copy: the array keeps the tensor alive.
        return self._computed(logs, np.asarray(vector))

    def step(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        return self._computed(self._alone([], batch), np.empty(0, np.float32))

    def gradient(self, batch: Batch) -> Gradient:
        """See `backend.InPlace`."""
        loss, vector = self._gradient([], batch)
        return Gradient(float(loss), np.asarray(vector))

    def apply(self, gradient: Vector) -> None:
        """See `backend.InPlace`."""
        self._optimize(self._tf.convert_to_tensor(gradient))

    def move(self, movement: Vector) -> None:
        """See `backend.InPlace`."""
        self._move(self._tf.convert_to_tensor(movement))

    def read(self, *, statistics: bool) -> Vector:
        """See `backend.InPlace`."""
        return np.array(self._read[statistics]())

    def write(self, vector: Vector) -> None:
        """See `backend.InPlace`."""
        self._write[len(vector)](self._tf.convert_to_tensor(vector))

    def value(self, variable: Any) -> Array:
        """See `backend.InPlace`. No copy: TensorFlow writes to a copy while another reads the value."""
        return np.asarray(self._tf.convert_to_tensor(variable.value))

    def _moved(self, batch: Batch) -> tuple[Any, Any]:
        """Run a training step, and put the weights back; the movement."""
        tf, keras_model = self._tf, self._keras
        before = [tf.identity(v.value) for v in keras_model.trainable]
        kept = keras_model.non_trainable + keras_model.slots if self._guarded else []
        others = [tf.identity(v.value) for v in kept]
        logs = self._train_step(batch)
        moved = self._flatten(
            [
                tf.cast(v.value, tf.float32) - tf.cast(b, tf.float32)
                for v, b in zip(keras_model.trainable, before, strict=True)
            ]
        )
        for variable, value in zip(keras_model.trainable, before, strict=True):
            variable.value.assign(value)
        if self._guarded:  # what is not finite must not stay in the optimizer either
            finite = tf.math.is_finite(tf.reduce_sum(logs) + tf.linalg.norm(moved))
            for variable, value in zip(kept, others, strict=True):
                variable.value.assign(tf.where(finite, variable.value, value))
        return logs, moved

    def _loss_and_gradient(self, batch: Batch) -> tuple[Any, Any]:
        sources = [v.value for v in self._keras.trainable]
        loss, gradients = self._gradients(lambda: self._keras.training_loss(batch), sources)
        return loss, self._flatten(gradients)

    def _optimized(self, gradient: Any) -> None:
        self._apply(self._split(gradient, self._keras.trainable))

    def _added(self, movement: Any) -> None:
        for variable, part in zip(self._keras.trainable, self._split(movement, self._keras.trainable), strict=True):
            variable.value.assign_add(part)
        for variable in self._keras.constrained:
            variable.assign(variable.constraint(variable))

    def _compile_copying(self) -> None:
        """Weights, and weights with statistics, out of the variables and into them."""
        keras_model = self._keras

        def read_from(variables: Sequence[Any]) -> Any:
            @self._graph()
            def read() -> Any:
                return self._flatten([v.value for v in variables])

            return read.get_concrete_function()

        def write_to(variables: Sequence[Any], size: int) -> Any:
            @self._graph(self._vector(size))
            def write(vector: Any) -> None:
                for variable, part in zip(variables, self._split(vector, variables), strict=True):
                    variable.assign(part)

            return write.get_concrete_function()

        self._read = {False: read_from(keras_model.trainable), True: read_from(self._testing)}
        self._write = {
            keras_model.layout.size: write_to(keras_model.trainable, keras_model.layout.size),
            keras_model.knowledge_layout.size: write_to(self._testing, keras_model.knowledge_layout.size),
        }


class Stateless(_Graphs):
    """See `backend.Stateless`.

    A model's own ``train_step``, loss scaling or an eager model change variables: such steps run whole, one at a time.
    Otherwise the gradient is a pure function, and only the optimizer is called one at a time.
    """

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)
        tf = self._tf
        self._turn = threading.Lock()
        self._whole = keras_model.own_step or keras_model.loss_scale is not None or keras_model.eager
        vector = self._vector(keras_model.layout.size)
        state = [tf.TensorSpec(v.shape, v.dtype) for v in keras_model.non_trainable]
        if self._whole:
            self._of_batches(self._train_step).trace(keras_model.example)  # makes the optimizers' variables
        slots = [tf.TensorSpec(v.shape, v.dtype) for v in keras_model.slots]
        self._gradient = self._of_batches(self._pure_gradient, vector, *state)
        self._step = self._of_batches(self._whole_step, vector, *state, *slots)
        if not keras_model.own_step:
            self._update = self._graph(vector, vector, *slots)(self._updated)

    def movement(
        self, weights: Vector, state: Tensors, slots: Tensors, batch: Batch
    ) -> tuple[Gradient, Tensors, Tensors]:
        """See `backend.Stateless`."""
        if not self._whole:
            gradient, after = self.gradient(weights, state, batch)
            moved, slots = self.update(weights, slots, gradient.vector)
            return Gradient(gradient.loss, moved - weights), after, slots
        with self._turn:
            logs, vector, *values = self._step([weights, *state, *slots], batch)
        return self._computed(logs, np.asarray(vector)), values[: len(state)], values[len(state) :]

    def gradient(self, weights: Vector, state: Tensors, batch: Batch) -> tuple[Gradient, Tensors]:
        """See `backend.Stateless`."""
        loss, vector, after = self._gradient([weights, *state], batch)
        return Gradient(float(loss), np.asarray(vector)), after

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """See `backend.Stateless`."""
        with self._turn:
            after, *slots = self._update(*self._tensors(weights, gradient, *slots))
        return np.array(after), slots

    def _pure_gradient(self, weights: Any, *rest: Any) -> tuple[Any, Any, Tensors]:
        keras_model, state, batch = self._keras, rest[:-1], rest[-1]
        variables = [*keras_model.trainable, *keras_model.non_trainable]
        after: Tensors = []

        def loss() -> Any:
            with with_values(variables, [*self._split(weights, keras_model.trainable), *state]) as scope:
                found = keras_model.training_loss(batch)
            after.extend(values_after(scope, keras_model.non_trainable, state))
            return found

        value, (gradient,) = self._gradients(loss, [weights])
        return value, gradient, after

    def _updated(self, weights: Any, gradient: Any, *before: Any) -> Tensors:
        keras_model = self._keras
        variables = [*keras_model.slots, *keras_model.trainable]
        for variable, value in zip(variables, (*before, *self._split(weights, keras_model.trainable)), strict=True):
            variable.assign(value)
        self._apply(self._split(gradient, keras_model.trainable))
        return [
            self._flatten([v.value for v in keras_model.trainable]),
            *(self._tf.identity(v.value) for v in keras_model.slots),
        ]

    def _whole_step(self, weights: Any, *rest: Any) -> Tensors:
        keras_model, values, batch = self._keras, rest[:-1], rest[-1]
        before = self._split(weights, keras_model.trainable)
        kept = [*keras_model.non_trainable, *keras_model.slots]
        for variable, value in zip((*keras_model.trainable, *kept), (*before, *values), strict=True):
            variable.value.assign(value)
        logs = self._train_step(batch)
        moved = self._flatten([v.value for v in keras_model.trainable]) - weights
        return [logs, moved, *(self._tf.identity(v.value) for v in kept)]
