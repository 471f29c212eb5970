"""One TensorFlow model that computes for many workers.

Every worker has a `VirtualReplica` with its own weights, statistics, random seeds and optimizer slots. They go into
the model's graphs with every call and come out again. A gradient is therefore a pure function, and threads can compute
the gradients of several workers at the same time with the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.learner.replica import Gradient, Images, Labels, Replica, _scaled, tensorflow
from dlion_mpi.vector.layout import Layout, Vector


def prepare_tensorflow(threads: int) -> None:
    """Import TensorFlow for ``threads`` calls at a time, each of one thread: its sums have then one order only."""
    tf = tensorflow()
    with contextlib.suppress(RuntimeError):  # this process has used TensorFlow before: its threads are what they are
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


CHUNK = 2000
"""Test samples at a time: here nobody computes beside it, so more than in `learner/evaluate.py`."""


class SharedReplica(Replica):
    """The model, and its graphs as functions of all that a worker has of its own."""

    def __init__(self, model: Any, optimizer: Any, input_dtype: npt.DTypeLike) -> None:
        super().__init__(model, optimizer, input_dtype)
        self._compile_shared(self._tf.as_dtype(np.dtype(input_dtype)))
        self.plain_rate = _plain_rate(optimizer, self._trainable)
        """The learning rate if the optimizer does no more than ``w - rate g``, else None."""

    def state(self, rank: int) -> list[Any]:
        """The model's non-trainable variables as tensors, its random seeds those of this rank."""
        values = [_of_rank(variable, rank) for variable in self.model.non_trainable_variables]
        return [self._tf.convert_to_tensor(value) for value in values]

    def slots(self) -> list[Any]:
        """The optimizer's variables as tensors."""
        return [self._tf.convert_to_tensor(v.value) for v in self._optimizer.variables]

    def gradient_of(self, weights: Vector, state: list[Any], x: Images, y: Labels) -> tuple[Gradient, list[Any]]:
        """Loss and gradient at ``weights`` over a batch, and the state after it. Threads may call it at once."""
        convert = self._tf.convert_to_tensor
        loss, vector, after = self._gradient_of(convert(weights), state, convert(x), convert(y))
        return Gradient(float(loss), np.asarray(vector)), after

    def applied(self, weights: Vector, slots: list[Any], gradient: Vector) -> tuple[Vector, list[Any]]:
        """Weights and slots after the optimizer got ``gradient``. For one thread only."""
        if self.plain_rate is not None:
            return weights - self.plain_rate * gradient, slots
        convert = self._tf.convert_to_tensor
        after, slots = self._applied(convert(weights), slots, convert(gradient))
        return np.array(after), slots

    def accuracy(self, knowledge: Vector, x: Images, y: Labels) -> float:
        """Share of the rows that a model with this knowledge classifies correctly. Threads may call it at once."""
        hits = sum(self.correct(knowledge, x[i : i + CHUNK], y[i : i + CHUNK]) for i in range(0, len(y), CHUNK))
        return hits / len(y)

    def split_knowledge(self, knowledge: Vector, state: Sequence[Any]) -> tuple[Vector, list[Any]]:
        """Knowledge as weights, and as the ``state`` with its statistics replaced."""
        places = {id(v): place for place, v in enumerate(self.model.non_trainable_variables)}
        state, start = list(state), self.layout.size
        for variable in self._statistics:
            stop = start + int(np.prod(variable.shape))
            part = knowledge[start:stop].reshape(variable.shape)
            state[places[id(variable)]] = self._tf.convert_to_tensor(part)
            start = stop
        return knowledge[: self.layout.size].copy(), state

    def join_knowledge(self, weights: Vector, state: Sequence[Any]) -> Vector:
        """The inverse of `split_knowledge`, a copy."""
        wanted = {id(v) for v in self._statistics}
        pairs = zip(self.model.non_trainable_variables, state, strict=True)
        return np.concatenate([weights, *(np.ravel(value) for v, value in pairs if id(v) in wanted)])

    def _compile_shared(self, input_dtype: Any) -> None:
        tf, model, trainable, optimizer = self._tf, self.model, self._trainable, self._optimizer
        vector = tf.TensorSpec((self.layout.size,), tf.float32)
        state = [tf.TensorSpec(v.shape, v.dtype) for v in model.non_trainable_variables]
        slots = [tf.TensorSpec(v.shape, v.dtype) for v in optimizer.variables]
        x = tf.TensorSpec((None, *model.input_shape[1:]), input_dtype)
        y = tf.TensorSpec((None,), tf.int32)
        sizes = [int(np.prod(v.shape)) for v in trainable]

        def split(flat: Any) -> list[Any]:
            parts = tf.split(flat, sizes)
            return [tf.reshape(part, v.shape) for part, v in zip(parts, trainable, strict=True)]

        @tf.function(input_signature=[vector, state, x, y])
        def gradient_of(weights: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
            with tf.GradientTape() as tape:
                tape.watch(weights)
                outputs, after, losses = model.stateless_call(
                    split(weights), state, _scaled(tf, x), training=True, return_losses=True
                )
                loss = self._loss(y, outputs)
                if losses:  # regularisation
                    loss += tf.add_n(losses)
            return loss, tape.gradient(loss, weights, unconnected_gradients="zero"), after

        @tf.function(input_signature=[vector, slots, vector])
        def applied(weights: Any, slots: Any, gradient: Any) -> tuple[Any, Any]:
            for variable, value in zip((*optimizer.variables, *trainable), (*slots, *split(weights)), strict=True):
                variable.assign(value)
            optimizer.apply(split(gradient), trainable)
            after = tf.concat([tf.reshape(v.value, (-1,)) for v in trainable], 0)
            return after, [tf.identity(v.value) for v in optimizer.variables]

        self._gradient_of, self._applied = gradient_of.get_concrete_function(), applied.get_concrete_function()


def _of_rank(variable: Any, rank: int) -> npt.NDArray[Any]:
    """The variable's value; a random generator's state (seed, counter) with a seed of this rank's own.

    Workers start from equal weights, but must not drop the same units.
    """
    value = np.array(variable.numpy())
    if "seed" in variable.path and value.shape == (2,) and value.dtype.kind in "iu":
        value[0] += rank
    return value


def _plain_rate(optimizer: Any, trainable: Sequence[Any]) -> np.float32 | None:
    """The learning rate of an optimizer that does no more than ``w - rate g``, else None."""
    config = optimizer.get_config()
    rate = config["learning_rate"]
    if type(optimizer).__name__ != "SGD" or not isinstance(rate, float | np.floating):
        return None
    plain = type(optimizer)(rate).get_config() | {"name": config["name"]}
    constrained = any(getattr(v, "constraint", None) is not None for v in trainable)
    return np.float32(rate) if config == plain and not constrained else None


class VirtualReplica:
    """What one worker has of its own at the shared model; a `loop.ports.Replica`."""

    def __init__(self, shared: SharedReplica, rank: int) -> None:
        self.layout: Layout = shared.layout
        self._shared = shared
        self._weights = shared.weights()
        self._state = shared.state(rank)
        self._slots = shared.slots()

    def gradient(self, x: Images, y: Labels) -> Gradient:
        """Loss and mean gradient over a batch; updates the statistics. May run in a thread, one per seat."""
        gradient, self._state = self._shared.gradient_of(self._weights, self._state, x, y)
        return gradient

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer an effective gradient, (P,) float32."""
        self._weights, self._slots = self._shared.applied(self._weights, self._slots, gradient)

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
