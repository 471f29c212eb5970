"""Keras's callbacks in a run of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlion_mpi.errors import UserError

ON_RANK_0 = ("ModelCheckpoint", "CSVLogger", "TensorBoard", "BackupAndRestore", "OrbaxCheckpoint", "RemoteMonitor")
"""Callbacks that write files or talk to a server: one rank does it for all."""


class Callbacks:
    """A list of Keras's callbacks on one rank; a `loop.epochs.Watcher`.

    ``given``: the user's callbacks. ``epochs``, ``steps``: the length of the run, as callbacks may read it; None:
    unknown. Raises UserError for what is no callback.
    """

    def __init__(
        self, given: Any, model: Any, rank: int, *, epochs: int | None = None, steps: int | None = None
    ) -> None:
        import keras

        kinds = tuple(getattr(keras.callbacks, name) for name in ON_RANK_0 if hasattr(keras.callbacks, name))
        wanted = list(given) if isinstance(given, list | tuple) else [given] if given is not None else []
        for callback in wanted:
            if not isinstance(callback, keras.callbacks.Callback):
                raise UserError(f"callbacks has a {type(callback).__name__}, but must have Keras's callbacks")
        wanted = [callback for callback in wanted if rank == 0 or not isinstance(callback, kinds)]
        self._model = model
        self._list = keras.callbacks.CallbackList(
            wanted, add_history=True, model=model, verbose=0, epochs=epochs or 1, steps=steps
        )
        self._schedules = keras.optimizers.schedules.LearningRateSchedule
        self._last: dict[str, float] = {}
        model.stop_training = False

    @property
    def history(self) -> dict[str, list[float]]:
        """The logs of all epochs, as in Keras's ``History``."""
        return {name: [float(value) for value in values] for name, values in self._model.history.history.items()}

    def train_begin(self) -> None:
        """Before the first step."""
        self._list.on_train_begin()

    def train_end(self) -> None:
        """After the last step."""
        self._list.on_train_end(dict(self._last))

    def epoch_begin(self, epoch: int) -> None:
        """See `loop.epochs.Watcher`."""
        self._list.on_epoch_begin(epoch)

    def batch_begin(self, batch: int) -> None:
        """See `loop.epochs.Watcher`."""
        self._list.on_train_batch_begin(batch)

    def batch_end(self, batch: int, logs: dict[str, float]) -> None:
        """See `loop.epochs.Watcher`."""
        self._list.on_train_batch_end(batch, logs)

    def epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """See `loop.epochs.Watcher`."""
        self._last = dict(logs)
        self._list.on_epoch_end(epoch, logs)

    def stops(self) -> bool:
        """See `loop.epochs.Watcher`."""
        return bool(self._model.stop_training)

    def rates(self) -> list[float]:
        """See `loop.epochs.Watcher`."""
        return [float(optimizer.learning_rate) for optimizer in self._optimizers()]

    def set_rates(self, rates: Sequence[float]) -> None:
        """See `loop.epochs.Watcher`. A rate that is as it should be is left alone."""
        for optimizer, rate in zip(self._optimizers(), rates, strict=True):
            if float(optimizer.learning_rate) != rate:
                optimizer.learning_rate = rate

    def _optimizers(self) -> list[Any]:
        """The optimizers whose learning rate can be set: not those with a schedule."""
        optimizer = getattr(self._model, "optimizer", None)
        own = getattr(optimizer, "inner_optimizer", optimizer)
        return [] if own is None or isinstance(own._learning_rate, self._schedules) else [own]
