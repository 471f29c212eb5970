"""Batches padded to a few sizes, for a backend that compiles for every size; only where padding changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree

from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.keras_model import KerasModel

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")
MIXING_LAYERS = ("BatchNormalization", "CutMix", "Lambda", "Masking", "MixUp")
"""Layers that let rows of a batch change each other, or hide parts of rows from the loss."""
MIXING_LOSSES = ("Circle", "Dice", "Tversky")
ELEMENTWISE = ("Add", "Divide", "Multiply", "Subtract", "TrueDivide")


def padded_size(size: int) -> int:
    """The smallest power of two, or three quarters of one, that is at least ``size``."""
    whole = 1 << (size - 1).bit_length()
    return whole * 3 // 4 if whole >= 4 and size <= whole * 3 // 4 else whole


class Padding:
    """Pads the batches of a model. Padding repeats the first row, and has no weight in loss and metrics.

    ``is_sum``: the loss is summed over rows, instead of being their mean.
    """

    def __init__(self, keras_model: KerasModel, *, is_sum: bool) -> None:
        self._keras, self._is_sum = keras_model, is_sum

    def padded(self, batch: Batch) -> tuple[Batch, Any]:
        """The batch with more rows, and the number of its real rows."""
        rows = batch.rows
        more = padded_size(rows) - rows
        if more:
            batch = batch.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[:1], more, 0)]))
        return batch, np.int32(rows)

    def weights(self, batch: Batch, rows: Any) -> Any:
        """Sample weights of a padded batch, with which its loss is that of the first ``rows``."""
        from keras import ops

        size = optree.tree_leaves(batch.x)[0].shape[0]
        real = self._real(size, rows)
        if not self._is_sum:
            real = real * (size / ops.cast(rows, "float32"))
        if batch.sample_weight is None:
            return real
        return optree.tree_map(lambda w: w * ops.reshape(real, (size, *[1] * (len(w.shape) - 1))), batch.sample_weight)

    def metrics(self, batch: Batch, outputs: Any, rows: Any) -> dict[str, Any]:
        """The compiled metrics of the first ``rows``."""
        import keras

        model = self._keras.model
        found = model._compile_metrics
        if found is None:
            return {}
        with keras.StatelessScope():
            found.reset_state()
            targets, guesses = found._flatten_y(batch.y), found._flatten_y(outputs)
            real = self._real(guesses[0].shape[0], rows)
            for metric, target, guess in zip(found._flat_metrics, targets, guesses, strict=True):
                if metric is not None:
                    metric.update_state(target, guess, sample_weight=real)
            logs: dict[str, Any] = found.result()
        return logs

    def _real(self, size: int, rows: Any) -> Any:
        """1 for real rows, 0 for padding."""
        from keras import ops

        return ops.cast(ops.arange(size) < rows, "float32")


def padding_of(keras_model: KerasModel) -> Padding | None:
    """The padding of this model, if its rows are independent of each other, and its loss knows weights of rows."""
    model = keras_model.model
    reductions = _reductions(model)
    if not _steps_as_keras(model) or not _rows_are_independent(model) or not _metrics_know_weights(model):
        return None
    if not reductions or keras_model.statistics or keras_model.example.y is None:
        return None
    if any(len(output.shape) > 2 for output in model.outputs):  # such as a loss per token: it has no weight per row
        return None
    if reductions <= set(MEANS):
        return Padding(keras_model, is_sum=False)
    return Padding(keras_model, is_sum=True) if reductions == {"sum"} else None


def _steps_as_keras(model: Any) -> bool:
    """Whether nothing of the training step is the model's own."""
    import keras

    own = ("train_step", "compute_loss", "compute_metrics", "compute_loss_and_updates", "get_metrics_result")
    return all(getattr(type(model), name, None) is getattr(keras.Model, name, None) for name in own)


def _rows_are_independent(model: Any) -> bool:
    """Whether all layers are Keras's, and none mixes rows, masks parts of rows or adds losses."""
    for layer in model._flatten_layers():
        name = type(layer).__name__
        if (
            not type(layer).__module__.startswith("keras.")
            or name in MIXING_LAYERS
            or getattr(layer, "mask_zero", False)
        ):
            return False
        if getattr(layer, "activity_regularizer", None) is not None or name == "ActivityRegularization":
            return False
        for operation in getattr(layer, "operations", ()):
            if operation not in layer.layers and type(operation).__name__ not in ELEMENTWISE:
                return False
    return True


def _reductions(model: Any) -> set[str | None]:
    """The losses' reductions over rows. Empty if a loss is not one of Keras's that weigh rows by sample weights."""
    import keras

    losses = [loss for loss in optree.tree_leaves(model.loss) if loss is not None]
    found: set[str | None] = set()
    for loss in losses:
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return set()
        kind = loss if not isinstance(loss, keras.losses.Loss) else type(loss)
        if not kind.__module__.startswith("keras.") or kind.__name__.title() in MIXING_LOSSES:
            return set()
        found.add(getattr(loss, "reduction", MEANS[0]))
    return found


def _metrics_know_weights(model: Any) -> bool:
    """Whether all metrics are means over rows, and none is weighted by the user's sample weights."""
    import keras

    compiled = model._compile_metrics
    if compiled is None:
        return True
    flat = [metric for found in compiled._flat_metrics if found is not None for metric in found.metrics]
    weighted = any(found is not None for found in compiled._flat_weighted_metrics)
    return not weighted and all(isinstance(metric, keras.metrics.MeanMetricWrapper) for metric in flat)
