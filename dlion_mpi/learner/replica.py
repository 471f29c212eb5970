"""The model on one rank: gradients out as one flat vector, effective gradients in through the Keras optimizer.

Besides `learner/data.py`, the only module that imports TensorFlow, and it does so on first use.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.errors import UserError
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, array

Images = npt.NDArray[Any]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Gradient:
    """The mean loss of a batch and its gradient, (P,) float32, read-only, valid while this object lives."""

    loss: float
    vector: Vector

    @property
    def finite(self) -> bool:
        """Whether the loss and every entry are finite numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.vector.max()) and math.isfinite(self.vector.min())


def tensorflow(threads: int = 0, local_rank: int = 0) -> Any:
    """Import TensorFlow, quietly, for this rank: ``threads`` CPU threads (0: as set before), one local GPU.

    A rank takes the GPU ``local_rank`` modulo the GPUs of its node, and lets its memory grow, so that several
    ranks can share one.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _start_up_notes_dropped():
            import tensorflow as tf
    except ImportError:
        raise UserError(
            "TensorFlow is not installed: pip install tensorflow-cpu, or 'tensorflow[and-cuda]' where there are GPUs"
        ) from None
    # A caller that brings its own model has initialised TensorFlow already, as it wants it.
    with contextlib.suppress(RuntimeError):
        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            mine = gpus[local_rank % len(gpus)]
            tf.config.set_visible_devices(mine, "GPU")
            tf.config.experimental.set_memory_growth(mine, True)
    return tf


@contextlib.contextmanager
def _start_up_notes_dropped() -> Iterator[None]:
    """TensorFlow writes notes to stderr before its log level counts: four lines from every rank."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Replica:
    """One worker's copy of the model.

    *Weights* are the trainable variables, (P,) float32. *Knowledge* is the weights followed by the float
    non-trainable variables such as batch-norm statistics, (K,) float32: those are updated by the local batches
    alone, and travel with knowledge transfer and with evaluation. Integer state (dropout's generators) stays.
    """

    def __init__(self, model: Any, optimizer: Any, input_dtype: npt.DTypeLike, rank: int = 0) -> None:
        import keras
        import tensorflow as tf

        self._tf = tf
        self.model = model
        self._optimizer = optimizer
        self._trainable = list(model.trainable_variables)
        if not self._trainable:
            raise UserError("the model has no trainable variables: there is nothing to train")
        if any(v.dtype != "float32" for v in self._trainable):
            raise UserError("the model has trainable variables that are not float32: build it with float32 weights")
        self._statistics = [v for v in model.non_trainable_variables if "float" in v.dtype]
        self._others = [v for v in model.non_trainable_variables if "float" not in v.dtype]
        for variable in self._others:
            if "seed" in variable.path and variable.dtype == "uint32":
                # Ranks start from equal weights, but must not drop the same units.
                variable.assign(variable.numpy() + np.array([0, rank], dtype=np.uint32))
        optimizer.build(self._trainable)
        self.layout = Layout.of([v.shape for v in self._trainable])
        starts = self.layout.starts
        self._parts = list(zip(starts, starts[1:], self.layout.shapes, strict=False))
        self._knowledge_layout = Layout.of([v.shape for v in (*self._trainable, *self._statistics)])
        self._loss = _loss_function(keras, model)
        self._compile(tf.as_dtype(np.dtype(input_dtype)))

    @property
    def knowledge_size(self) -> int:
        """Entries of the knowledge vector (K)."""
        return self._knowledge_layout.size

    def gradient(self, x: Images, y: Labels) -> Gradient:
        """Loss and mean gradient over a batch; updates batch-norm statistics, not the weights."""
        loss, vector = self._gradient(*self._batch(x, y))
        # The tensor's own memory, no copy: the array keeps the tensor alive.
        return Gradient(float(loss), np.asarray(vector))

    def step_alone(self, x: Images, y: Labels) -> tuple[float, bool]:
        """Gradient and update in one graph, for a worker without peers: what a plain training loop does.

        An update whose loss or gradient is not finite is left out. Returns the loss and whether both are.
        """
        loss, finite = self._step_alone(*self._batch(x, y))
        return float(loss), bool(finite)

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer an effective gradient, (P,) float32."""
        parts = (gradient[a:b].reshape(shape) for a, b, shape in self._parts)
        self._apply(*(self._tf.convert_to_tensor(part) for part in parts))

    def weights(self) -> Vector:
        """A copy of the weights, (P,) float32."""
        return np.array(self._read[False]())

    def set_weights(self, weights: Vector) -> None:
        """Replace the weights, (P,) float32."""
        self._assign(self._tf.convert_to_tensor(weights))

    def knowledge(self) -> Vector:
        """A copy of weights and statistics, (K,) float32."""
        return np.array(self._read[True]())

    def set_knowledge(self, knowledge: Vector) -> None:
        """Replace weights and statistics, (K,) float32. Optimizer slots stay as they are."""
        self._assign_all(self._tf.convert_to_tensor(knowledge))

    def variables(self) -> str:
        """The shapes of all that the model has: what tells one model from another."""
        shapes = [list(v.shape) for v in (*self._trainable, *self._statistics, *self._others)]
        return f"{shapes}, {type(self._optimizer).__name__}"

    def to_arrays(self) -> Arrays:
        """Weights, statistics, integer state such as dropout's generators, and the optimizer's variables, by name.

        No copies, and yet nothing of it will change: TensorFlow copies what somebody still reads before it writes.
        """
        return {name: self._numbers(variable) for name, variable in self._kept().items()}

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Take back what `to_arrays` gave, but for the learning rate. Raises StateError, and then changes nothing."""
        kept = self._kept()
        found = {name: array(arrays, name, self._numbers(v).dtype, *v.shape) for name, v in kept.items()}
        for name, variable in kept.items():
            if not variable.path.endswith("learning_rate"):
                variable.assign(found[name].astype(variable.dtype))

    def _kept(self) -> dict[str, Any]:
        groups = {
            "weights": self._trainable,
            "statistics": self._statistics,
            "others": self._others,
            "optimizer": self._optimizer.variables,
        }
        return {f"{group}/{k}": v for group, variables in groups.items() for k, v in enumerate(variables)}

    def _numbers(self, variable: Any) -> Array:
        """A variable's value; truth values as bytes."""
        value = np.asarray(self._tf.convert_to_tensor(variable.value))
        return value.astype(np.uint8) if value.dtype == np.bool_ else value

    def correct(self, knowledge: Vector, x: Images, y: Labels) -> int:
        """How many of the rows a model with this knowledge classifies correctly; the replica is not touched."""
        return int(self._correct(self._tf.convert_to_tensor(knowledge), *self._batch(x, y)))

    def _batch(self, x: Images, y: Labels) -> tuple[Any, Any]:
        return self._tf.convert_to_tensor(x), self._tf.convert_to_tensor(y)

    def _compile(self, input_dtype: Any) -> None:
        """The graphs that training and testing call, traced once, here.

        Calling a concrete function skips the search for a fitting trace, half a millisecond.
        """
        batch = [
            self._tf.TensorSpec((None, *self.model.input_shape[1:]), input_dtype),
            self._tf.TensorSpec((None,), self._tf.int32),
        ]
        self._compile_training(batch)
        self._compile_copying()
        self._compile_testing(batch)

    def _compile_training(self, batch: Sequence[Any]) -> None:
        tf, model, trainable = self._tf, self.model, self._trainable

        def loss_and_gradients(x: Any, y: Any) -> tuple[Any, list[Any]]:
            with tf.GradientTape() as tape:
                loss = self._loss(y, model(_scaled(tf, x), training=True))
                if model.losses:  # regularisation
                    loss += tf.add_n(model.losses)
            gradients = tape.gradient(loss, [v.value for v in trainable])
            return loss, [
                tf.zeros(v.shape) if g is None else tf.convert_to_tensor(g)
                for g, v in zip(gradients, trainable, strict=True)
            ]

        @tf.function(input_signature=batch)
        def gradient(x: Any, y: Any) -> tuple[Any, Any]:
            loss, gradients = loss_and_gradients(x, y)
            return loss, self._flatten(gradients)

        @tf.function(input_signature=batch)
        def step_alone(x: Any, y: Any) -> tuple[Any, Any]:
            loss, gradients = loss_and_gradients(x, y)
            finite = tf.math.is_finite(loss + tf.linalg.global_norm(gradients))
            if finite:
                self._optimizer.apply(gradients, trainable)
            return loss, finite

        @tf.function(input_signature=[tf.TensorSpec(v.shape, tf.float32) for v in trainable])
        def apply(*gradients: Any) -> None:
            self._optimizer.apply(list(gradients), trainable)

        self._gradient = gradient.get_concrete_function()
        self._step_alone = step_alone.get_concrete_function()
        self._apply = apply.get_concrete_function()

    def _compile_copying(self) -> None:
        """Weights, and weights with statistics, out of the variables and into them."""
        tf, trainable = self._tf, self._trainable
        every = [*trainable, *self._statistics]

        @tf.function
        def read(everything: bool) -> Any:
            return self._flatten([v.value for v in (every if everything else trainable)])

        def assign_to(variables: Sequence[Any], size: int) -> Any:
            @tf.function(input_signature=[tf.TensorSpec((size,), tf.float32)])
            def assign(vector: Any) -> None:
                for variable, part in zip(variables, self._split(vector, variables), strict=True):
                    variable.assign(part)

            return assign.get_concrete_function()

        self._read = {everything: read.get_concrete_function(everything) for everything in (False, True)}
        self._assign = assign_to(trainable, self.layout.size)
        self._assign_all = assign_to(every, self.knowledge_size)

    def _compile_testing(self, batch: Sequence[Any]) -> None:
        tf, model = self._tf, self.model
        every = [*self._trainable, *self._statistics]

        @tf.function(input_signature=[tf.TensorSpec((self.knowledge_size,), tf.float32), *batch])
        def correct(vector: Any, x: Any, y: Any) -> Any:
            state = dict(zip((v.path for v in every), self._split(vector, every), strict=True))
            state |= {v.path: v.value for v in self._others}
            outputs, _ = model.stateless_call(
                [state[v.path] for v in model.trainable_variables],
                [state[v.path] for v in model.non_trainable_variables],
                _scaled(tf, x),
                training=False,
            )
            hits = tf.equal(tf.argmax(outputs, 1, output_type=tf.int32), y)
            return tf.reduce_sum(tf.cast(hits, tf.int32))

        self._correct = correct.get_concrete_function()

    def _flatten(self, tensors: Sequence[Any]) -> Any:
        """Tensors as one vector; inside a graph."""
        return self._tf.concat([self._tf.reshape(t, (-1,)) for t in tensors], 0)

    def _split(self, vector: Any, variables: Sequence[Any]) -> list[Any]:
        """A vector as tensors of these variables' shapes; inside a graph."""
        parts = self._tf.split(vector, [int(np.prod(v.shape)) for v in variables])
        return [self._tf.reshape(p, v.shape) for p, v in zip(parts, variables, strict=True)]


def _scaled(tf: Any, x: Any) -> Any:
    """Bytes as float32 in [0, 1]; float data as it is."""
    return tf.cast(x, tf.float32) / 255.0 if x.dtype == tf.uint8 else x


def _loss_function(keras: Any, model: Any) -> Any:
    """The model's own loss if it was compiled with one, else cross-entropy over its logits or softmax."""
    if getattr(model, "compiled", False) and model.loss is not None:
        loss = keras.losses.get(model.loss)
        return loss if isinstance(loss, keras.losses.Loss) else lambda y, p: loss(y, p).mean()
    last = model.layers[-1] if model.layers else None
    activation = getattr(last, "activation", None)
    is_softmax = isinstance(last, keras.layers.Softmax) or activation is keras.activations.softmax
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not is_softmax)
