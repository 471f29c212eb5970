"""Ako: accumulated gradients, a partition of them to everyone at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.strategies.contract import (
    WINDOW,
    Effect,
    Inbox,
    LinkView,
    LocalGradient,
    Missed,
    Outgoing,
    Plan,
    Strategy,
    may_advance,
)
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays, StateError, integer, integers, under, vector
from dlion_mpi.wire import Message


@dataclass(slots=True)
class AkoState:
    """``accumulated``: (P,) float32, what nobody has been sent. ``missed``: what single peers have not got.

    ``start``: where the next partition begins. ``effective``: (P,) float32 buffer.
    """

    plan: Plan
    accumulated: Vector
    missed: Missed
    effective: Vector
    start: int = 0


class Ako(Strategy):
    """``acc <- acc + g``; partition t mod P of ``acc`` to every peer, then zeroed; whatever comes is added at once.

    Every entry reaches every peer exactly once, at most P steps late, and nobody waits. P is
    ``ceil(gamma m (n - 1) / B)`` with gamma steps per second, m bytes of gradient and B bytes per second that the
    links carry together, so that what is sent fits them; or fixed. A link that is still busy misses its turn: what
    was meant for it waits until the partition comes round again.
    Source: Watcharapichat et al., "Ako: Decentralised Deep Learning with Partial Gradient Exchange", SoCC 2016.
    """

    name: ClassVar[str] = "ako"
    restates: ClassVar[bool] = False
    sync_modes: ClassVar[tuple[str, ...]] = ("async", "bounded")
    defaults: ClassVar[Mapping[str, object]] = {
        "staleness": 5,
        "ako_partitions": 0,
        "exchange_thread": "on",
        "window": WINDOW,
    }

    def beside(self, config: Config) -> bool:
        """See `SelectsBeside.beside`."""
        return True

    def start(self, plan: Plan) -> AkoState:
        """See `Strategy.start`."""
        size = plan.layout.size
        return AkoState(plan, np.zeros(size, np.float32), Missed(size), np.empty(size, np.float32))

    def outgoing(
        self, state: AkoState, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[AkoState, dict[int, Outgoing]]:
        """This step's partition to everyone; to a link that takes no message, in `bounded`, a header."""
        if not links:
            return state, {}
        state.accumulated += local.vector
        size = len(state.accumulated)
        part = _partition(state.start, partitions(state.plan.config.ako_partitions, size, links), size)
        entries = Entries(size, state.accumulated[part].copy(), np.arange(part.start, part.stop, dtype=np.uint32))
        state.accumulated[part] = 0
        state.start = part.stop % size
        messages = {peer: Outgoing() for peer in (links if state.plan.config.mode.reports_progress else ())}
        for peer, link in links.items():
            due = state.missed.due(peer, entries, link.ready)
            if due is not None:
                messages[peer] = Outgoing(entries=due, quality=100 * len(due) / size)
        return state, messages

    def incoming(
        self, state: AkoState, local: LocalGradient, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[AkoState, Effect]:
        """``(1/n) (g + all that came)``."""
        share = 1 / len(state.plan.ranks)
        np.multiply(local.vector, np.float32(share), out=state.effective)
        for message in messages:
            message.entries.add_to(state.effective, share)
        return state, Effect(gradient=state.effective)

    def may_advance(self, state: AkoState, step: int, inbox: Inbox) -> bool:
        """By the synchronisation mode."""
        return may_advance(state.plan.config, step, inbox)

    def to_arrays(self, state: AkoState) -> Arrays:
        """What has not been sent, and where the next partition begins."""
        return {
            "accumulated": state.accumulated,
            **under("missed", state.missed.to_arrays()),
            **integers(start=state.start),
        }

    def from_arrays(self, state: AkoState, arrays: Mapping[str, Array]) -> AkoState:
        """See `Resumable.from_arrays`."""
        state.accumulated[:] = vector(arrays, "accumulated", len(state.accumulated))
        state.missed.from_arrays(arrays, "missed", state.plan.ranks)
        state.start = integer(arrays, "start")
        if not 0 <= state.start < len(state.accumulated):
            raise StateError(f"start is {state.start}, expected an entry of the gradient")
        return state


def partitions(wanted: int | None, size: int, links: Mapping[int, LinkView]) -> int:
    """P: ``wanted``, or if that is 0 what the links can carry in a step. A link's budget is B / gamma / (n - 1)."""
    if wanted:
        return min(wanted, size)
    budget_bytes = sum(link.budget_bytes for link in links.values())
    return min(size, max(1, math.ceil(4 * size * len(links) / max(budget_bytes, 1.0))))


def _partition(start: int, count: int, size: int) -> slice:
    """The entries from ``start`` to the next of the borders that cut ``size`` entries into ``count`` parts."""
    border = start * count // size + 1
    while border * size // count <= start:
        border += 1
    return slice(start, border * size // count)
