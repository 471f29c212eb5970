"""Keras's JAX backend: pure functions, compiled once for each size of batch.

Compiling takes about a second, so batches are padded to a few sizes, and padding has no weight in the loss. Where rows
of a batch influence each other (batch normalisation, losses on activations) batches stay as they are, and each new
size is compiled.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlion_mpi.learner.backend import Tensors
from dlion_mpi.learner.keras_model import KerasModel
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


def padded_size(size: int) -> int:
    """The smallest power of two, or three quarters of one, that is at least ``size``."""
    whole = 1 << (size - 1).bit_length()
    return whole * 3 // 4 if whole >= 4 and size <= whole * 3 // 4 else whole


class _Functions:
    """Functions of values, and the one that tests."""

    def __init__(self, keras_model: KerasModel) -> None:
        import jax

        self._jax, self._keras = jax, keras_model
        self._pads = not keras_model.statistics and not self._has_losses_on_activations()
        self._compiling = threading.Lock()
        self._compiled: set[tuple[Any, int]] = set()
        self._hits_of = jax.jit(self._hits)

    def evaluate(self, knowledge: Vector, x: Array, y: Array) -> int:
        """See `backend.Evaluating`."""
        return int(self._call(self._hits_of, knowledge, _values(self._keras.others), *_padded(x, y)))

    def _has_losses_on_activations(self) -> bool:
        """Whether the model adds losses other than the regularisation of its weights."""
        model, trainable = self._keras.model, self._keras.trainable
        row = np.zeros((1, *model.input_shape[1:]), np.float32)
        losses = self._jax.eval_shape(
            lambda *values: model.stateless_call(*values, row, training=True, return_losses=True)[2],
            _values(trainable),
            _values(self._keras.non_trainable),
        )
        return len(losses) > sum(getattr(variable, "regularizer", None) is not None for variable in trainable)

    def _batch(self, x: Array, y: Array) -> tuple[Any, Any, Any]:
        return _padded(x, y) if self._pads else (x, y, None)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a compiled function of a batch. Layers keep notes while Keras is traced: one thread at a time."""
        key = (function, len(arguments[-2]))
        with contextlib.nullcontext() if key in self._compiled else self._compiling:
            result = function(*arguments)
            self._compiled.add(key)
        return result

    def _hits(self, knowledge: Any, others: Tensors, x: Any, y: Any, rows: Any) -> Any:
        keras_model, weights = self._keras, len(self._keras.trainable)
        parts = keras_model.knowledge_layout.split(knowledge)
        state = keras_model.state(parts[weights:], others)
        outputs, _ = keras_model.model.stateless_call(parts[:weights], state, keras_model.inputs(x), training=False)
        return keras_model.hits(y, outputs, rows)

    def _loss(self, values: Tensors, state: Tensors, x: Any, y: Any, rows: Any) -> tuple[Any, Tensors]:
        """Loss and the state after it."""
        outputs, after, losses = self._keras.model.stateless_call(
            values, state, self._keras.inputs(x), training=True, return_losses=True
        )
        return self._keras.loss(y, outputs, losses, rows), after

    def _loss_and_gradients(self, *arguments: Any) -> tuple[Any, Tensors, Tensors]:
        """Loss, gradients and the state after them."""
        (loss, after), gradients = self._jax.value_and_grad(self._loss, has_aux=True)(*arguments)
        return loss, gradients, after

    def _update(self, values: Tensors, slots: Tensors, gradient: Any) -> tuple[Tensors, Tensors]:
        """Values and slots after the optimizer got a flat gradient."""
        gradients = self._keras.layout.split(gradient)
        values, slots = self._keras.optimizer.stateless_apply(slots, gradients, values)
        return values, slots

    def _flat(self, values: Sequence[Any]) -> Any:
        return self._jax.numpy.concatenate([value.ravel() for value in values])


