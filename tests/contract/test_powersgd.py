"""PowerSGD: low-rank factors of every matrix, with error feedback; everything else summed as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.powersgd import PowerSgd
from dlion_mpi.strategies.types import Plan, Sum
from dlion_mpi.vector.layout import Layout, Vector
from tests.contract.problem import effects_of, local

LAYOUT = Layout.of([(6, 9), (9,), (), (3, 2, 5, 8), (8,), (2, 2)])
MATRICES = {"dense": (slice(0, 54), 6, 9), "kernel": (slice(64, 304), 30, 8)}
SMALL = np.r_[54:64, 304:316]


class Workers:
    """The strategies of ``n`` workers, and what they are about to apply."""

    def __init__(self, n: int = 2, layout: Layout = LAYOUT, **options: Any) -> None:
        self.layout = layout
        settings, ranks = Config(strategy="powersgd"), tuple(range(n))
        plans = [Plan(config=settings, rank=k, ranks=ranks, layout=layout) for k in ranks]
        self.strategies = [PowerSgd(**options) for _ in plans]
        self.states = [s.start(plan) for s, plan in zip(self.strategies, plans, strict=True)]
        self.sums: list[int] = []
        """Entries of the last step's sums."""

    def advance(self, gradients: list[Vector]) -> Vector:
        """The gradient that all workers apply in a step, in which theirs count alike."""
        n, self.sums = len(gradients), []
        weights = np.zeros(self.layout.size, np.float32)
        answers = [
            strategy.incoming(state, local(gradient, lbs=8, gbs=8 * n), weights.copy, [])
            for strategy, state, gradient in zip(self.strategies, self.states, gradients, strict=True)
        ]
        first, *others = effects_of(answers, self._note)
        assert first.gradient is not None
        for other in others:
            assert other.gradient is not None
            assert first.gradient.tobytes() == other.gradient.tobytes()
        return first.gradient

    def _note(self, request: Sum) -> None:
        self.sums.append(len(request.vector))

    def residuals(self) -> list[Vector]:
        return [state.residual.copy() for state in self.states]


def drawn(seed: int, n: int, size: int = LAYOUT.size) -> list[Vector]:
    return list(np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32))


def as_matrix(vector: Vector, name: str) -> np.ndarray:
    part, rows, columns = MATRICES[name]
    return vector[part].reshape(rows, columns)


@given(seed=st.integers(0, 200), n=st.integers(2, 4), rank=st.integers(1, 3), steps=st.integers(1, 4))
def test_what_was_summed_and_the_residuals_are_what_was_computed(seed: int, n: int, rank: int, steps: int) -> None:
    workers = Workers(n, rank=rank)
    for step in range(steps):
        gradients = drawn(1000 * step + seed, n)
        before = np.sum(workers.residuals(), axis=0)
        applied = workers.advance(gradients)
        accumulated = before + np.mean(gradients, axis=0)
        np.testing.assert_allclose(applied + np.sum(workers.residuals(), axis=0), accumulated, rtol=1e-4, atol=2e-5)
    assert all(np.abs(residual).max() > 0.01 for residual in workers.residuals())


@given(seed=st.integers(0, 200), rank=st.integers(1, 3))
def test_the_factors_are_orthogonal(seed: int, rank: int) -> None:
    """What a worker keeps has nothing in the columns that all have summed, and what they sum has ``rank`` columns."""
    workers = Workers(3, rank=rank)
    applied = workers.advance(drawn(seed, 3))
    for name in MATRICES:
        matrix = as_matrix(applied, name)
        assert np.linalg.matrix_rank(matrix, tol=1e-3) == rank
        for residual in workers.residuals():
            np.testing.assert_allclose(matrix.T @ as_matrix(residual, name), 0, atol=2e-4)


