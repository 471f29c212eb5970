"""Tests in the background."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.shards import Shard
from dlion_mpi.learner.source import Table
from dlion_mpi.metrics.notes import Notes
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.vector.layout import Vector

CHUNK = 100
"""Test rows per call. A call shares the backend's threads with the training step, which waits for them."""
SAMPLED = 256
"""Test rows of a digest, at even distances."""
SHARE = 0.2
"""Largest share of the time in which an evaluation computes; it sleeps for the rest, to leave the processor free."""


class BackgroundEvaluator:
    """Evaluates snapshots in a thread, one at a time and in order.

    ``evaluate``: (knowledge, batches) -> metrics. ``tests``: gives the test rows, in batches.
    """

    def __init__(
        self, evaluate: Callable[[Vector, Iterable[Batch]], dict[str, float]], tests: Callable[[], Iterable[Batch]]
    ) -> None:
        self._evaluate, self._tests = evaluate, tests
        self._snapshots: queue.SimpleQueue[tuple[int, float, Vector, float] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Evaluation | BaseException] = queue.SimpleQueue()
        self._pending = 0
        self._awaited = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
        self._thread.start()

    def pending(self) -> int:
        """Number of snapshots that were submitted and not returned by `poll` yet: one is tested, the others wait."""
        return self._pending

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        """Evaluate this snapshot; it must not be changed any more."""
        self._pending += 1
        self._snapshots.put((step, time_s, knowledge, time.monotonic()))

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """Evaluations that were finished since the last call; with ``wait``, all that were submitted."""
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

    def _paced(self) -> Iterator[Batch]:
        """The test rows; between batches it sleeps, to leave the processor free."""
        for batch in self._tests():
            if self._abandoned:
                return
            started_s = time.monotonic()
            yield batch
            if not self._awaited:
                time.sleep((time.monotonic() - started_s) * (1 / SHARE - 1))

    def _run(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            step, time_s, knowledge, submitted_s = snapshot
            try:
                metrics = self._evaluate(knowledge, self._paced())
                self._done.put(Evaluation(step, time_s, metrics, time.monotonic() - submitted_s))
            except BaseException as failure:  # raised by `poll`, in the loop
                self._done.put(failure)


def digest_of_tests(shard: Shard) -> str:
    """A digest of `SAMPLED` of the test rows and of their number, to tell one test set from another.

    Empty for a stream, whose order may differ, and without test rows.
    """
    if not isinstance(shard.test, Table):
        return ""
    digest = hashlib.blake2b(f"{shard.test.rows}".encode(), digest_size=8)
    for batch in shard.tests(SAMPLED, SAMPLED):
        for place, array in batch.named().items():
            values = np.asarray(array)
            digest.update(f"{place} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def differing_tests(digests: Sequence[str]) -> str:
    """A warning about ranks whose test sets differ; empty if there are none. ``digests``: by rank."""
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others or "" in digests:
        return ""
    notes = Notes()
    notes.add("another test set than rank 0's, so that the test metrics of workers cannot be compared", *others)
    return notes.lines()[0]
