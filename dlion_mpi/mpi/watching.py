"""Callbacks and epochs of a run over MPI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.learner.callbacks import Callbacks
from dlion_mpi.loop.batch_sizes import global_batch
from dlion_mpi.loop.epochs import Epochs, last_step
from dlion_mpi.loop.worker import Worker
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.vector.named_arrays import Array, integer, part


@dataclass(slots=True, kw_only=True)
class Watched:
    """The ``callbacks`` of a run, and the steps of an epoch (None: the whole training set once).

    ``epochs``: after which the run ends; None: the Config alone says when. ``resume_rates``: see `Epochs`.
    ``history``: after the run, the logs by epoch.
    """

    callbacks: Any = None
    steps_per_epoch: int | None = None
    epochs: int | None = None
    resume_rates: bool = True
    history: dict[str, list[float]] = field(default_factory=dict)

    def describe(self) -> str:
        """A text that must be the same on all ranks."""
        return f"{self.epochs or 'any number'} of {self.steps_per_epoch or 'the training set'}"

    def with_steps(
        self, config: Config, workers: int, samples: int | None, step: int, saved: Mapping[str, Array]
    ) -> Config:
        """The Config with the steps that ``epochs`` take.

        ``samples``: training rows of all ranks, None if unknown. ``step``, ``saved``: where the run begins, and the
        state of its checkpoint. Raises UserError if there are no rows to count.
        """
        if self.steps_per_epoch is not None:
            return config
        if samples is None:
            raise UserError("epochs: the number of training rows is unknown: give steps_per_epoch")
        if self.epochs is None:
            return config
        epochs, saved = self.epochs, part(saved, "epochs")
        if "epoch" in saved:  # of the epoch that has begun
            left = epochs - 1 - integer(saved, "epoch")
            step, epochs = (step, 0) if left < 0 else (integer(saved, "end"), left)
        steps = last_step(epochs, step, samples, global_batch(config, workers, samples))
        return replace(config, steps=max(1, steps))


class Watch:
    """Gives a worker epochs, which callbacks watch. All ranks make and use it together.

    ``samples``: training rows of all ranks; 0 if unknown. Raises UserError.
    """

    def __init__(self, ranks: Ranks, watched: Watched, worker: Worker, model: Any, samples: int) -> None:
        steps, most = watched.steps_per_epoch, worker.config.steps
        epochs = watched.epochs or (None if steps is None or most is None else -(-most // steps))
        self._ranks, self._watched, self._worker = ranks, watched, worker
        self._callbacks = ranks.together(
            lambda: Callbacks(watched.callbacks, model, ranks.rank, epochs=epochs, steps=steps)
        )
        self._epochs = worker.epochs = Epochs(
            self._callbacks, steps, samples, worker.collectives, resume_rates=watched.resume_rates
        )

    def begin(self) -> None:
        """Begin the training and its first epoch. A callback may set weights and learning rates: rank 0's count."""
        ranks, callbacks, replica = self._ranks, self._callbacks, self._worker.replica
        ranks.together(callbacks.train_begin)
        ranks.together(self._begin_epoch)
        if ranks.size > 1:
            replica.set_knowledge(ranks.share(replica.knowledge()))
            callbacks.set_rates(ranks.gather_numbers(*callbacks.rates())[0].tolist())

    def _begin_epoch(self) -> None:
        if not self._worker.cut_short():
            self._callbacks.epoch_begin(self._epochs.epoch)

    def end(self, *, abandoned: bool) -> None:
        """End the training. ``abandoned``: this rank has no time for callbacks."""
        self._ranks.together(lambda: None if abandoned else self._callbacks.train_end())
        self._watched.history = self._callbacks.history
