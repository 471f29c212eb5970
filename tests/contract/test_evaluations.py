"""Evaluations that take longer than the steps between them: snapshots must not pile up."""

from __future__ import annotations

from dlion_mpi.config.options import Every
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.vector.layout import Vector
from tests.contract.problem import config, trained
from tests.inmemory import Nothing


class Slow(Nothing):
    """An evaluator whose evaluations take ``polls`` polls each, one after the other."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self._polls, self._left = polls, polls
        self.steps: list[int] = []
        self.waiting: list[int] = []
        """Snapshots that wait while another is evaluated, after each one that was submitted."""
        self._done = 0

    def pending(self) -> int:
        return len(self.steps) - self._done

    def submit(self, step: int, time_s: float, knowledge: Vector) -> None:
        self.steps.append(step)
        self.waiting.append(self.pending() - 1)

    def poll(self, *, wait: bool = False) -> list[Evaluation]:
        if not self.pending():
            return []
        self._left -= 1
        if self._left:
            return []
        self._left = self._polls
        self._done += 1
        return [Evaluation(self.steps[self._done - 1], 0.0, {"accuracy": 0.5})]


def evaluators(every: Every, polls: int) -> list[Slow]:
    found: list[Slow] = []

    def prepare(worker: Worker) -> None:
        found.append(Slow(polls))
        worker.evaluator = found[-1]

    trained(config("dlion", "bounded", steps=120, evaluate_every=every), prepare=prepare)
    return found


def test_at_most_one_snapshot_waits() -> None:
    for slow in evaluators(Every(steps=4), polls=20):
        assert max(slow.waiting) == 1
        assert all(step % 4 == 0 for step in slow.steps)
        assert 120 // 20 <= len(slow.steps) <= 120 // 20 + 2, "and the evaluator is never without work"


def test_evaluations_that_keep_up_are_all_made() -> None:
    for quick in evaluators(Every(steps=4), polls=2):
        assert quick.steps == list(range(4, 121, 4))


def test_by_the_clock_no_snapshot_waits() -> None:
    for slow in evaluators(Every(seconds=0.01), polls=20):
        assert max(slow.waiting) == 0
        assert len(slow.steps) > 3
