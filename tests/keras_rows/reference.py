"""Plain Keras: a copy of the model per rank, `train_on_batch`, and trainable weights averaged after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import optree

from dlion_mpi.learner.batches import Batch, Batches
from dlion_mpi.learner.given import shard_of_fit
from dlion_mpi.learner.keras_model import value_for_rank
from tests.keras_rows.row import TEST_ROWS, Data, Row

SEED = 7
BATCH_SIZE = 8


class Trained(NamedTuple):
    """The weights after the last step, and the logs of `evaluate` if there are validation data."""

    weights: list[Any]
    logs: dict[str, float]


def built(row: Row) -> Any:
    """The row's model, with the same initial weights every time."""
    keras.utils.set_random_seed(SEED)
    return row.build()


def drawn(row: Row, rank: int) -> list[Batch]:
    """The batches that a rank draws, in their order."""
    data = row.data(rank)
    batches = Batches(shard_of_fit(data.train, data.validation), seed=SEED, rank=rank)
    try:
        return [batches.take(BATCH_SIZE) for _ in range(row.steps)]
    finally:
        batches.close()


def trained(row: Row, batches: Sequence[Sequence[Batch]], data: Data) -> Trained:
    """Train a copy of the model on the batches of each rank. ``data``: of any rank, for its validation data."""
    copies = [built(row) for _ in batches]
    for rank, model in enumerate(copies):
        if keras.backend.backend() == "tensorflow":
            model.run_eagerly = True  # for these few steps, graphs of each copy take twice as long
        _build(model, batches[rank][0])
        for variable in model.non_trainable_variables:
            variable.assign(value_for_rank(variable, rank))
    for step in range(row.steps):
        for rank, model in enumerate(copies):
            batch = batches[rank][step]
            _clear_gradients(model)
            model.train_on_batch(*batch, class_weight=data.options.get("class_weight"))
        _average(copies, [model.trainable_variables for model in copies])
    for model in copies:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    _average(copies, [[*model.trainable_variables, *_statistics(model)] for model in copies])
    model = copies[0]
    logs = {} if data.validation is None else _evaluated(model, data.validation)
    return Trained([np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables], logs)


def _build(model: Any, batch: Batch) -> None:
    """Give the model its weights, as its first batch would; generators stay as they are."""
    before = [(v, keras.ops.convert_to_numpy(v)) for v in model.variables]
    if not model.trainable_variables:
        model(optree.tree_map(lambda array: array[:2], batch.x))
    for variable, value in before:
        variable.assign(value)
    # In a graph, ScheduleFreeAdamW would not get its first values.
    model.optimizer.build(model.trainable_variables)


def _clear_gradients(model: Any) -> None:
    """Do what Keras forgets on torch for one of two variables of one path: it would add to the gradient of before."""
    for variable in model.trainable_variables:
        if hasattr(variable.value, "grad"):
            variable.value.grad = None


def _statistics(model: Any) -> list[Any]:
    return [v for v in model.non_trainable_variables if "float" in v.dtype]


def _average(copies: Sequence[Any], variables: Sequence[Sequence[Any]]) -> None:
    """Give each variable the mean of its copies."""
    for same in zip(*variables, strict=True):
        mean = np.mean([keras.ops.convert_to_numpy(variable) for variable in same], 0)
        for variable in same:
            variable.assign(mean)


def _evaluated(model: Any, validation: Any) -> dict[str, float]:
    if isinstance(validation, tuple):
        x, y, weights = (*validation, None, None)[:3]
        logs = model.evaluate(x, y, sample_weight=weights, batch_size=TEST_ROWS, verbose=0, return_dict=True)
    else:
        logs = model.evaluate(validation, verbose=0, return_dict=True)
    return {name: float(value) for name, value in logs.items()}
