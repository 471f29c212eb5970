"""Movements of an optimizer that normalises get back the length that averaging takes off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.algorithms.error_feedback import Residuals
from dlion_mpi.learner.batch import Batch
from dlion_mpi.learner.keras_model import NORMALISING, KerasModel
from dlion_mpi.loop.worker import Worker
from dlion_mpi.simulation import driver
from dlion_mpi.simulation.simulate import simulate
from dlion_mpi.strategies.dlion import Dlion, DlionState
from dlion_mpi.strategies.types import LinkView, LinkViews, LocalUpdate, Outbox
from dlion_mpi.vector.layout import Vector
from tests.contract.test_simulated_runs import cloud, config


class Seen:
    """A run's workers, and by step the movements that the loop gave to the strategy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.workers: list[Worker] = []
        self.locals: dict[int, list[LocalUpdate]] = {}
        outgoing = Dlion.outgoing

        def noted(strategy: Dlion, state: DlionState, local: LocalUpdate, links: LinkViews) -> Outbox:
            copied = LocalUpdate(
                vector=local.vector.copy(), step=local.step, lbs=local.lbs, gbs=local.gbs, shortened=local.shortened
            )
            self.locals.setdefault(local.step, []).append(copied)
            return outgoing(strategy, state, local, links)

        def made(**parts: Any) -> Worker:
            self.workers.append(Worker(**parts))
            return self.workers[-1]

        monkeypatch.setattr(Dlion, "outgoing", noted)
        monkeypatch.setattr(driver, "Worker", made)
        simulate(config(steps=70, batching="fixed", **options), cloud(), report=False)

    def ratio(self, step: int) -> float:
        """The length of the mean movement over that of one, exactly."""
        movements = np.array([local.vector for local in self.locals[step]], np.float64)
        return float(np.linalg.norm(movements.mean(axis=0)) / np.sqrt(np.square(movements).sum(axis=1).mean()))


ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.001}


@pytest.mark.parametrize("mode", ["bounded", "sync", "async"])
def test_all_workers_measure_the_same_and_about_the_truth(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, sync=mode, **ADAM)
    assert {local.shortened for local in seen.locals[10]} == {1.0}
    first, *others = (local.shortened for local in seen.locals[66])
    assert set(others) == {first}
    truth = np.mean([seen.ratio(step) for step in (19, 39, 59)])
    assert 3**-0.5 < truth < 0.99
    assert first == pytest.approx(truth, rel=0.15)


def test_what_is_sent_is_longer_by_that_and_counts_whole_here_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, **ADAM)
    worker, local = seen.workers[0], seen.locals[69][0]
    strategy, state = worker.strategy, worker.state
    assert isinstance(strategy, Dlion)
    assert local.shortened is not None
    state.lead.settle(70, np.zeros(local.vector.size, np.float32))
    moved = strategy.incoming(state, local, worker.replica.weights, []).movement
    assert moved is not None
    np.testing.assert_allclose(moved, local.vector, rtol=1e-5)
    before, ahead = state.residuals.common.copy(), strategy.ahead(state)
    assert ahead is not None
    strategy.outgoing(state, local, dict.fromkeys((1, 2), LinkView(False, 0.0)))
    sent_later = local.vector * (local.lbs / local.gbs / local.shortened)
    np.testing.assert_allclose(state.residuals.common - before, sent_later, atol=1e-7)
    farther = strategy.ahead(state)
    assert farther is not None
    np.testing.assert_allclose(farther - ahead, local.vector, atol=1e-6)


@pytest.mark.parametrize("mode", ["bounded", "sync", "async"])
@pytest.mark.parametrize("batching", ["fixed", "auto"])
def test_common_weights_are_the_first_ones_and_all_that_was_sent(
    mode: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However factors and batch sizes change: without its lead, a worker has what left its residual, and no more."""
    first: list[Vector] = []
    sent: dict[int, Vector] = {}
    outgoing = Dlion.outgoing

    def noted(strategy: Dlion, state: DlionState, local: LocalUpdate, links: LinkViews) -> Outbox:
        messages = outgoing(strategy, state, local, links)
        total = sent.setdefault(state.plan.rank, np.zeros(local.vector.size, np.float32))
        assert isinstance(state.residuals, Residuals)
        if state.residuals.taken is not None:
            state.residuals.taken.add_to(total, 1.0)
        return messages

    made: list[Worker] = []

    def worker(**parts: Any) -> Worker:
        first.append(parts["replica"].weights())
        made.append(Worker(**parts))
        return made[-1]

    monkeypatch.setattr(Dlion, "outgoing", noted)
    monkeypatch.setattr(driver, "Worker", worker)
    options = {"sync": mode, "batching": batching, "value_type": "sign", **ADAM}
    simulate(config(steps=70, **options), cloud((24.0, 12.0, 4.0), mbit=2.0), report=False)
    assert max(np.abs(w.state.residuals.common).max() for w in made) > 5e-5
    factors = {round(w.state.lead.factor, 3) for w in made}
    assert min(factors) > 1
    assert batching == "fixed" or len(factors) > 1
    for own in made:
        np.testing.assert_allclose(own.replica.weights() - first[0], sum(sent.values()), atol=5e-6)


@pytest.mark.parametrize(
    "options", [{}, {**ADAM, "outer_learning_rate": 1.0}, {**ADAM, "preset": "paper"}], ids=["sgd", "given", "paper"]
)
def test_nothing_is_measured_where_it_has_no_use(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, **options)
    assert {local.shortened for step in seen.locals.values() for local in step} == {None}
    assert all(worker.averages.lengths is None and not worker.averages.started for worker in seen.workers)


def test_a_given_factor_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what is sent. An own movement counts whole until then, whatever the factor."""
    seen = Seen(monkeypatch, outer_learning_rate=0.5)
    worker, local = seen.workers[0], seen.locals[69][0]
    strategy, state = worker.strategy, worker.state
    assert isinstance(strategy, Dlion)
    state.lead.settle(70, np.zeros(local.vector.size, np.float32))
    moved = strategy.incoming(state, local, worker.replica.weights, []).movement
    assert moved is not None
    np.testing.assert_allclose(moved, local.vector, rtol=1e-5)
    before = state.residuals.common.copy()
    strategy.outgoing(state, local, dict.fromkeys((1, 2), LinkView(False, 0.0)))
    np.testing.assert_allclose(state.residuals.common - before, local.vector * (local.lbs / local.gbs / 2), atol=1e-7)


def test_which_of_keras_s_optimizers_normalise() -> None:
    import keras

    example = Batch(np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32), None)

    def normalises(optimizer: Any) -> bool:
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)])
        model.compile(optimizer, "mse")
        return KerasModel(model, example).normalises

    assert all(normalises(getattr(keras.optimizers, name)()) for name in NORMALISING)
    assert normalises(keras.optimizers.AdamW())
    assert normalises(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))
    for plain in (keras.optimizers.SGD(), keras.optimizers.SGD(momentum=0.9), keras.optimizers.Ftrl()):
        assert not normalises(plain)
    assert not normalises(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
