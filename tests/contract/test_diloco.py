"""Local SGD and DiLoCo: local steps by the model's own optimizer; outer steps calculated by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.diloco import Diloco
from dlion_mpi.strategies.local_sgd import LocalSgd
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import Plan
from dlion_mpi.vector.layout import Vector
from tests.contract.problem import LAYOUT, SIZE, effects_of, local


class Workers:
    """Strategies of two workers whose optimizer is ``w - rate g``, with their replicas."""

    def __init__(self, cls: type[LocalSgd] = Diloco, rate: float = 0.5, **options: Any) -> None:
        config = resolve(Config(strategy=cls.name))[1]
        plans = [Plan(config=config, rank=k, ranks=(0, 1), layout=LAYOUT) for k in (0, 1)]
        self.strategies = [cls(**options) for _ in plans]
        self.states = [s.start(plan) for s, plan in zip(self.strategies, plans, strict=True)]
        self.weights = [np.full(SIZE, 8, np.float32) for _ in plans]
        self.rate = np.float32(rate)
        self.step = 0
        self.types: list[str] = []
        """Of the sums so far."""

    def advance(self, gradients: list[float], lbs: tuple[int, int] = (8, 8)) -> list[Vector]:
        """One step of both with these gradients, all entries alike. Returns the weights."""
        answers = []
        for k, (strategy, state) in enumerate(zip(self.strategies, self.states, strict=True)):
            own = local(np.full(SIZE, -self.rate * gradients[k], np.float32), step=self.step, lbs=lbs[k], gbs=sum(lbs))
            effect = strategy.incoming(state, own, self.weights[k].copy, [])
            assert effect.weights is None
            assert effect.movement is not None
            self.weights[k] = self.weights[k] + effect.movement
            answers.append(strategy.between(state, own, self.weights[k].copy))
        for k, after in enumerate(effects_of(answers, lambda request: self.types.append(request.value_type))):
            assert after.movement is None
            if after.weights is not None:
                self.weights[k] = after.weights.copy()
        self.step += 1
        return self.weights


def test_an_outer_step_is_what_the_formula_says() -> None:
    """theta = 8; both do two local steps at rate 0.5; D is the mean of what they have moved."""
    workers = Workers(h=2, outer_learning_rate=0.5, outer_momentum=0.5)
    first, second = workers.advance([2, 4])
    assert (first[0], second[0]) == (7, 6), "no outer step yet"
    first, second = workers.advance([2, 8])
    # moved: 8 - 6 = 2 and 8 - 2 = 6; D = 4, m = 4; theta = 8 - 0.5 (4 + 0.5 x 4)
    assert (first == 5).all()
    assert (second == 5).all()
    workers.advance([0, 0])
    first, second = workers.advance([2, 2])
    # moved: 1 and 1; D = 1, m = 0.5 x 4 + 1 = 3; theta = 5 - 0.5 (1 + 0.5 x 3)
    assert (first == 3.75).all()
    assert (second == 3.75).all()


def test_local_sgd_continues_with_the_mean_of_the_weights() -> None:
    workers = Workers(LocalSgd, h=2)
    first, second = workers.advance([2, 4])
    assert (first[0], second[0]) == (7, 6)
    first, second = workers.advance([2, 8])
    assert (first == 4).all(), "the mean of 6 and 2"
    assert (second == 4).all()


def test_diloco_without_momentum_at_a_rate_of_one_is_local_sgd() -> None:
    plain, diloco = Workers(LocalSgd, h=3), Workers(h=3, outer_learning_rate=1.0, outer_momentum=0.0)
    for step in range(9):
        for weights, expected in zip(diloco.advance([step, 1]), plain.advance([step, 1]), strict=True):
            np.testing.assert_array_equal(weights, expected)


def test_pseudo_gradients_of_diloco_travel_as_16_bits() -> None:
    for cls, value_type in ((LocalSgd, "float32"), (Diloco, "bfloat16")):
        workers = Workers(cls, h=1)
        workers.advance([1, 1])
        assert workers.types == [value_type]


@pytest.mark.parametrize("cls", [LocalSgd, Diloco])
def test_workers_count_by_their_samples(cls: type[LocalSgd]) -> None:
    """3/4 of the samples of both steps are of worker 0, though its share changes."""
    workers = Workers(cls, h=2, **({} if cls is LocalSgd else {"outer_learning_rate": 1.0, "outer_momentum": 0.0}))
    workers.advance([4, 0], lbs=(16, 0))
    first, second = workers.advance([4, 8], lbs=(8, 8))
    # moved: 4 and 4 in all; worker 0 has 24 of 32 samples
    np.testing.assert_allclose(first, 8 - (0.75 * 4 + 0.25 * 4), rtol=1e-6)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("h", [1, 3, 5])
def test_there_is_a_sum_after_every_h_steps_and_none_between(h: int) -> None:
    workers = Workers(h=h)
    for step in range(1, 4 * h + 1):
        first, second = workers.advance([1, 2])
        assert (first.tobytes() == second.tobytes()) == (step % h == 0)


def test_what_is_kept_is_all_that_a_resumed_worker_needs() -> None:
    whole, resumed = Workers(h=3), Workers(h=3)
    for step in range(7):
        whole.advance([step, 1])
    for k in (0, 1):
        kept = {name: np.array(value) for name, value in whole.strategies[k].to_arrays(whole.states[k]).items()}
        assert kept.keys() == {"anchor", "momentum", "steps", "samples", "all_samples"}
        resumed.strategies[k].from_arrays(resumed.states[k], kept)
        resumed.weights[k] = whole.weights[k].copy()
    for step in range(5):
        for weights, expected in zip(resumed.advance([1, step]), whole.advance([1, step]), strict=True):
            np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"h": 0}, "--diloco.h 0: must be at least 1"),
        ({"h": 2.5}, "--diloco.h 2.5: must be a whole number"),
        ({"outer_learning_rate": 0}, "--diloco.outer-learning-rate 0: must be above 0"),
        ({"outer_momentum": 1}, "--diloco.outer-momentum 1: must be in "),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Diloco(**options)
