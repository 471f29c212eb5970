"""CHOCO-SGD: compressed gossip in a ring, against a calculation by hand; the mean is kept, copies stay equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.errors import UserError
from dlion_mpi.strategies.choco_sgd import ChocoSgd
from dlion_mpi.strategies.types import Inbox
from dlion_mpi.vector.layout import Layout
from tests.contract.exchanging import Exchanging, drawn

LAYOUT = Layout.of([(5, 8), (10,)])
PARTS = [slice(0, 40), slice(40, 50)]


def mixing(n: int) -> np.ndarray:
    """The weights of a ring: of each worker, a third for itself and either neighbour; two have a half each."""
    matrix = np.zeros((n, n))
    for k in range(n):
        for j in {k, (k - 1) % n, (k + 1) % n}:
            matrix[k, j] = 1 / min(3, n)
    return matrix


@given(seed=st.integers(0, 100), n=st.integers(2, 6), steps=st.integers(1, 5))
def test_it_is_the_published_algorithm(seed: int, n: int, steps: int) -> None:
    """In float64, on all workers at once: a fifth of each variable, and the matrix of the ring."""
    gamma = 0.3
    workers = Exchanging("choco-sgd", n, LAYOUT, start=2.0, density=0.2, gamma=gamma)
    x, y = np.zeros((n, LAYOUT.size)), np.zeros((n, LAYOUT.size))
    for step in range(steps):
        movements = drawn(100 * step + seed, n, LAYOUT.size)
        workers.advance(movements)
        x += movements
        for k in range(n):
            difference = x[k] - y[k]
            for part in PARTS:
                order = np.argsort(-np.abs(difference[part]))[: (part.stop - part.start) // 5] + part.start
                y[k][order] += difference[order]
        x += gamma * (mixing(n) @ y - y)
        for k in range(n):
            np.testing.assert_allclose(workers.weights[k], 2 + x[k], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(workers.states[k].copy, y[k], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(workers.states[k].mean, (mixing(n) @ y)[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_type", ["float32", "sign"])
def test_the_mean_of_all_weights_moves_by_the_mean_movement(value_type: str) -> None:
    workers = Exchanging("choco-sgd", 5, LAYOUT, density=0.1, gamma=0.2, value_type=value_type)
    expected = np.zeros(LAYOUT.size)
    for step in range(20):
        movements = drawn(step, 5, LAYOUT.size)
        workers.advance(movements)
        expected += np.mean(movements, axis=0)
    np.testing.assert_allclose(np.mean(workers.weights, axis=0), expected, rtol=1e-3, atol=1e-4)
    assert np.std(workers.weights, axis=0).max() > 0.1


def test_gossip_alone_brings_all_to_the_mean() -> None:
    """Without further movements, at a rate that hardly depends on how few entries are sent."""
    workers = Exchanging("choco-sgd", 6, LAYOUT, density=0.1, gamma=0.2)
    movements = drawn(1, 6, LAYOUT.size)
    workers.advance(movements)
    before = np.std(workers.weights, axis=0).max()
    for _ in range(400):
        workers.advance([np.zeros(LAYOUT.size, np.float32)] * 6)
    assert np.std(workers.weights, axis=0).max() < 1e-3 * before
    np.testing.assert_allclose(workers.weights[0], np.mean(movements, axis=0), atol=2e-3)


def test_whole_messages_at_a_full_step_are_the_mean_of_the_neighbours() -> None:
    workers = Exchanging("choco-sgd", 4, LAYOUT, density=1.0, gamma=1.0)
    movements = drawn(2, 4, LAYOUT.size)
    workers.advance(movements)
    for k in range(4):
        expected = (movements[k - 1] + movements[k] + movements[(k + 1) % 4]) / 3
        np.testing.assert_allclose(workers.weights[k], expected, rtol=1e-4, atol=1e-5)


def test_messages_go_to_the_neighbours_and_only_these_are_waited_for() -> None:
    workers = Exchanging("choco-sgd", 5, LAYOUT)
    workers.advance(drawn(3, 5, LAYOUT.size))
    assert [sorted(outbox) for outbox in workers.sent] == [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]
    strategy, state = workers.strategies[0], workers.states[0]
    assert strategy.may_advance(state, 7, Inbox({1: 7, 2: 0, 3: 0, 4: 8}))
    assert not strategy.may_advance(state, 7, Inbox({1: 6, 2: 9, 3: 9, 4: 7}))
    assert strategy.may_advance(state, 7, Inbox({2: 0, 4: 7})), "a neighbour has left"


def test_a_resumed_worker_continues_with_the_same_bits() -> None:
    whole = Exchanging("choco-sgd", 3, LAYOUT)
    for step in range(5):
        whole.advance(drawn(step, 3, LAYOUT.size))
    again = whole.resumed()
    assert whole.strategies[0].to_arrays(whole.states[0]).keys() == {"moved", "copy", "mean"}
    for step in range(4):
        for workers in (whole, again):
            workers.advance(drawn(50 + step, 3, LAYOUT.size))
        assert whole.weights[1].tobytes() == again.weights[1].tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"density": 0}, "--choco-sgd.density 0: must be in "), ({"gamma": 2}, "--choco-sgd.gamma 2: must be in ")],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ChocoSgd(**options)
