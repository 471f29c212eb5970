"""CHOCO-SGD: gossip in a ring with compressed differences between weights and the copies that neighbours have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.sparse import largest, take_out
from dlion_mpi.config.fields import Bounds, option
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.hop import neighbours
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, Inbox, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Message

SHARE = Bounds(1e-9, 1, "in (0, 1]")


@dataclass(slots=True)
class ChocoState(State):
    """All weights count from the initial ones, which all workers share. Each is (P,) float32.

    ``moved``: x of this worker. ``copy``: its copy at the neighbours. ``mean``: of the copies of the neighbours and its
    own.
    """

    moved: Vector
    copy: Vector
    mean: Vector
    neighbours: frozenset[int] = transient()


class ChocoSgd(Strategy):
    """``x <- x + u``, ``q = C(x - y)``, ``y_j <- y_j + q_j`` for all neighbours j and the worker itself, then

    ``x <- x + gamma (mean_j y_j - y)``

    with the movement u of the worker's own optimizer, and the copies y that all neighbours of a worker have of its x. C
    keeps the largest entries of each variable. Neighbours are the next ranks on either side. The mean over all workers
    of x moves by the mean of u, whatever C leaves out.
    Source: Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
    Communication", ICML 2019, arXiv 1902.00340, algorithm 2.
    """

    name = "choco-sgd"
    modes = ("sync",)
    exchanges = "movements"
    uses: ClassVar[Mapping[str, object]] = {"value_type": "float32"}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The density of messages, and the step of the gossip."""

        density: float = option(0.1, "share of each variable that is sent", bounds=SHARE)
        gamma: float = option(0.4, "step towards the neighbours; lower with a lower density", bounds=SHARE)

    options: Options

    def start(self, plan: Plan) -> ChocoState:
        zeros = np.zeros(plan.layout.size, np.float32)
        return ChocoState(plan, zeros, zeros.copy(), zeros.copy(), neighbours(plan, "ring"))

    def outgoing(self, state: ChocoState, local: LocalUpdate, links: LinkViews) -> Outbox:
        """The largest entries of the difference to the neighbours."""
        state.moved += local.vector
        difference = state.moved - state.copy
        indices = largest(difference, state.plan.layout.segments(), self.options.density).astype(np.uint32)
        value_type = state.plan.config.value_type or "float32"
        sent = take_out(difference, indices, value_type)
        sent.add_to(state.copy, 1.0)
        sent.add_to(state.mean, 1 / (1 + len(state.neighbours)))
        message = Outgoing(entries=sent, quality=100 * len(sent) / sent.size, value_type=value_type)
        return {peer: message for peer in links if peer in state.neighbours}

    def may_advance(self, state: ChocoState, step: int, inbox: Inbox) -> bool:
        """With this step's messages of the live neighbours."""
        return all(inbox.newest[j] >= step for j in state.neighbours & inbox.newest.keys())

    def incoming(self, state: ChocoState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """The worker's own movement, and the step towards its neighbours."""
        for message in messages:
            message.entries.add_to(state.mean, 1 / (1 + len(state.neighbours)))
        correction = np.float32(self.options.gamma) * (state.mean - state.copy)
        state.moved += correction
        return Effect(movement=local.vector + correction)
