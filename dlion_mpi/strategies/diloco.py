"""DiLoCo: many local steps, then an outer step on the mean of what they have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlion_mpi.config.fields import ABOVE_0, Bounds, at_least, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES, Strategy
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State
from dlion_mpi.strategies.types import Effect, Inbox, LocalUpdate, Plan, Sum, Sums, Weights
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Message


@dataclass(slots=True)
class DilocoState(State):
    """``anchor``: (P,) float32, the weights after the last outer step. ``momentum``: (P,) float32, the outer momentum.

    Both are equal on all workers. Since the last outer step: ``steps`` of this worker, ``samples`` that it has computed
    and ``all_samples`` of all workers.
    """

    anchor: Vector
    momentum: Vector
    steps: int = 0
    samples: int = 0
    all_samples: int = 0


class Diloco(Strategy):
    """H local steps by the model's own optimizer, then Nesterov momentum on the mean pseudo-gradient D:

    ``D = sum_k c_k (theta - w_k)``, ``m <- mu m + D``, ``theta <- theta - eta (D + mu m)``, ``w_k <- theta``

    with the anchor theta, and c_k the share of all samples since the last outer step that worker k has computed. The
    optimizer's state stays local. With eta = 1 and mu = 0 it is FedAvg (McMahan et al., AISTATS 2017).
    Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv 2311.08105.
    """

    name = "diloco"
    modes = ("sync",)
    exchanges = "movements"
    uses = EQUAL_BATCHES

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The number of local steps, and the outer optimizer."""

        h: int = option(16, "local steps between two outer steps", bounds=at_least(1))
        outer_learning_rate: float = option(0.7, "eta of the outer step", bounds=ABOVE_0)
        outer_momentum: float = option(0.9, "mu of the outer step", bounds=Bounds(0, 1 - 1e-9, "in [0, 1)"))

    options: Options

    def start(self, plan: Plan) -> DilocoState:
        size = plan.layout.size
        return DilocoState(plan, np.zeros(size, np.float32), np.zeros(size, np.float32))

    def may_advance(self, state: DilocoState, step: int, inbox: Inbox) -> bool:
        return True  # only an outer step waits, for its sum

    def incoming(self, state: DilocoState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """A local step."""
        if state.steps == 0:
            state.anchor[:] = weights()
        return Effect(movement=local.vector)

    def between(self, state: DilocoState, local: LocalUpdate, weights: Weights) -> Sums[Effect | None]:
        """The outer step after every H local steps."""
        state.steps += 1
        state.samples += local.lbs
        state.all_samples += local.gbs
        if state.steps < self.options.h:
            return None
        moved = yield Sum(np.float32(state.samples / state.all_samples) * (state.anchor - weights()))
        state.steps = state.samples = state.all_samples = 0
        state.momentum *= np.float32(self.options.outer_momentum)
        state.momentum += moved
        moved += np.float32(self.options.outer_momentum) * state.momentum
        return Effect(weights=state.anchor - np.float32(self.options.outer_learning_rate) * moved)