class InPlace(_Functions):
    """See `backend.InPlace`. The variables are read before a call and written after it."""

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)
        jax = self._jax

        def gradient(*arguments: Any) -> tuple[Any, Any, Tensors]:
            loss, gradients, after = self._loss_and_gradients(*arguments)
            return loss, self._flat(gradients), after

        def step(slots: Tensors, *arguments: Any) -> tuple[Any, Any, Tensors, Tensors, Tensors]:
            loss, gradients, after = self._loss_and_gradients(*arguments)
            vector = self._flat(gradients)
            finite = jax.numpy.isfinite(loss) & jax.numpy.isfinite(vector).all()
            before = arguments[0], slots
            values, slots = jax.lax.cond(finite, lambda: self._update(*before, vector), lambda: before)
            return loss, finite, values, slots, after

        self._gradient, self._step, self._apply = jax.jit(gradient), jax.jit(step), jax.jit(self._update)
        self._read = jax.jit(self._flat)

    def gradient(self, x: Array, y: Array) -> Gradient:
        """See `backend.InPlace`."""
        loss, vector, after = self._call(self._gradient, *self._inputs(), *self._batch(x, y))
        _assign(self._keras.non_trainable, after)
        return Gradient(float(loss), np.asarray(vector))

    def step(self, x: Array, y: Array) -> tuple[float, bool]:
        """See `backend.InPlace`."""
        slots = _values(self._keras.optimizer.variables)
        results = self._call(self._step, slots, *self._inputs(), *self._batch(x, y))
        loss, finite, values, slots, after = results
        _assign(self._keras.trainable, values)
        _assign(self._keras.optimizer.variables, slots)
        _assign(self._keras.non_trainable, after)
        return float(loss), bool(finite)

    def apply(self, gradient: Vector) -> None:
        """See `backend.InPlace`."""
        keras_model = self._keras
        slots = _values(keras_model.optimizer.variables)
        values, slots = self._apply(_values(keras_model.trainable), slots, gradient)
        self._jax.block_until_ready(values)  # it may still read the gradient, which belongs to the caller
        _assign(keras_model.trainable, values)
        _assign(keras_model.optimizer.variables, slots)

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

    def _inputs(self) -> tuple[Tensors, Tensors]:
        return _values(self._keras.trainable), _values(self._keras.non_trainable)


class Stateless(_Functions):
    """See `backend.Stateless`."""

    def __init__(self, keras_model: KerasModel) -> None:
        super().__init__(keras_model)
        split = keras_model.layout.split

        def gradient(weights: Any, *arguments: Any) -> tuple[Any, Any, Tensors]:
            loss, gradients, after = self._loss_and_gradients(split(weights), *arguments)
            return loss, self._flat(gradients), after

        def update(weights: Any, slots: Tensors, gradient: Any) -> tuple[Any, Tensors]:
            values, slots = self._update(split(weights), slots, gradient)
            return self._flat(values), slots

        self._gradient, self._update_of = self._jax.jit(gradient), self._jax.jit(update)

    def gradient(self, weights: Vector, state: Tensors, x: Array, y: Array) -> tuple[Gradient, Tensors]:
        """See `backend.Stateless`."""
        loss, vector, after = self._call(self._gradient, weights, state, *self._batch(x, y))
        return Gradient(float(loss), np.asarray(vector)), after

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """See `backend.Stateless`."""
        after, slots = self._update_of(weights, slots, gradient)
        return np.array(after), slots


def _padded(x: Array, y: Array) -> tuple[Any, Any, Any]:
    """The batch with rows of zeros up to a padded size, and the number of its real rows."""
    more = padded_size(len(y)) - len(y)
    if more:
        x, y = (np.concatenate([part, np.zeros((more, *part.shape[1:]), part.dtype)]) for part in (x, y))
    return x, y, np.int32(len(y) - more)


def _values(variables: Sequence[Any]) -> Tensors:
    return [variable.value for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
