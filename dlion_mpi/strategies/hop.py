"""Hop: neighbours in a graph average their parameters; token queues bound how far apart they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from dlion_mpi.strategies.contract import WINDOW, Effect, Inbox, LinkView, LocalGradient, Outgoing, Plan, Strategy
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, integer, integers, integers_by_rank, under
from dlion_mpi.wire import Kind, Message


@dataclass(slots=True)
class HopState:
    """``neighbours``: of this worker in the graph, those who are still there.

    ``newest``: by neighbour the iteration of the newest parameters that have come; ``sent``: of the last that it was
    sent. ``told``: the iteration for which everyone has a token. ``mean``: (P,) float32 buffer.
    """

    plan: Plan
    neighbours: frozenset[int]
    mean: Vector
    newest: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    told: int = -1


class Hop(Strategy):
    """Decentralised parallel SGD: ``x_{k+1} = mean_j x_j - eta g(x_k)`` over the neighbours j and the worker itself.

    Parameters are sent tagged with their iteration k before its gradient is computed.
    Token queues: nobody enters an iteration more than ``--hop-max-gap`` after a neighbour's; a message of iteration
    k, header or parameters, is the token for k. Backup workers: it goes on without ``--backup`` of its neighbours.
    Bounded staleness s: it goes on if the newest parameters of the others are of iteration k - s or later; what has
    come since the last iteration counts with weight ``iteration - (k - s) + 1``, normalised. Skipping: a worker that
    the foremost neighbour would soon wait for, s or more iterations behind it, leaves out up to ``--hop-skip``
    iterations, as far as its tokens go.
    `sync` is all neighbours' parameters of iteration k, no more and no less.
    Source: Luo et al., "Hop: Heterogeneity-Aware Decentralized Training", ASPLOS 2019, arXiv 1902.01064.
    """

    name: ClassVar[str] = "hop"
    restates: ClassVar[bool] = True
    sync_modes: ClassVar[tuple[str, ...]] = ("bounded", "sync")
    defaults: ClassVar[Mapping[str, object]] = {
        "staleness": 5,
        "backup": 1,
        "hop_graph": "all",
        "hop_max_gap": 8,
        "hop_skip": 10,
        "exchange_thread": "on",
        "window": WINDOW,
    }

    def start(self, plan: Plan) -> HopState:
        """See `Strategy.start`."""
        return HopState(plan, neighbours(plan), np.empty(plan.layout.size, np.float32))

    def opening(
        self, state: HopState, step: int, weights: Callable[[], Vector], links: Mapping[int, LinkView]
    ) -> tuple[HopState, dict[int, Outgoing]]:
        """This iteration's parameters to the neighbours; to one whose link is busy, the token alone meanwhile."""
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
        return state, messages

    def outgoing(
        self, state: HopState, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[HopState, dict[int, Outgoing]]:
        """Nothing: gradients stay at home."""
        return state, {}

    def incoming(
        self, state: HopState, local: LocalGradient, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[HopState, Effect]:
        """The weighted mean of the parameters that have come, and the own gradient for the optimizer."""
        step, gradient = local.step, local.vector
        arrived = {message.header.sender: message for message in messages}  # by step: the newest is the last
        state.newest |= {j: message.header.step for j, message in arrived.items()}
        skipped = _skipped(state, step)
        oldest = step + skipped - (state.plan.config.staleness or 0)
        parts = [(m.header.step - oldest + 1, m.entries.values) for m in arrived.values() if m.header.step >= oldest]
        if not parts:
            return state, Effect(gradient=gradient, skipped=skipped)
        if step >= oldest:
            parts.append((step - oldest + 1, weights()))
        total = sum(weight for weight, _ in parts)
        state.mean.fill(0)
        for weight, x in parts:
            state.mean += np.float32(weight / total) * x
        return state, Effect(weights=state.mean, gradient=gradient, skipped=skipped)

    def may_advance(self, state: HopState, step: int, inbox: Inbox) -> bool:
        """With a token for the next iteration and recent enough parameters from all, but for the backup workers."""
        config = state.plan.config
        live = state.neighbours & inbox.newest.keys()
        if config.hop_max_gap and any(inbox.newest[j] < step + 1 - config.hop_max_gap for j in live):
            return False
        iterations = state.newest | {message.header.sender: message.header.step for message in inbox.held}
        recent = [j for j in live if iterations.get(j, -1) >= step - (config.staleness or 0)]
        return len(recent) >= len(live) - (config.backup or 0)

    def to_arrays(self, state: HopState) -> Arrays:
        """Of every neighbour the newest iteration that has come from it, and that it was sent."""
        newest = under("newest", integers(**{str(j): step for j, step in state.newest.items()}))
        sent = under("sent", integers(**{str(j): step for j, step in state.sent.items()}))
        return {**newest, **sent, **integers(told=state.told)}

    def from_arrays(self, state: HopState, arrays: Mapping[str, Array]) -> HopState:
        """See `Resumable.from_arrays`."""
        state.newest = integers_by_rank(arrays, "newest", state.plan.ranks)
        state.sent = integers_by_rank(arrays, "sent", state.plan.ranks)
        state.told = integer(arrays, "told")
        return state


def neighbours(plan: Plan) -> frozenset[int]:
    """The graph: everyone (``all``), or the next rank on either side (``ring``)."""
    if plan.config.hop_graph == "ring":
        ranks = plan.ranks
        place = ranks.index(plan.rank)
        return frozenset({ranks[place - 1], ranks[(place + 1) % len(ranks)]} - {plan.rank})
    return frozenset(plan.ranks) - {plan.rank}


def _skipped(state: HopState, step: int) -> int:
    """How many iterations to leave out after ``step``, by what is known of the neighbours' iterations."""
    config = state.plan.config
    known = [state.newest.get(j, -1) for j in state.neighbours]
    if not known or not config.hop_skip or not config.hop_max_gap:
        return 0
    behind = max(known) - (step + 1)
    if behind < max(1, config.staleness or 0):
        return 0
    tokens = min(known) + config.hop_max_gap - (step + 1)
    return max(0, min(behind, config.hop_skip, tokens))
