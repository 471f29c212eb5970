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
from dlion_mpi.strategies.types import Effect, Inbox, LinkView, LocalGradient, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Kind, Message


@dataclass(slots=True)
class HopState(State):
    """``neighbours``: of this worker in the graph, those that are live. ``mean``: (P,) float32, a buffer.

    ``newest``: by neighbour, the iteration of its newest parameters here. ``sent``: of the last parameters sent to it.
    ``told``: the last iteration for which every neighbour has a token.
    """

    neighbours: frozenset[int] = transient()
    mean: Vector = transient()
    newest: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    told: int = -1


SYNC = {"sync": ("sync",)}


class Hop(Strategy):
    """Decentralised parallel SGD: ``x_{k+1} = mean_j x_j - eta g(x_k)`` over the neighbours j and the worker itself.

    Parameters are sent before their gradient is computed, tagged with their iteration k. Any message of iteration k is
    a token for k: nobody enters an iteration more than ``--hop.max-gap`` after a neighbour's. A worker advances without
    ``--backup`` of its neighbours, and with parameters of iteration k - s or later (``--staleness`` s); what has
    arrived counts with weight ``iteration - (k - s) + 1``, normalised. A worker that is s or more iterations behind the
    foremost neighbour leaves out up to ``--hop.skip`` iterations, as far as its tokens allow. `sync`: all neighbours'
    parameters of iteration k, no more and no less.
    Source: Luo et al., "Hop: Heterogeneity-Aware Decentralized Training", ASPLOS 2019, arXiv 1902.01064.
    """

    name = "hop"
    modes = ("bounded", "sync")
    restates = True
    uses: ClassVar[Mapping[str, object]] = {"staleness": 5, "backup": 1}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The graph, and how far apart two neighbours may be."""

        graph: str = option("all", "workers to average with: all, or the ranks on either side", choices=("all", "ring"))
        max_gap: int = option(8, "most steps ahead of a neighbour", bounds=at_least(1, "step"), idle=SYNC)
        skip: int = option(10, "most steps that a straggler leaves out at once; 0: none", bounds=at_least(0), idle=SYNC)

    options: Options

    def start(self, plan: Plan) -> HopState:
        return HopState(plan, neighbours(plan, self.options.graph), np.empty(plan.layout.size, np.float32))

    def before_compute(
        self, state: HopState, step: int, weights: Weights, links: Mapping[int, LinkView]
    ) -> dict[int, Outgoing]:
        """This iteration's parameters to the neighbours; on a busy link only the token, the parameters later."""
        state.neighbours &= links.keys()
        peers = sorted(state.neighbours)
        messages = {peer: Outgoing() for peer in peers if state.told < step}
        state.told = step
        always = state.plan.config.mode.lockstep
        due = [p for p in peers if state.sent.get(p, -1) < step and (always or (links[p].ready and links[p].idle))]
        if due:
            whole = Outgoing(entries=Entries(state.plan.layout.size, weights()), kind=Kind.WEIGHTS, quality=100.0)
            messages |= dict.fromkeys(due, whole)
            state.sent |= dict.fromkeys(due, step)
        return messages

    def incoming(self, state: HopState, local: LocalGradient, weights: Weights, messages: Sequence[Message]) -> Effect:
        """The weighted mean of the parameters that have arrived, and the local gradient for the optimizer."""
        step, gradient = local.step, local.vector
        arrived = {message.header.sender: message for message in messages}  # by step: the newest is the last
        state.newest |= {j: message.header.step for j, message in arrived.items()}
        skipped = _skipped(state, step, self.options)
        oldest = step + skipped - (state.plan.config.staleness or 0)
        parts = [(m.header.step - oldest + 1, m.entries.values) for m in arrived.values() if m.header.step >= oldest]
        if not parts:
            return Effect(gradient=gradient, skipped=skipped)
        if step >= oldest:
            parts.append((step - oldest + 1, weights()))
        total = sum(weight for weight, _ in parts)
        state.mean.fill(0)
        for weight, x in parts:
            state.mean += np.float32(weight / total) * x
        return Effect(weights=state.mean, gradient=gradient, skipped=skipped)

    def may_advance(self, state: HopState, step: int, inbox: Inbox) -> bool:
        """With a token for the next iteration, and recent parameters from all but the backup workers."""
        config = state.plan.config
        live = state.neighbours & inbox.newest.keys()
        if any(inbox.newest[j] < step + 1 - self.options.max_gap for j in live):
            return False
        iterations = state.newest | {message.header.sender: message.header.step for message in inbox.held}
        recent = [j for j in live if iterations.get(j, -1) >= step - (config.staleness or 0)]
        return len(recent) >= len(live) - (config.backup or 0)


def neighbours(plan: Plan, graph: str) -> frozenset[int]:
    """The graph: every other rank (``all``), or the next rank on either side (``ring``)."""
    ranks, place = plan.ranks, plan.ranks.index(plan.rank)
    peers = {ranks[place - 1], ranks[(place + 1) % len(ranks)]} if graph == "ring" else {*ranks}
    return frozenset(peers - {plan.rank})


def _skipped(state: HopState, step: int, options: Hop.Options) -> int:
    """The number of iterations to leave out after ``step``, by what is known of the neighbours' iterations."""
    known = [state.newest.get(j, -1) for j in state.neighbours]
    behind = max(known, default=-1) - (step + 1)
    if behind < max(1, state.plan.config.staleness or 0):
        return 0
    tokens = min(known) + options.max_gap - (step + 1)
    return max(0, min(behind, options.skip, tokens))
