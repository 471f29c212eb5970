"""Callbacks and epochs of a run over MPI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dlion_mpi.errors import UserError
from dlion_mpi.learner.callbacks import Callbacks
from dlion_mpi.loop.epochs import Epochs
from dlion_mpi.loop.worker import Worker
from dlion_mpi.mpi.ranks import Ranks


@dataclass(slots=True, kw_only=True)
class Watched:
    """The ``callbacks`` of a run, and the steps of an epoch (None: the whole training set once).

    ``resume_rates``: see `Epochs`. ``history``: after the run, the logs by epoch.
    """

    callbacks: Any = None
    steps_per_epoch: int | None = None
    resume_rates: bool = True
    history: dict[str, list[float]] = field(default_factory=dict)

    def describe(self) -> str:
        """A text that must be the same on all ranks."""
        return str(self.steps_per_epoch or "the training set")


class Watch:
    """Gives a worker epochs, which callbacks watch. All ranks make and use it together.

    ``samples``: training rows of all ranks, None if unknown. Raises UserError.
    """

    def __init__(self, ranks: Ranks, watched: Watched, worker: Worker, model: Any, samples: int | None) -> None:
        steps, most = watched.steps_per_epoch, worker.config.steps
        if steps is None and samples is None:
            raise UserError("callbacks: the number of training rows is unknown: give steps_per_epoch")
        if steps is not None and steps < 1:
            raise UserError(f"steps_per_epoch {steps}: must be at least 1")
        epochs = None if steps is None or most is None else -(-most // steps)
        self._ranks, self._watched, self._worker = ranks, watched, worker
        self._callbacks = ranks.together(
            lambda: Callbacks(watched.callbacks, model, ranks.rank, epochs=epochs, steps=steps)
        )
        self._epochs = worker.epochs = Epochs(
            self._callbacks, steps, samples or 0, worker.collectives, resume_rates=watched.resume_rates
        )

    def begin(self) -> None:
        """Begin the training and its first epoch. A callback may set weights and learning rates: rank 0's count."""
        ranks, callbacks, replica = self._ranks, self._callbacks, self._worker.replica
        ranks.together(callbacks.train_begin)
        ranks.together(lambda: callbacks.epoch_begin(self._epochs.epoch))
        if ranks.size > 1:
            replica.set_knowledge(ranks.share(replica.knowledge()))
            callbacks.set_rates(ranks.gather_numbers(*callbacks.rates())[0].tolist())

    def end(self) -> None:
        """End the training."""
        self._callbacks.train_end()
        self._watched.history = self._callbacks.history