@pytest.mark.parametrize("rank", [1, 2])
def test_matrices_of_that_rank_are_summed_exactly(rank: int) -> None:
    random = np.random.default_rng(3)
    gradients = [np.zeros(LAYOUT.size, np.float32) for _ in range(3)]
    for name, (part, rows, columns) in MATRICES.items():
        left = random.normal(size=(rows, rank))
        for gradient in gradients:  # each worker has its own, in the same columns
            gradient[part] = (left @ random.normal(size=(rank, columns))).ravel()
            assert np.linalg.matrix_rank(as_matrix(gradient, name)) == rank
    workers = Workers(3, rank=rank)
    np.testing.assert_allclose(workers.advance(gradients), np.mean(gradients, axis=0), rtol=1e-4, atol=1e-5)
    assert max(np.abs(residual).max() for residual in workers.residuals()) < 1e-5


def test_small_variables_are_summed_as_they_are() -> None:
    gradients = drawn(5, 2)
    workers = Workers(2, rank=2)
    applied = workers.advance(gradients)
    np.testing.assert_array_equal(applied[SMALL], ((gradients[0] + gradients[1]) / 2)[SMALL])
    assert not workers.residuals()[0][SMALL].any()


@pytest.mark.parametrize(("rank", "factorised"), [(1, MATRICES), (3, MATRICES), (4, {"kernel"}), (7, {}), (50, {})])
def test_a_step_has_two_sums_of_the_factors_of_what_they_make_smaller(rank: int, factorised: Any) -> None:
    workers = Workers(2, rank=rank)
    workers.advance(drawn(5, 2))
    shapes = [MATRICES[name][1:] for name in factorised]
    dense = LAYOUT.size - sum(rows * columns for rows, columns in shapes)
    rows, columns = (rank * sum(shape[axis] for shape in shapes) for axis in (0, 1))
    assert workers.sums == [rows + dense, columns]


def test_it_finds_the_best_approximation_from_step_to_step() -> None:
    """The same gradient again and again, without residuals: then a step is one of power iteration."""
    (gradient,) = drawn(7, 1)
    workers = Workers(2, rank=2)
    for _ in range(60):
        for state in workers.states:
            state.residual.fill(0)
        applied = workers.advance([gradient, gradient])
    for name in MATRICES:
        u, s, v = np.linalg.svd(as_matrix(gradient, name), full_matrices=False)
        np.testing.assert_allclose(as_matrix(applied, name), (u[:, :2] * s[:2]) @ v[:2], atol=0.05)


def test_a_gradient_of_zeros_does_no_harm() -> None:
    workers = Workers(2, rank=2)
    nothing = np.zeros(LAYOUT.size, np.float32)
    assert not workers.advance([nothing, nothing]).any()
    gradients = drawn(8, 2)
    for _ in range(200):
        applied = workers.advance(gradients)
    np.testing.assert_allclose(np.isfinite(applied), True)
    total = np.sum(workers.residuals(), axis=0)
    assert np.abs(total).max() < 30 * np.abs(np.mean(gradients, axis=0)).max(), "what is kept does not grow for long"


def test_a_worker_alone_has_nothing_to_factorise() -> None:
    workers = Workers(1, rank=1)
    (gradient,) = drawn(5, 1)
    np.testing.assert_array_equal(workers.advance([gradient]), gradient)


def test_what_is_kept_is_all_that_a_resumed_worker_needs() -> None:
    whole, resumed = Workers(2, rank=2), Workers(2, rank=2)
    for seed in range(3):
        whole.advance(drawn(seed, 2))
    for k in (0, 1):
        kept = {name: np.array(value) for name, value in whole.strategies[k].to_arrays(whole.states[k]).items()}
        assert kept.keys() == {"residual", "right"}
        resumed.strategies[k].from_arrays(resumed.states[k], kept)
    np.testing.assert_array_equal(resumed.advance(drawn(9, 2)), whole.advance(drawn(9, 2)))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"--powersgd\.rank 0: must be at least 1"):
        PowerSgd(rank=0)
