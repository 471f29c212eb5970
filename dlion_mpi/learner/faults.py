"""Faults of a batch: labels beyond the outputs of a model, numbers that are not finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlion_mpi.errors import DataError, UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.compiled import of_labels, outputs_of
from dlion_mpi.learner.keras_model import KerasModel
from dlion_mpi.learner.source import check_finite


@dataclass(frozen=True)
class Labels:
    """The labels of a model with ``outputs`` for each, and one more that its loss ignores."""

    outputs: int
    ignored: int | None

    def check(self, batch: Batch, where: str) -> None:
        """Raise DataError for a label that is beyond the outputs."""
        if not isinstance(batch.y, np.ndarray):
            return
        wrong = (batch.y < 0) | (batch.y >= self.outputs)
        if self.ignored is not None:
            wrong &= batch.y != self.ignored
        if wrong.any():
            raise DataError(
                f"{where} has the label {batch.y[wrong][0]}, but the model has outputs for 0 to {self.outputs - 1}: "
                "correct the label, or give the last layer more units"
            )


def labels_of(keras_model: KerasModel) -> Labels | None:
    """The labels of a classifier; None for another model, or one that computes its loss itself."""
    import keras

    model = keras_model.model
    loss = of_labels(getattr(model, "loss", None))
    own = keras_model.own_step or type(model).compute_loss is not keras.Model.compute_loss
    if loss is None or own or getattr(loss, "axis", -1) != -1:
        return None
    outputs = outputs_of(model, keras_model.example.x)
    return Labels(outputs.shape[-1], loss.ignore_class) if hasattr(outputs, "shape") else None


def check_numbers(batch: Batch, where: str) -> None:
    """Raise DataError for a float of the batch that is not finite."""
    try:
        for place, array in batch.named().items():
            check_finite(array, where, place)
    except UserError as error:
        raise DataError(str(error)) from None
