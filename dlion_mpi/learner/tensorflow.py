"""Keras's TensorFlow backend: graphs that are traced once, when they are made.

A graph takes batches of any size. Calling a concrete function skips the search for a fitting trace, half a
millisecond.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.backend import Tensors, light, quiet
from dlion_mpi.learner.keras_model import KerasModel
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


class _Graphs:
    """The parts that graphs are made of, and the graph that tests."""

    def __init__(self, keras_model: KerasModel) -> None:
        self._tf = tf = load()
        self._keras = keras_model
        self._batch = [
            tf.TensorSpec((None, *keras_model.model.input_shape[1:]), tf.as_dtype(keras_model.input_dtype)),
            tf.TensorSpec((None,), tf.int32),
        ]
        self._evaluate = self._evaluating()

    def evaluate(self, knowledge: Vector, x: Array, y: Array) -> int:
        """See `backend.Evaluating`."""
        return int(self._evaluate(*self._tensors(knowledge, x, y)))

    def _evaluating(self) -> Any:
        keras_model = self._keras
        weights = len(keras_model.trainable)

        @self._graph(self._vector(keras_model.knowledge_layout.size), *self._batch)
        def evaluate(knowledge: Any, x: Any, y: Any) -> Any:
            parts = self._split(knowledge, [*keras_model.trainable, *keras_model.statistics])
            state = keras_model.state(parts[weights:], [v.value for v in keras_model.others])
            outputs, _ = keras_model.model.stateless_call(parts[:weights], state, keras_model.inputs(x), training=False)
            return keras_model.hits(y, outputs)

        return evaluate.get_concrete_function()

    def _graph(self, *signature: Any) -> Any:
        """Decorate a function that a graph is made of. It runs as it is written, as in Keras's `fit`.

        AutoGraph would rewrite its `if` and `for`, and those of Keras and of the model, which takes a second.
        """
        return self._tf.function(input_signature=signature, autograph=False)

    def _tensors(self, *values: Any) -> Tensors:
        return [self._tf.convert_to_tensor(value) for value in values]

    def _vector(self, size: int) -> Any:
        return self._tf.TensorSpec((size,), self._tf.float32)

    def _flatten(self, tensors: Sequence[Any]) -> Any:
        """Tensors as one vector; inside a graph."""
        return self._tf.concat([self._tf.reshape(t, (-1,)) for t in tensors], 0)

    def _split(self, vector: Any, variables: Sequence[Any]) -> Tensors:
        """A vector as tensors of these variables' shapes; inside a graph."""
        parts = self._tf.split(vector, [int(np.prod(v.shape)) for v in variables])
        return [self._tf.reshape(p, v.shape) for p, v in zip(parts, variables, strict=True)]


