"""PowerSGD: gradients as low-rank factors, which are summed in place of the matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlion_mpi.config.fields import at_least, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES, Strategy
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, Inbox, LocalUpdate, Plan, Sum, Sums, Weights
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.wire import Message

Matrix = npt.NDArray[np.float32]


@dataclass(slots=True)
class PowerSgdState(State):
    """``residual``: (P,) float32, weighted gradients that no sum has carried yet.

    ``right``: (R,) float32, the right factors of all matrices in the last step, equal on all workers. ``matrices``: the
    variables that are factorised, as (entries, rows, columns). ``dense``: the places of all other entries.
    """

    residual: Vector
    right: Vector
    matrices: list[tuple[slice, int, int]] = transient()
    dense: npt.NDArray[np.intp] = transient()


class PowerSgd(Strategy):
    """A step of power iteration for every matrix: ``P = orthogonal(sum_k M_k Q)``, ``Q <- sum_k M_k^T P``.

    Q is the right factor of the last step, P and Q have r columns, and ``P Q^T`` approximates ``sum_k M_k``, where M_k
    is the weighted gradient of worker k plus its residual. The residual becomes ``M_k - P (M_k^T P)^T``. Variables that
    factors would not make smaller join the first sum as they are.
    Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019, arXiv 1905.13727, algorithms 1 and 2.
    """

    name = "powersgd"
    modes = ("sync",)
    uses = EQUAL_BATCHES

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The size of the factors."""

        rank: int = option(2, "columns of the factors; more cost more and lose less", bounds=at_least(1))

    options: Options

    def start(self, plan: Plan) -> PowerSgdState:
        rank, size = self.options.rank, plan.layout.size
        matrices = list(_matrices(plan.layout, rank)) if len(plan.ranks) > 1 else []
        whole = np.ones(size, np.bool_)
        for part, _, _ in matrices:
            whole[part] = False
        random = np.random.default_rng(plan.config.seed)  # the same on all workers
        right = random.standard_normal(rank * sum(columns for _, _, columns in matrices), np.float32)
        return PowerSgdState(plan, np.zeros(size, np.float32), right, matrices, np.flatnonzero(whole))

    def may_advance(self, state: PowerSgdState, step: int, inbox: Inbox) -> bool:
        return True  # the sums are what a step waits for

    def incoming(
        self, state: PowerSgdState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]
    ) -> Sums[Effect]:
        state.residual += np.float32(local.lbs / local.gbs) * local.vector
        own = [state.residual[part].reshape(rows, columns) for part, rows, columns in state.matrices]
        rows, columns = ([matrix.shape[axis] for matrix in own] for axis in (0, 1))
        gradient = np.empty_like(state.residual)

        left = _joined(matrix @ q for matrix, q in zip(own, self._factors(state.right, columns), strict=True))
        total = yield Sum(np.concatenate([left, state.residual[state.dense]]))
        gradient[state.dense], state.residual[state.dense] = total[len(left) :], 0
        bases = [np.linalg.qr(p)[0] for p in self._factors(total, rows)]

        factors = [matrix.T @ p for matrix, p in zip(own, bases, strict=True)]
        for matrix, p, q in zip(own, bases, factors, strict=True):
            matrix -= p @ q.T
        state.right[:] = yield Sum(_joined(factors))
        for (part, _, _), p, q in zip(state.matrices, bases, self._factors(state.right, columns), strict=True):
            gradient[part] = (p @ q.T).ravel()
        return Effect(gradient=gradient)

    def _factors(self, vector: Vector, heights: Iterable[int]) -> Iterator[Matrix]:
        """The factors of these heights that lie in ``vector``, one after the other."""
        start, rank = 0, self.options.rank
        for height in heights:
            yield vector[start : start + rank * height].reshape(height, rank)
            start += rank * height


def _matrices(layout: Layout, rank: int) -> Iterator[tuple[slice, int, int]]:
    """The variables of which the factors are smaller: their entries, rows and columns (the last dimension)."""
    for shape, start, stop in zip(layout.shapes, layout.starts, layout.starts[1:], strict=False):
        columns = shape[-1] if shape else 1
        rows = (stop - start) // columns if columns else 0
        if rank * (rows + columns) < rows * columns:
            yield slice(start, stop), rows, columns


def _joined(matrices: Iterable[Matrix]) -> Vector:
    return np.concatenate([np.empty(0, np.float32), *(matrix.ravel() for matrix in matrices)])
