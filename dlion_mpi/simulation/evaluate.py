"""Tests in a simulated run: in threads, while the events continue."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from dlion_mpi.learner.backend import Logs
from dlion_mpi.learner.batch import Batch
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.simulation.shared_replica import SharedReplica
from dlion_mpi.vector.layout import Vector

MOST_SNAPSHOTS = 3
"""Snapshots of one worker that wait to be tested."""
MOST_KNOWN = 256
"""Results that are kept, for workers with the same snapshot."""


class Tests:
    """Tests the snapshots of all workers in threads, and each snapshot only once. ``rows`` gives the test rows."""

    def __init__(self, shared: SharedReplica, rows: Callable[[], Iterable[Batch]], pool: ThreadPoolExecutor) -> None:
        self._shared, self._rows, self._pool = shared, rows, pool
        self._known: dict[bytes, Future[Logs]] = {}

    def of(self, knowledge: Vector) -> Future[Logs]:
        """The metrics of this snapshot, which must not be changed any more."""
        digest = hashlib.blake2b(knowledge.data, digest_size=16).digest()
        if digest not in self._known:
            if len(self._known) == MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[digest] = self._pool.submit(self._test, knowledge)
        return self._known[digest]

    def _test(self, knowledge: Vector) -> Logs:
        return self._shared.evaluate(knowledge, self._rows())


class VirtualEvaluator:
    """Tests one worker's snapshots, which takes no virtual time. See `learner.evaluate.BackgroundEvaluator`.

    ``at_once``: the next `poll` waits for all results, because they may end the run. Otherwise a result arrives when
    its thread is done.
    """

    def __init__(self, tests: Tests, *, at_once: bool) -> None:
        self._tests, self._at_once = tests, at_once
        self._submitted: deque[tuple[int, float, Future[Logs]]] = deque()

    def pending(self) -> int:
        """Zero: in virtual time no snapshot waits."""
        return 0

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        """Test this snapshot; it must not be changed any more."""
        if len(self._submitted) == MOST_SNAPSHOTS:
            self._submitted[0][2].exception()  # wait: snapshots are as large as the model
        self._submitted.append((step, time_s, self._tests.of(knowledge)))

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        """Evaluations that were finished since the last call; with ``wait``, all that were submitted."""
        tested = []
        while self._submitted and (wait or self._at_once or self._submitted[0][2].done()):
            step, time_s, future = self._submitted.popleft()
            tested.append(Evaluation(step, time_s, future.result()))
        return tested
