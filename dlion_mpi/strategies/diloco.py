"""DiLoCo: many local steps, then an outer step with momentum on the mean of what they have moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.outer import nesterov
from dlion_mpi.config.fields import ABOVE_0, Bounds, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES
from dlion_mpi.strategies.local_sgd import LocalSgd, LocalState
from dlion_mpi.strategies.types import Plan
from dlion_mpi.vector.layout import Vector


@dataclass(slots=True, kw_only=True)
class DilocoState(LocalState):
    """``momentum``: (P,) float32, the outer momentum, equal on all workers."""

    momentum: Vector


class Diloco(LocalSgd):
    """Local SGD whose outer step has Nesterov momentum:

    ``m <- mu m + D``, ``theta <- theta - eta (D + mu m)``

    with the mean pseudo-gradient D and the anchor theta of `LocalSgd`, which has eta = 1 and mu = 0.
    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv 2311.08105.
    """

    name = "diloco"
    uses: ClassVar[Mapping[str, object]] = {**EQUAL_BATCHES, "value_type": "bfloat16"}

    @dataclass(frozen=True, kw_only=True)
    class Options(LocalSgd.Options):
        """The number of local steps, and the outer optimizer."""

        outer_learning_rate: float = option(0.7, "eta of the outer step", bounds=ABOVE_0)
        outer_momentum: float = option(0.9, "mu of the outer step", bounds=Bounds(0, 1 - 1e-9, "in [0, 1)"))

    options: Options

    def start(self, plan: Plan) -> DilocoState:
        size = plan.layout.size
        return DilocoState(plan, np.zeros(size, np.float32), momentum=np.zeros(size, np.float32))

    def outer(self, state: LocalState, moved: Vector) -> None:
        assert isinstance(state, DilocoState)
        eta, mu = self.options.outer_learning_rate, self.options.outer_momentum
        nesterov(state.anchor, state.momentum, moved, learning_rate=eta, decay=mu)
