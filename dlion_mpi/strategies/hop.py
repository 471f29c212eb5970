"""Hop: workers exchange their parameters; token queues bound how far apart they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from dlion_mpi.config.fields import at_least, option
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, Inbox, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Kind, Message


@dataclass(slots=True)
class HopState(State):
    """``newest``: by neighbour, the iteration of its newest parameters here; ``sent``: of the last sent to it.

    ``reported``: the last iteration for which the live ``neighbours`` have a token. ``mean``: (P,) float32, a buffer.
    """

    neighbours: frozenset[int] = transient()
    mean: Vector = transient()
    newest: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    reported: int = -1


class Hop(Strategy):
    """Decentralised parallel SGD: ``x_{k+1} = mean_j x_j + u(x_k)`` over the neighbours j and the worker itself.

    u is the movement of the weights by this worker's optimizer. Parameters of iteration k are sent before it is
    computed. A message of iteration k is a token for k: no worker enters an iteration more than ``--hop.max-gap`` after
    a neighbour's token. Parameters of iteration k - s or later count with ``iteration - (k - s) + 1``
    (``--staleness`` s), in `sync` those of k only. A straggler may skip.
    Source: Luo et al., "Hop: Heterogeneity-Aware Decentralized Training", ASPLOS 2019, arXiv 1902.01064.
    """

    name = "hop"
    modes = ("bounded", "sync")
    restates = True
    exchanges = "movements"
    uses: ClassVar[Mapping[str, object]] = {"staleness": 5, "backup": 1}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The graph, and how far apart two neighbours may be."""

        graph: str = option("all", "workers to average with: all, or the ranks on either side", choices=("all", "ring"))
        max_gap: int = option(8, "most steps ahead of a neighbour", bounds=at_least(1), idle={"sync": ("sync",)})
        skip: int = option(10, "most steps that a straggler skips", bounds=at_least(0), idle={"sync": ("sync",)})

    options: Options

    def start(self, plan: Plan) -> HopState:
        return HopState(plan, neighbours(plan, self.options.graph), np.empty(plan.layout.size, np.float32))

    def before_compute(self, state: HopState, step: int, weights: Weights, links: LinkViews) -> Outbox:
        """This iteration's parameters to the neighbours; on a busy link only the token, the parameters later."""
        state.neighbours &= links.keys()
        peers, always = sorted(state.neighbours), state.plan.config.mode.lockstep
        messages = {peer: Outgoing() for peer in peers if state.reported < step}
        state.reported = step
        due = [p for p in peers if state.sent.get(p, -1) < step and (always or (links[p].ready and links[p].idle))]
        if due:
            whole = Outgoing(entries=Entries(state.plan.layout.size, weights()), kind=Kind.WEIGHTS, quality=100.0)
            messages |= dict.fromkeys(due, whole)
            state.sent |= dict.fromkeys(due, step)
        return messages

    def incoming(self, state: HopState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """The weighted mean of the parameters that have arrived, plus the local movement."""
        arrived = {message.header.sender: message for message in messages}  # by step: the newest is the last
        state.newest |= {j: message.header.step for j, message in arrived.items()}
        skipped = self._skipped(state, local.step)
        oldest = local.step + skipped - (state.plan.config.staleness or 0)
        parts = [(m.header.step - oldest + 1, m.entries.values) for m in arrived.values() if m.header.step >= oldest]
        if not parts:
            return Effect(movement=local.vector, skipped=skipped)
        if local.step >= oldest:
            parts.append((local.step - oldest + 1, weights()))
        total = sum(weight for weight, _ in parts)
        state.mean.fill(0)
        for weight, x in parts:
            state.mean += np.float32(weight / total) * x
        return Effect(weights=state.mean, movement=local.vector, skipped=skipped)

    def may_advance(self, state: HopState, step: int, inbox: Inbox) -> bool:
        """With a token for the next iteration, and recent parameters from all but the backup workers."""
        config, live = state.plan.config, state.neighbours & inbox.newest.keys()
        newest = state.newest | {message.header.sender: message.header.step for message in inbox.held}
        recent = sum(newest.get(j, -1) >= step - (config.staleness or 0) for j in live) + (config.backup or 0)
        return recent >= len(live) and all(inbox.newest[j] > step - self.options.max_gap for j in live)

    def _skipped(self, state: HopState, step: int) -> int:
        """The number of iterations to leave out after ``step``, by what is known of the neighbours' iterations."""
        ahead = [state.newest.get(j, -1) - (step + 1) for j in state.neighbours]
        if max(ahead, default=0) < max(1, state.plan.config.staleness or 0):
            return 0
        return max(0, min(max(ahead), self.options.skip, min(ahead) + self.options.max_gap))


def neighbours(plan: Plan, graph: str) -> frozenset[int]:
    """The graph: every other rank (``all``), or the next rank on either side (``ring``)."""
    ranks, place = plan.ranks, plan.ranks.index(plan.rank)
    peers = {ranks[place - 1], ranks[(place + 1) % len(ranks)]} if graph == "ring" else {*ranks}
    return frozenset(peers - {plan.rank})
