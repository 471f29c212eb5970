"""Test accuracy off the critical path, and what the workers' evaluations say together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.vector.layout import Vector

CHUNK = 100
"""Test rows per call. A call's operations share TensorFlow's threads with the training step, which waits for them."""
SHARE = 0.2
"""Of the time an evaluation may compute; in the rest it sleeps, so that it takes no more of the processor than this."""


def rows_to_test(x: npt.NDArray[Any], y: Any, most: int | None) -> tuple[npt.NDArray[Any], Any]:
    """``most`` of the test rows, evenly taken; all if it is None or there are not so many."""
    if most is None or most >= len(y):
        return x, y
    rows = np.arange(most) * len(y) // most
    return x[rows], y[rows]


class BackgroundEvaluator:
    """Evaluates snapshots in a thread of its own, one at a time and in order.

    ``correct``: (knowledge, x, y) -> number of correct rows.
    """

    def __init__(self, correct: Callable[[Vector, Any, Any], int], x_test: npt.NDArray[Any], y_test: Any) -> None:
        self._correct, self._x, self._y = correct, x_test, y_test
        self._snapshots: queue.SimpleQueue[tuple[int, float, Vector, float] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Evaluation | BaseException] = queue.SimpleQueue()
        self._pending = 0
        self._awaited = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def busy(self) -> bool:
        """Whether an evaluation is under way."""
        return self._pending > 0

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        """Evaluate this snapshot; it must not be changed any more."""
        self._pending += 1
        self._snapshots.put((step, time_s, knowledge, time.monotonic()))

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """What has been evaluated since the last call; with ``wait``, all that was submitted."""
        results = []
        self._awaited = wait
        while self._pending and (wait or not self._done.empty()):
            result = self._done.get()
            self._pending -= 1
            if isinstance(result, BaseException):
                raise result
            results.append(result)
        return results

    def close(self, *, abandon: bool = False) -> None:
        """End the thread after what was submitted, or ``abandon`` it."""
        self._abandoned = abandon
        self._snapshots.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            step, time_s, knowledge, submitted_s = snapshot
            try:
                accuracy = self.accuracy(knowledge)
                self._done.put(Evaluation(step, time_s, accuracy, time.monotonic() - submitted_s))
            except BaseException as failure:  # raised by `poll`, in the loop
                self._done.put(failure)

    def accuracy(self, knowledge: Vector) -> float:
        """Share of the test rows that a model with this knowledge classifies correctly."""
        hits = 0
        for start in range(0, len(self._y), CHUNK):
            if self._abandoned:
                break
            rows = slice(start, start + CHUNK)
            started_s = time.monotonic()
            hits += self._correct(knowledge, self._x[rows], self._y[rows])
            if not self._awaited:
                time.sleep((time.monotonic() - started_s) * (1 / SHARE - 1))
        return hits / len(self._y)


def target_reached_s(evaluations: Sequence[Sequence[Evaluation]], target: float | None) -> float | None:
    """When the mean over the workers of everyone's latest accuracy first reached ``target``, or None.

    ``evaluations``: per worker, in time order.
    """
    if target is None:
        return None
    events = sorted((e.time_s, k, e.accuracy) for k, own in enumerate(evaluations) for e in own)
    latest = np.full(len(evaluations), np.nan)
    for time_s, k, accuracy in events:
        latest[k] = accuracy
        if latest.mean() >= target:  # NaN until everyone has been evaluated once
            return time_s
    return None
