"""Keras's backends: what one must do, and which one this process has.

A backend is one file of this folder with Keras's name for it. The file has `start`, and the classes `InPlace` and
`Stateless` that follow the protocols here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Protocol

from dlion_mpi.errors import UserError
from dlion_mpi.learner.keras_model import KerasModel
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array

EXTRAS_OF_KERAS = ("matplotlib", "pandas", "sklearn")
Tensors = list[Any]
"""Values of variables, as the backend's tensors or as NumPy arrays."""


class Evaluating(Protocol):
    """Tests the model on knowledge that the caller has."""

    def evaluate(self, knowledge: Vector, x: Array, y: Array) -> int:
        """Count the rows that a model with this knowledge, (K,) float32, classifies correctly.

        The model's variables stay as they are. Threads may call this while another trains.
        """


class InPlace(Evaluating, Protocol):
    """Trains the model's own variables: one worker."""

    def gradient(self, x: Array, y: Array) -> Gradient:
        """Loss and mean gradient over a batch. Updates the statistics, not the weights."""

    def step(self, x: Array, y: Array) -> tuple[float, bool]:
        """Gradient and update in one, as a plain training loop does it.

        An update whose loss or gradient is not finite is left out. Returns the loss and whether both are finite.
        """

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer a gradient, (P,) float32."""

    def read(self, *, statistics: bool) -> Vector:
        """A copy of the weights, (P,) float32, or with the ``statistics`` of the knowledge, (K,)."""

    def write(self, vector: Vector) -> None:
        """Replace the weights, (P,) float32, or the whole knowledge, (K,)."""

    def value(self, variable: Any) -> Array:
        """A variable's value in an array that training does not change."""


class Stateless(Evaluating, Protocol):
    """The same as functions of values that the caller keeps: many workers that share one model.

    ``state``: of all non-trainable variables; ``slots``: of the optimizer's variables.
    """

    def gradient(self, weights: Vector, state: Tensors, x: Array, y: Array) -> tuple[Gradient, Tensors]:
        """Loss and gradient at ``weights`` over a batch, and the state after it. Threads may call this at once."""

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """Weights and slots after the optimizer got ``gradient``. For one thread only."""


def start(threads: int = 0, *, concurrent: int | None = None, local_rank: int = 0) -> None:
    """Import Keras and its backend, quietly, for this rank.

    ``threads``: CPU threads of one operation (0: the backend's default). ``concurrent``: operations at the same time
    (default: as many as ``threads``). ``local_rank``: the rank takes this GPU, modulo the GPUs of its node, and lets
    its memory grow, so that ranks can share one. What a program has already started stays as it is. Raises UserError.
    """
    _module().start(threads, threads if concurrent is None else concurrent, local_rank)


def in_place(model: KerasModel) -> InPlace:
    """Graphs that train the variables of ``model``."""
    made: InPlace = _module().InPlace(model)
    return made


def stateless(model: KerasModel) -> Stateless:
    """Functions of what workers that share ``model`` keep."""
    made: Stateless = _module().Stateless(model)
    return made


def _module() -> Any:
    """The file of Keras's backend. Raises UserError."""
    try:
        with quiet(), light():
            import keras
    except ImportError as error:
        raise UserError(
            f"Keras does not start ({error}): pip install tensorflow-cpu, or 'tensorflow[and-cuda]' where there are "
            "GPUs; with KERAS_BACKEND=jax, pip install jax"
        ) from None
    name = f"dlion_mpi.learner.{keras.backend.backend()}"
    if find_spec(name) is None:
        raise UserError(f"Keras's backend is {keras.backend.backend()}: set KERAS_BACKEND to tensorflow or jax")
    return importlib.import_module(name)


@contextlib.contextmanager
def light() -> Iterator[None]:
    """Import Keras without the packages that it would import only because they are installed.

    They serve its plots and its wrappers for scikit-learn. Without them a rank starts in two thirds of the time and
    takes 100 MB less.
    """
    absent = [name for name in EXTRAS_OF_KERAS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: an import raises ImportError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what a library writes to stderr while it is imported: TensorFlow has four lines from every rank."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
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
