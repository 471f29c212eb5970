"""Epochs: after a number of steps all workers average their logs, and what watches the training acts on all alike.

Only for a run that asks for them. At the end of an epoch the workers wait for each other, twice: for the logs, and for
what is to follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dlion_mpi.errors import RunError
from dlion_mpi.loop.exchange import finish_encoding, post_weights
from dlion_mpi.loop.ports import Collectives, Computed, Ticket, Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.timeline import Phase
from dlion_mpi.vector.named_arrays import Array, Arrays, array, column, integer, integers

EPOCHS = "epochs"
"""The channel of the gathers."""
WIDTH = 256
"""Numbers in a record: a worker that has left takes part without knowing how many logs there are."""
STOPPED = "a callback has stopped it"

Logs = dict[str, float]


class Watcher(Protocol):
    """Watches the training; see `learner.callbacks.Callbacks`."""

    def epoch_begin(self, epoch: int) -> None:
        """Before an epoch's first step."""

    def batch_begin(self, batch: int) -> None:
        """Before a step, counted within its epoch."""

    def batch_end(self, batch: int, logs: Logs) -> None:
        """After a step. ``logs``: the means of the epoch so far, on this rank."""

    def epoch_end(self, epoch: int, logs: Logs) -> None:
        """After an epoch. ``logs``: the means over all ranks."""

    def stops(self) -> bool:
        """Whether the training is to stop."""

    def rates(self) -> list[float]:
        """The learning rates that can be set."""

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set what `rates` gives."""


class Epochs:
    """The epochs of one worker.

    ``steps``: of an epoch; None: as many as take the whole training set once. ``resume_rates``: whether a resumed run
    has the learning rates of its checkpoint.
    """

    def __init__(
        self,
        watcher: Watcher,
        steps: int | None,
        training_samples: int,
        collectives: Collectives,
        *,
        resume_rates: bool = True,
    ) -> None:
        self._resume_rates = resume_rates
        self._watcher, self._steps, self._training_samples = watcher, steps, training_samples
        self._collectives = collectives
        self._is_over = False
        self._ticket: Ticket | None = None
        self._end = 0
        self.epoch = 0
        self.started = 0
        self._begin()

    def _begin(self) -> None:
        self._batch = 0
        self._samples = 0.0
        self._sums: Logs = {}

    def length(self, w: Worker, step: int) -> int:
        """Steps of the epoch that begins with ``step``."""
        return self._steps or steps_of_epoch(self._training_samples, w.batch_sizes.gbs_at(step))

    def batch_begin(self, w: Worker) -> None:
        """Note that a step begins."""
        if not self._end:
            self._end = w.step + self.length(w, w.step)
        self._watcher.batch_begin(self._batch)

    def advance(self, w: Worker, computed: Computed, samples: int) -> Generator[Until, None, None]:
        """Note a step of ``samples`` that has been completed, and end the epoch if it was its last."""
        logs = computed.logs or {"loss": computed.loss}
        if w.config.non_finite == "stop" or all(map(math.isfinite, logs.values())):
            self._add(logs, samples)
        else:
            self._add(dict.fromkeys(logs, 0.0), 0)  # all ranks have the same names
        self._watcher.batch_end(self._batch, self._means(self._sums, self._samples))
        self._batch += 1
        if self._watcher.stops():
            w.end(STOPPED)
            return
        while w.step >= self._end and not self._is_over:
            yield from self._end_epoch(w)

    def leave(self, rounds_everywhere: int) -> None:
        """Take part in the gathers that others have started and this worker has not."""
        self._is_over = True
        while self.started < rounds_everywhere:
            self._gather([])

    def settled(self) -> bool:
        """Whether no gather is in flight."""
        return self._ticket is None or self._ticket.done

    def to_arrays(self) -> Arrays:
        """The epoch, the step at which it ends, and the learning rates."""
        return {**integers(epoch=self.epoch, end=self._end), "rates": column(self._watcher.rates())}

    def from_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Restore what `to_arrays` gave, if it is there. Raises StateError."""
        if "epoch" in arrays:
            self.epoch, self._end = integer(arrays, "epoch"), integer(arrays, "end")
            rates = array(arrays, "rates", np.float64, len(self._watcher.rates()))
            if self._resume_rates:
                self._watcher.set_rates(rates.tolist())

    def _add(self, logs: Mapping[str, float], samples: int) -> None:
        self._samples += samples
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, 0.0) + samples * value

    @staticmethod
    def _means(sums: Mapping[str, float], samples: float) -> Logs:
        return {name: total / samples if samples else math.nan for name, total in sums.items()}

    def _end_epoch(self, w: Worker) -> Generator[Until, None, None]:
        yield from finish_encoding(w)
        tests = _test(w)
        names = list(self._sums)
        table = yield from self._gathered(w, [self._samples, *self._sums.values(), *tests.values()])
        if table is None:
            return
        columns = table.T
        totals = dict(zip(names, columns[1:].sum(axis=1).tolist(), strict=False))
        logs = self._means(totals, float(columns[0].sum()))
        values = columns[1 + len(names) :].mean(axis=1).tolist()
        logs |= {_as_validation(name): value for name, value in zip(tests, values, strict=False)}
        watcher = self._watcher
        watcher.epoch_end(self.epoch, logs)
        self.epoch += 1
        self._begin()
        stops = watcher.stops()
        if not stops and w.step < w.end_step:
            watcher.epoch_begin(self.epoch)
            stops = watcher.stops()
        rates = watcher.rates()
        table = yield from self._gathered(w, [float(stops), *rates])
        if table is None:
            return
        self._end += self.length(w, self._end)
        if table[:, 0].any():
            w.end(STOPPED)
        else:
            watcher.set_rates(table[0, 1 : 1 + len(rates)].tolist())

    def _gathered(self, w: Worker, record: list[float]) -> Generator[Until, None, Any]:
        """The records of all workers, (n, WIDTH). None if one has left before."""
        end = self._end
        ticket = self._gather(record)

        def receive() -> None:
            w.collect()
            post_weights(w, waiting=True)  # what the others wait for, and a busy link has kept

        def ready() -> bool:
            return ticket.done or w.stop_reason is not None or w.left_step < end

        with w.timed(Phase.AGREE):
            if not ticket.done:
                yield Until(ready, receive)
        if ticket.done:
            return ticket.table
        self._is_over = True
        return None

    def _gather(self, record: list[float]) -> Ticket:
        if len(record) > WIDTH:
            raise RunError(
                f"an epoch has at most {WIDTH} logs, not {len(record)}: compile the model with fewer metrics"
            )
        self.started += 1
        self._ticket = ticket = self._collectives.gather(EPOCHS, [*record, *np.zeros(WIDTH - len(record))])
        return ticket


def steps_of_epoch(training_samples: int, gbs: int) -> int:
    """Steps with this global batch that take the whole training set once."""
    return max(1, math.ceil(training_samples / gbs))


def last_step(epochs: int, step: int, training_samples: int, gbs_at: Callable[[int], int]) -> int:
    """The step at which the last of ``epochs`` ends, each the training set once, if the first begins with ``step``."""
    for _ in range(epochs):
        step += steps_of_epoch(training_samples, gbs_at(step))
    return step


def _test(w: Worker) -> Logs:
    """Test this worker's model now. Empty without validation data."""
    if not w.metrics:
        return {}
    w.evaluator.submit(w.step, w.now_s(), w.shared_knowledge())
    w.take_tests(wait=True)
    return dict(w.last_test())


def _as_validation(name: str) -> str:
    """The name of a test metric in Keras's logs."""
    return name if name.startswith("val_") else f"val_{name}"