class InPlace(_Graphs):
    """See `backend.InPlace`."""

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)
        self._compile_training()
        self._compile_copying()

    def gradient(self, x: Array, y: Array) -> Gradient:
        """See `backend.InPlace`."""
        loss, vector = self._gradient(*self._tensors(x, y))
        # The tensor's own memory, no copy: the array keeps the tensor alive.
        return Gradient(float(loss), np.asarray(vector))

    def step(self, x: Array, y: Array) -> tuple[float, bool]:
        """See `backend.InPlace`."""
        loss, finite = self._step(*self._tensors(x, y))
        return float(loss), bool(finite)

    def apply(self, gradient: Vector) -> None:
        """See `backend.InPlace`."""
        self._apply(*self._tensors(*self._keras.layout.split(gradient)))

    def read(self, *, statistics: bool) -> Vector:
        """See `backend.InPlace`."""
        return np.array(self._read[statistics]())

    def write(self, vector: Vector) -> None:
        """See `backend.InPlace`."""
        self._write[len(vector)](self._tf.convert_to_tensor(vector))

    def value(self, variable: Any) -> Array:
        """See `backend.InPlace`. No copy: TensorFlow writes to a copy while another reads the value."""
        return np.asarray(self._tf.convert_to_tensor(variable.value))

    def _compile_training(self) -> None:
        tf, keras_model, trainable = self._tf, self._keras, self._keras.trainable
        optimizer = keras_model.optimizer

        def loss_and_gradients(x: Any, y: Any) -> tuple[Any, Tensors]:
            with tf.GradientTape() as tape:
                outputs = keras_model.model(keras_model.inputs(x), training=True)
                loss = keras_model.loss(y, outputs, keras_model.model.losses)
            gradients = tape.gradient(loss, [v.value for v in trainable])
            return loss, [
                tf.zeros(v.shape) if g is None else tf.convert_to_tensor(g)
                for g, v in zip(gradients, trainable, strict=True)
            ]

        @self._graph(*self._batch)
        def gradient(x: Any, y: Any) -> tuple[Any, Any]:
            loss, gradients = loss_and_gradients(x, y)
            return loss, self._flatten(gradients)

        @self._graph(*self._batch)
        def step(x: Any, y: Any) -> tuple[Any, Any]:
            loss, gradients = loss_and_gradients(x, y)
            finite = tf.math.is_finite(loss + tf.linalg.global_norm(gradients))
            tf.cond(finite, lambda: optimizer.apply(gradients, trainable), lambda: None)
            return loss, finite

        @self._graph(*(tf.TensorSpec(v.shape, tf.float32) for v in trainable))
        def apply(*gradients: Any) -> None:
            optimizer.apply(list(gradients), trainable)

        self._gradient = gradient.get_concrete_function()
        self._step = step.get_concrete_function()
        self._apply = apply.get_concrete_function()

    def _compile_copying(self) -> None:
        """Weights, and weights with statistics, out of the variables and into them."""
        keras_model = self._keras
        knowledge = [*keras_model.trainable, *keras_model.statistics]

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

        self._read = {False: read_from(keras_model.trainable), True: read_from(knowledge)}
        self._write = {
            keras_model.layout.size: write_to(keras_model.trainable, keras_model.layout.size),
            keras_model.knowledge_layout.size: write_to(knowledge, keras_model.knowledge_layout.size),
        }


class Stateless(_Graphs):
    """See `backend.Stateless`."""

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)
        tf, model, trainable, optimizer = self._tf, keras_model.model, keras_model.trainable, keras_model.optimizer
        vector = self._vector(keras_model.layout.size)
        state = [tf.TensorSpec(v.shape, v.dtype) for v in keras_model.non_trainable]
        slots = [tf.TensorSpec(v.shape, v.dtype) for v in optimizer.variables]

        @self._graph(vector, state, *self._batch)
        def gradient(weights: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
            with tf.GradientTape() as tape:
                tape.watch(weights)
                outputs, after, losses = model.stateless_call(
                    self._split(weights, trainable), state, keras_model.inputs(x), training=True, return_losses=True
                )
                loss = keras_model.loss(y, outputs, losses)
            return loss, tape.gradient(loss, weights, unconnected_gradients="zero"), after

        @self._graph(vector, slots, vector)
        def update(weights: Any, slots: Any, gradient: Any) -> tuple[Any, Any]:
            values = (*slots, *self._split(weights, trainable))
            for variable, value in zip((*optimizer.variables, *trainable), values, strict=True):
                variable.assign(value)
            optimizer.apply(self._split(gradient, trainable), trainable)
            return self._flatten([v.value for v in trainable]), [tf.identity(v.value) for v in optimizer.variables]

        self._gradient, self._update = gradient.get_concrete_function(), update.get_concrete_function()

    def gradient(self, weights: Vector, state: Tensors, x: Array, y: Array) -> tuple[Gradient, Tensors]:
        """See `backend.Stateless`."""
        weights, x, y = self._tensors(weights, x, y)
        loss, vector, after = self._gradient(weights, self._tensors(*state), x, y)
        return Gradient(float(loss), np.asarray(vector)), after

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """See `backend.Stateless`."""
        weights, gradient = self._tensors(weights, gradient)
        after, slots = self._update(weights, self._tensors(*slots), gradient)
        return np.array(after), slots
