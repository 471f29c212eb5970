"""Ako: accumulated gradients, one partition of them to every peer at a time."""

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
from dlion_mpi.strategies.types import Effect, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, StateError
from dlion_mpi.wire import Message


@dataclass(slots=True)
class AkoState(State):
    """``accumulated``: (P,) float32, not sent to anyone yet. ``missed``: what single peers lack.

    ``start``: where the next partition begins. ``effective``: (P,) float32, a buffer.
    """

    accumulated: Vector
    missed: Missed
    effective: Vector = transient()
    start: int = 0


class Ako(Strategy):
    """``acc <- acc + g``; partition t mod P of ``acc`` goes to every peer and is zeroed; arrivals are added at once.

    Every entry reaches every peer exactly once, at most P steps late, and no worker waits. P is
    ``ceil(gamma m (n - 1) / B)`` with gamma steps per second, m bytes of gradient and B bytes per second over all
    links, so that what is sent fits them; or a fixed number. A link that is not ready misses its turn: its part waits
    until the partition comes round again.
    Source: Watcharapichat et al., "Ako: Decentralised Deep Learning with Partial Gradient Exchange", SoCC 2016.
    """

    name = "ako"
    modes = ("async", "bounded")
    uses: ClassVar[Mapping[str, object]] = {"staleness": 5}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The number of partitions."""

        partitions: int = option(0, "parts of a gradient, one per step; 0: as links ask for", bounds=at_least(0))

    options: Options

    def selects_in_background(self, plan: Plan) -> bool:
        return True

    def start(self, plan: Plan) -> AkoState:
        size = plan.layout.size
        return AkoState(plan, np.zeros(size, np.float32), Missed(size), np.empty(size, np.float32))

    def outgoing(self, state: AkoState, local: LocalUpdate, links: LinkViews) -> Outbox:
        """This step's partition to every peer. In `bounded`, a link that is not ready gets a header."""
        if not links:
            return {}
        state.accumulated += local.vector
        size = len(state.accumulated)
        part = _partition(state.start, partitions(self.options.partitions, size, links), size)
        entries = Entries(size, state.accumulated[part].copy(), np.arange(part.start, part.stop, dtype=np.uint32))
        state.accumulated[part] = 0
        state.start = part.stop % size
        messages = {peer: Outgoing() for peer in (links if state.plan.config.mode.reports_progress else ())}
        for peer, link in links.items():
            due = state.missed.due(peer, entries, link.ready)
            if due is not None:
                messages[peer] = Outgoing(entries=due, quality=100 * len(due) / size)
        return messages

    def incoming(self, state: AkoState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """``(1/n) (g + all arrivals)``."""
        share = 1 / len(state.plan.ranks)
        np.multiply(local.vector, np.float32(share), out=state.effective)
        for message in messages:
            message.entries.add_to(state.effective, share)
        return Effect(gradient=state.effective)

    def from_arrays(self, state: AkoState, arrays: Mapping[str, Array]) -> None:
        super().from_arrays(state, arrays)
        if not 0 <= state.start < len(state.accumulated):
            raise StateError(f"start is {state.start}, expected an entry of the gradient")


def partitions(wanted: int | None, size: int, links: LinkViews) -> int:
    """P: ``wanted``, or if that is 0 what the links carry in a step, of which each has B / gamma / (n - 1)."""
    if wanted:
        return min(wanted, size)
    budget_bytes = sum(link.budget_bytes for link in links.values())
    return min(size, max(1, math.ceil(4 * size * len(links) / max(budget_bytes, 1.0))))


def _partition(start: int, count: int, size: int) -> slice:
    """The entries from ``start`` to the next border of those that cut ``size`` entries into ``count`` parts."""
    border = start * count // size + 1
    while border * size // count <= start:
        border += 1
    return slice(start, border * size // count)
