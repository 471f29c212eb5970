"""Baseline: synchronous, all-to-all, full gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message


@dataclass(slots=True)
class Mean(State):
    """``mean``: (P,) float32, a buffer."""

    mean: Vector = transient()


class Baseline(Strategy):
    """``w <- w - eta (1/n) sum_j g_j`` with every worker's whole gradient of the same step.

    Source: the all-to-all Baseline of DLion (HPDC 2021); see docs/algorithms.md.
    """

    name = "baseline"
    modes = ("sync",)

    def start(self, plan: Plan) -> Mean:
        return Mean(plan, np.empty(plan.layout.size, np.float32))

    def outgoing(self, state: Mean, local: LocalUpdate, links: LinkViews) -> Outbox:
        return dict.fromkeys(links, Outgoing(entries=Entries(len(local.vector), local.vector), quality=100.0))

    def incoming(self, state: Mean, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        share = 1 / (1 + len(messages))
        np.multiply(local.vector, np.float32(share), out=state.mean)
        for message in messages:
            message.entries.add_to(state.mean, share)
        return Effect(gradient=state.mean)
