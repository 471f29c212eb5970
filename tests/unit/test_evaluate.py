"""Evaluation in the background."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from dlion_mpi.learner.batches import Batch
from dlion_mpi.learner.evaluate import CHUNK, BackgroundEvaluator
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.vector.layout import Vector

ROWS = 2 * CHUNK + 7
X = np.arange(ROWS, dtype=np.float32)
Y = np.arange(ROWS, dtype=np.int32) % 10
WAIT_S = 30.0


def knowledge(right: int) -> Vector:
    """Of a model that is right in the first ``right`` rows."""
    return np.array([right], np.float32)


class Model:
    """Counts correct rows, one call at a time; waits at the gate if there is one."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.calls: list[int] = []
        self.threads: set[int] = set()

    def evaluate(self, vector: Vector, batches: Iterable[Batch]) -> dict[str, float]:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        if vector[0] < 0:
            raise FloatingPointError("the model has exploded")
        hits = 0
        for x, y, _ in batches:
            self.calls.append(len(y))
            self.threads.add(threading.get_ident())
            assert (x % 10 == y).all(), "rows and labels belong together"
            hits += int((x < vector[0]).sum())
        return {"accuracy": hits / ROWS}


def batches_of_rows() -> Iterator[Batch]:
    """The test rows, in batches."""
    for start in range(0, ROWS, CHUNK):
        yield Batch(X, Y).part(start, start + CHUNK)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def evaluator(model: Model) -> Iterator[BackgroundEvaluator]:
    own = BackgroundEvaluator(model.evaluate, batches_of_rows)
    yield own
    model.gate.set()
    own.close()


def test_accuracy_counts_every_row_once(model: Model, evaluator: BackgroundEvaluator) -> None:
    evaluator.submit(7, 1.5, knowledge(CHUNK + 3))
    assert evaluator.poll(wait=True) == [Evaluation(7, 1.5, {"accuracy": (CHUNK + 3) / ROWS})]
    assert model.calls == [CHUNK, CHUNK, 7]
    assert threading.get_ident() not in model.threads


def test_submitting_and_asking_never_wait(model: Model, evaluator: BackgroundEvaluator) -> None:
    model.gate.clear()
    assert evaluator.pending() == 0
    evaluator.submit(1, 0.1, knowledge(0))
    assert model.entered.wait(WAIT_S)
    evaluator.submit(2, 0.2, knowledge(0))
    assert evaluator.pending() == 2
    assert evaluator.poll() == []
    model.gate.set()
    assert [e.step for e in evaluator.poll(wait=True)] == [1, 2]
    assert evaluator.pending() == 0
    assert evaluator.poll() == []
    assert evaluator.poll(wait=True) == []


def test_snapshots_are_evaluated_in_order_and_each_with_its_own_weights(
    model: Model, evaluator: BackgroundEvaluator
) -> None:
    model.gate.clear()
    for step in range(5):
        evaluator.submit(step, float(step), knowledge(10 * step))
    model.gate.set()
    results = evaluator.poll(wait=True)
    assert [e.step for e in results] == [0, 1, 2, 3, 4]
    assert [e.metrics["accuracy"] for e in results] == [10 * step / ROWS for step in range(5)]


def test_what_fails_in_the_background_is_raised_in_the_loop(evaluator: BackgroundEvaluator) -> None:
    evaluator.submit(1, 0.1, knowledge(-1))
    evaluator.submit(2, 0.2, knowledge(5))
    with pytest.raises(FloatingPointError, match="exploded"):
        evaluator.poll(wait=True)
    assert [e.step for e in evaluator.poll(wait=True)] == [2], "and the next one is evaluated all the same"


def test_closing_finishes_what_was_submitted(model: Model) -> None:
    evaluator = BackgroundEvaluator(model.evaluate, batches_of_rows)
    evaluator.submit(1, 0.1, knowledge(3))
    evaluator.close()
    assert [e.step for e in evaluator.poll()] == [1]
