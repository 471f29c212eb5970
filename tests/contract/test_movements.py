"""Movements and gradients: what a strategy gets, what an effect does, and who is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.errors import UserError
from dlion_mpi.strategies.baseline import Baseline
from dlion_mpi.strategies.registry import STRATEGIES, check_gradients
from dlion_mpi.strategies.types import Effect, Sum
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Vector
from tests.contract.problem import LAYOUT, LEARNING_RATE, OPTIMUM, SIZE, config, rows, trained
from tests.inmemory import Quadratic, Weather, run

MOVING = {"dlion", "gaia", "hop", "choco-sgd", "local-sgd", "diloco", "streaming-diloco", "sparseloco"}


class Momentum(Quadratic):
    """Its optimizer has a momentum of 0.5: a gradient's effect is twice the gradient in the end."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__(LAYOUT, np.ones(SIZE, np.float32), learning_rate)
        self.velocity = np.zeros(SIZE, np.float32)
        self.steps = 0

    def _moved(self, gradient: Vector) -> Vector:
        self.steps += 1
        self.velocity = np.float32(0.5) * self.velocity - self.learning_rate * gradient
        return self.velocity

    def movement(self, batch: Any) -> Gradient:
        gradient = self.gradient(batch)
        return Gradient(gradient.loss, self._moved(gradient.vector))

    def apply(self, gradient: Vector) -> None:
        self.w += self._moved(gradient)

    def to_arrays(self) -> Any:
        return {"w": self.w.copy(), "velocity": self.velocity.copy(), "steps": np.array(self.steps)}

    def from_arrays(self, arrays: Any, *, generators: bool = True) -> None:
        self.w, self.velocity, self.steps = arrays["w"].copy(), arrays["velocity"].copy(), int(arrays["steps"])


def test_the_strategies_that_are_defined_on_gradients_get_gradients() -> None:
    assert {name for name, cls in STRATEGIES.items() if cls.exchanges == "movements"} == MOVING


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_an_optimizer_does_one_step_in_a_step(name: str) -> None:
    """With the worker's own gradient or with everyone's, and none while batch sizes are timed."""
    replicas = [Momentum(0.05) for _ in range(3)]
    result = run(config(name, STRATEGIES[name].modes[0], steps=30), replicas, rows(3), weather=Weather(seed=1))
    assert [replica.steps for replica in replicas] == [len(records) for records in result.records]


@pytest.mark.parametrize("name", ["dlion", "baseline", "allreduce"])
def test_equal_workers_with_momentum_do_what_one_worker_does(name: str) -> None:
    """Momentum is applied once to the mean of all, whichever side of the exchange it is on."""
    exact = {"max_n": 100, "value_type": "float32", "transfer": "none", "batching": "fixed"}
    result = run(config(name, "sync", steps=25, **exact), [Momentum(0.05) for _ in range(3)], rows(3))
    alone = run(config(name, "sync", steps=25, **exact), [Momentum(0.05)], rows(1))
    np.testing.assert_allclose(result.weights, np.tile(alone.weights, (3, 1)), rtol=1e-5)
    assert np.abs(alone.weights - OPTIMUM).max() > 0.01, "else any factor would do"


class Everything(Baseline):
    """Sets weights, moves them and gives a gradient in one effect."""

    name = "everything"

    def incoming(self, state: Any, local: Any, weights: Any, messages: Any) -> Any:
        return Effect(
            weights=np.full(SIZE, 10, np.float32),
            movement=np.full(SIZE, 5, np.float32),
            gradient=np.full(SIZE, 1, np.float32),
        )


def test_an_effect_sets_then_moves_then_gives_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "everything", Everything)
    calls: list[str] = []

    class Spy(Quadratic):
        def set_weights(self, weights: Vector) -> None:
            calls.append("set")
            super().set_weights(weights)

        def move(self, movement: Vector) -> None:
            calls.append("move")
            super().move(movement)

        def apply(self, gradient: Vector) -> None:
            calls.append("apply")
            super().apply(gradient)

    replicas = [Spy(LAYOUT, np.ones(SIZE, np.float32), LEARNING_RATE) for _ in range(2)]
    result = run(config("everything", "sync", steps=1), replicas, rows(2))
    np.testing.assert_allclose(result.weights, 15 - LEARNING_RATE, rtol=1e-6)
    assert calls == ["set", "move", "apply"] * 2


def test_a_method_that_returns_a_generator_without_being_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums would be taken by some ranks' loops and never ended: `Strategy.sums` does not see them."""

    class Hidden(Baseline):
        name = "hidden"

        def incoming(self, state: Any, local: Any, weights: Any, messages: Any) -> Any:
            def sums() -> Any:
                total = yield Sum(local.vector)
                return Effect(gradient=total)

            return sums()

    monkeypatch.setitem(STRATEGIES, "hidden", Hidden)
    with pytest.raises(TypeError, match=r"strategy hidden: .*generator itself"):
        trained(config("hidden", "sync", steps=3))


def test_a_strategy_that_needs_gradients_refuses_a_model_that_has_none() -> None:
    check_gradients("dlion", "movements", False)
    check_gradients("baseline", "gradients", True)
    with pytest.raises(UserError, match=r"--strategy baseline needs gradients.*choose dlion, gaia, hop, "):
        check_gradients("baseline", "gradients", False)


def test_while_batch_sizes_are_timed_a_replica_stays_as_it_is() -> None:
    """Optimizer and statistics too, which a movement changes."""
    seen: list[tuple[int, float]] = []

    class Watched(Momentum):
        def movement(self, batch: Any) -> Gradient:
            seen.append((self.steps, float(np.abs(self.velocity).max())))
            return super().movement(batch)

    run(config("dlion", "sync", steps=2, batching="auto"), [Watched(0.05), Watched(0.05)], rows(2))
    assert seen.count((0, 0.0)) == 4, "the first timing, and the first step, of both"
