"""Local SGD: many local steps, then the mean of all workers' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.config.fields import at_least, option
from dlion_mpi.strategies.contract import EQUAL_BATCHES, SUMMED_TYPES, Strategy
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State
from dlion_mpi.strategies.types import Effect, Inbox, LocalUpdate, Plan, Sum, Sums, Weights
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Message


@dataclass(slots=True)
class LocalState(State):
    """``anchor``: (P,) float32, the weights after the last outer step, equal on all workers.

    Since the last outer step: ``steps`` of this worker, ``samples`` that it has computed and ``all_samples`` of all
    workers.
    """

    anchor: Vector
    steps: int = 0
    samples: int = 0
    all_samples: int = 0


class LocalSgd(Strategy):
    """H local steps by the model's own optimizer, then an outer step on the mean pseudo-gradient D:

    ``D = sum_k c_k (theta - w_k)``, ``theta <- theta - D``, ``w_k <- theta``

    with the anchor theta, and c_k the share of all samples since the last outer step that worker k has computed. So all
    continue with the mean of their weights (federated averaging). The optimizer's state stays local.
    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017;
    Lin et al., "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020.
    """

    name = "local-sgd"
    modes = ("sync",)
    exchanges = "movements"
    uses: ClassVar[Mapping[str, object]] = {**EQUAL_BATCHES, "value_type": "float32"}
    value_types = SUMMED_TYPES

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The number of local steps."""

        h: int = option(16, "local steps between two exchanges", bounds=at_least(1))

    options: Options

    def start(self, plan: Plan) -> LocalState:
        return LocalState(plan, np.zeros(plan.layout.size, np.float32))

    def outer(self, state: LocalState, moved: Vector) -> None:
        """The outer step: move the anchor, given the mean pseudo-gradient, (P,) float32."""
        state.anchor -= moved

    def may_advance(self, state: LocalState, step: int, inbox: Inbox) -> bool:
        return True  # only an outer step waits, for its sum

    def incoming(self, state: LocalState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """A local step."""
        if state.steps == 0:
            state.anchor[:] = weights()
        return Effect(movement=local.vector)

    def between(self, state: LocalState, local: LocalUpdate, weights: Weights) -> Sums[Effect | None]:
        """The outer step after every H local steps."""
        state.steps += 1
        state.samples += local.lbs
        state.all_samples += local.gbs
        if state.steps < self.options.h:
            return None
        share = np.float32(state.samples / state.all_samples)
        moved = yield Sum(share * (state.anchor - weights()), state.plan.config.value_type or "float32")
        state.steps = state.samples = state.all_samples = 0
        self.outer(state, moved)
        return Effect(weights=state.anchor)
