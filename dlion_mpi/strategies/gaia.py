"""Gaia: updates travel when they are significant, and no worker reads entries that are known to be outdated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.config.fields import at_least, option
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.missed import Missed
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, Inbox, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message, encoded_bytes


@dataclass(slots=True)
class GaiaState(State):
    """``accumulated``: (P,) float32, local updates not sent to anyone yet. ``missed``: what single peers lack.

    ``reported``: the last step that all peers were informed of. ``effective``: (P,) float32, a buffer.
    """

    accumulated: Vector
    missed: Missed
    effective: Vector = transient()
    reported: int = -1


class Gaia(Strategy):
    """Approximate Synchronous Parallel: ``acc <- acc + u``; entry i is sent when ``|acc_i| > S_t |w_i|``, then zeroed.

    ``u`` is the movement of the weights by this worker's optimizer, over n. A peer adds it to its weights.
    ``S_t = S_0 / sqrt(t)``, t from 1. Selective barrier: the indices of a message that takes its link longer than a
    step go first, and the peer does not compute before the values arrive. Mirror clock: no worker is more than
    ``--staleness`` steps ahead of the slowest (`bounded`).
    Source: Hsieh et al., "Gaia: Geo-Distributed Machine Learning Approaching LAN Speeds", NSDI 2017, section 3.
    """

    name = "gaia"
    modes = ("bounded", "async")
    exchanges = "movements"
    uses: ClassVar[Mapping[str, object]] = {"staleness": 5}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The threshold of significance, and the barrier for late updates."""

        threshold: float = option(0.01, "significant share of a weight, over the root of the step", bounds=at_least(0))
        barrier: str = option("selective", "wait for late significant updates or not", choices=("selective", "none"))

    options: Options

    def start(self, plan: Plan) -> GaiaState:
        size = plan.layout.size
        return GaiaState(plan, np.zeros(size, np.float32), Missed(size), np.empty(size, np.float32))

    def before_compute(self, state: GaiaState, step: int, weights: Weights, links: LinkViews) -> Outbox:
        """The significant updates so far to every peer; in `bounded`, at least a header."""
        config, size, waits = state.plan.config, len(state.accumulated), self.options.barrier == "selective"
        entries = Entries(size, np.empty(0, np.float32), np.empty(0, np.uint32))
        is_new, state.reported = state.reported < step, step
        if is_new:
            entries = _significant(state, weights(), threshold(self.options.threshold, step))
        messages = {peer: Outgoing() for peer in (links if is_new and config.mode.reports_progress else ())}
        for peer, link in links.items():
            due = state.missed.due(peer, entries, link.ready, everything=True)
            if due is not None and len(due):
                slow = encoded_bytes(due.indices, size) > link.budget_bytes
                messages[peer] = Outgoing(entries=due, quality=100 * len(due) / size, announced=slow and waits)
        return messages

    def incoming(self, state: GaiaState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """This worker's update and those that have arrived."""
        np.multiply(local.vector, np.float32(1 / len(state.plan.ranks)), out=state.effective)
        state.accumulated += state.effective
        for message in messages:
            message.entries.add_to(state.effective, 1.0)
        return Effect(movement=state.effective)

    def may_advance(self, state: GaiaState, step: int, inbox: Inbox) -> bool:
        """By the mirror clock, and with all announced values."""
        return not inbox.announced and super().may_advance(state, step, inbox)


def threshold(first: float, step: int) -> float:
    """``S_t = S_0 / sqrt(t)``; ``step`` counts from 0."""
    return first / math.sqrt(step + 1)


def _significant(state: GaiaState, weights: Vector, least: float) -> Entries:
    """Take the entries with ``|acc| > least |w|`` out of ``accumulated``; all entries, if that is no larger message."""
    size = len(weights)
    indices = np.flatnonzero(np.abs(state.accumulated) > np.abs(weights) * np.float32(least)).astype(np.uint32)
    dense = len(indices) > 0 and encoded_bytes(indices, size) >= encoded_bytes(None, size)
    places = slice(None) if dense else indices
    entries = Entries(size, state.accumulated[places].copy(), None if dense else indices)
    state.accumulated[places] = 0
    return entries
