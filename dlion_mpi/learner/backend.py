"""Keras's backends: what one must do, and which one this process has.

A backend is one file of this folder with Keras's name for it. The file has `start`, and the classes `InPlace` and
`Stateless` that follow the protocols here.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.keras_model import KerasModel
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from dlion_mpi.vector.named_arrays import Array

EXTRAS_OF_KERAS = ("matplotlib", "pandas", "sklearn")
Tensors = list[Any]
"""Values of variables, as the backend's tensors or as NumPy arrays."""
Logs = dict[str, float]
"""Metrics by Keras's names."""


class Evaluating(Protocol):
    """Tests the model on knowledge that the caller has."""

    def evaluate(self, knowledge: Vector, batches: Iterable[Batch]) -> Logs:
        """The metrics of Keras's ``test_step`` over batches, for a model with this knowledge, (K,) float32.

        The model's variables stay as they are. Threads may call this while another trains.
        """

    def names(self, knowledge: Vector, batch: Batch) -> tuple[str, ...]:
        """The names of what `evaluate` gives for batches like this one."""


class InPlace(Evaluating, Protocol):
    """Trains the model's own variables: one worker."""

    def trace(self, kind: str) -> None:
        """Compile what computes "movements", "gradients" or a step "alone", with the example batch.

        An error of the model, or of data that do not fit it, comes here and not in the first step.
        """

    def movement(self, batch: Batch) -> Gradient:
        """Loss, and what Keras's ``train_step`` does to the weights, which stay as they are.

        Optimizer, statistics and generators are as after the step.
        """

    def step(self, batch: Batch) -> Gradient:
        """Keras's ``train_step``, as a plain training loop does it. The vector is empty."""

    def gradient(self, batch: Batch) -> Gradient:
        """Loss and mean gradient over a batch. Updates the statistics, not the weights."""

    def apply(self, gradient: Vector) -> None:
        """Give the optimizer a gradient, (P,) float32."""

    def move(self, movement: Vector) -> None:
        """Add a movement to the weights, (P,) float32; constrained variables are then put right."""

    def read(self, *, statistics: bool) -> Vector:
        """A copy of the weights, (P,) float32, or with the ``statistics`` of the knowledge, (K,)."""

    def write(self, vector: Vector) -> None:
        """Replace the weights, (P,) float32, or the whole knowledge, (K,)."""

    def value(self, variable: Any) -> Array:
        """A variable's value in an array that training does not change."""


class Stateless(Evaluating, Protocol):
    """The same as functions of values that the caller keeps: many workers that share one model.

    ``state``: of all non-trainable variables; ``slots``: of the optimizers' variables. Threads may call these at once.
    """

    def movement(
        self, weights: Vector, state: Tensors, slots: Tensors, batch: Batch
    ) -> tuple[Gradient, Tensors, Tensors]:
        """Loss and movement at ``weights``, with the state and the slots after the step."""

    def gradient(self, weights: Vector, state: Tensors, batch: Batch) -> tuple[Gradient, Tensors]:
        """Loss and gradient at ``weights`` over a batch, and the state after it."""

    def update(self, weights: Vector, slots: Tensors, gradient: Vector) -> tuple[Vector, Tensors]:
        """Weights and slots after the optimizer got ``gradient``."""


def with_values(variables: Sequence[Any], values: Sequence[Any]) -> Any:
    """A scope in which these variables have other values. It keeps what is assigned to variables."""
    import keras

    return keras.StatelessScope(list(zip(variables, values, strict=True)), collect_losses=True)


def values_after(scope: Any, variables: Sequence[Any], values: Sequence[Any]) -> Tensors:
    """The values of these variables after a scope in which they began with ``values``."""
    found = [scope.get_current_value(variable) for variable in variables]
    return [value if new is None else new for new, value in zip(found, values, strict=True)]


def as_logs(returned: Any) -> dict[str, Any]:
    """The logs that a step has returned, by name."""
    logs = returned if isinstance(returned, dict) else {"loss": returned}
    return {name: value for name, value in logs.items() if value is not None}


def training_loss_of(logs: Mapping[str, float]) -> float:
    """The loss among what a ``train_step`` returns: ``loss``, or the sum of all that are called a loss."""
    if "loss" in logs:
        return logs["loss"]
    losses = [value for name, value in logs.items() if "loss" in name]
    return sum(losses) if losses else math.nan


def summed_logs(logs: Sequence[tuple[int, Mapping[str, float]]]) -> Logs:
    """The mean by rows of what a ``test_step`` returned for batches: (rows, logs) of each."""
    rows = sum(count for count, _ in logs)
    names = logs[0][1] if logs else ()
    return {name: sum(count * values[name] for count, values in logs) / rows for name in names}


def start(threads: int = 0, *, concurrent: int | None = None, local_rank: int = 0) -> None:
    """Import Keras and its backend, quietly, for this rank.

    ``threads``: CPU threads of one operation (0: the backend's default). ``concurrent``: operations at the same time
    (default: as many as ``threads``). ``local_rank``: the rank takes this GPU, modulo the GPUs of its node, and lets
    its memory grow, so that ranks can share one. What a program has already started stays as it is. Raises UserError.
    """
    _module().start(threads, threads if concurrent is None else concurrent, local_rank)


def in_place(model: KerasModel, *, guarded: bool = False) -> InPlace:
    """Functions that train the variables of ``model``.

    ``guarded``: a movement that is not finite leaves everything as it was.
    """
    made: InPlace = _module().InPlace(model, guarded=guarded)
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
            "GPUs; with KERAS_BACKEND=jax or torch, pip install that"
        ) from None
    name = f"dlion_mpi.learner.{keras.backend.backend()}"
    if find_spec(name) is None:
        raise UserError(f"Keras's backend is {keras.backend.backend()}: set KERAS_BACKEND to tensorflow, jax or torch")
    return importlib.import_module(name)


@contextlib.contextmanager
def light() -> Iterator[None]:
    """Import Keras without the packages that it would import only because they are installed.

    They serve its plots and its wrappers for scikit-learn. Without them a rank starts in two thirds of the time and
    takes 100 MB less. The garbage collector is off meanwhile, and later leaves out what the first import has made:
    a million objects that stay. To go through them again and again takes a quarter of a start.
    """
    is_first = "keras" not in sys.modules
    collects = gc.isenabled()
    gc.disable()
    absent = [name for name in EXTRAS_OF_KERAS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: an import raises ImportError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        if is_first:
            gc.freeze()
        if collects:
            gc.enable()


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
