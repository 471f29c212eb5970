"""Gaia: updates travel when they are significant, and nobody reads what is known to be out of date."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

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
from dlion_mpi.vector.named_arrays import Array, Arrays, integer, integers, under, vector
from dlion_mpi.wire import Message, capacity_bytes, encoded_bytes


@dataclass(slots=True)
class GaiaState:
    """``accumulated``: (P,) float32, own updates that nobody has been sent. ``missed``: what single peers lack.

    ``before``: the weights before the optimizer's last update, None when that is in ``accumulated`` already.
    ``told``: the step for which everyone has had a message. ``effective``: (P,) float32 buffer.
    """

    plan: Plan
    accumulated: Vector
    missed: Missed
    effective: Vector
    before: Vector | None = None
    told: int = -1


class Gaia(Strategy):
    """Approximate Synchronous Parallel: ``acc <- acc + u``; entry i is sent when ``|acc_i| > S_t |w_i|``, then zeroed.

    ``u`` is what the optimizer has done to the weights with this worker's gradient over n; a peer adds it to its own
    weights. ``S_t = S_0 / sqrt(t)``, t from 1. What is not significant goes on accumulating.
    Selective barrier: when significant entries are more than their link carries in a step, their indices go first,
    and the peer does not read them until their values are there; a gradient reads every entry, so it waits.
    Mirror clock: nobody is more than ``--staleness`` steps ahead of the slowest (`bounded`).
    Source: Hsieh et al., "Gaia: Geo-Distributed Machine Learning Approaching LAN Speeds", NSDI 2017, section 3.
    """

    name: ClassVar[str] = "gaia"
    restates: ClassVar[bool] = False
    sync_modes: ClassVar[tuple[str, ...]] = ("bounded", "async")
    defaults: ClassVar[Mapping[str, object]] = {
        "staleness": 5,
        "gaia_threshold": 0.01,
        "gaia_barrier": "selective",
        "exchange_thread": "on",
        "window": WINDOW,
    }

    def start(self, plan: Plan) -> GaiaState:
        """See `Strategy.start`."""
        size = plan.layout.size
        return GaiaState(plan, np.zeros(size, np.float32), Missed(size), np.empty(size, np.float32))

    def opening(
        self, state: GaiaState, step: int, weights: Callable[[], Vector], links: Mapping[int, LinkView]
    ) -> tuple[GaiaState, dict[int, Outgoing]]:
        """The significant updates of the steps so far to everyone; else, in `bounded`, a header."""
        size = len(state.accumulated)
        entries = Entries(size, np.empty(0, np.float32), np.empty(0, np.uint32))
        if state.before is not None:
            now = weights()
            state.accumulated += now - state.before
            state.before = None
            entries = _significant(state, now, threshold(state.plan.config.gaia_threshold or 0.0, step))
        tell = state.plan.config.mode.reports_progress and state.told < step
        messages = {peer: Outgoing() for peer in (links if tell else ())}
        state.told = step
        for peer, link in links.items():
            due = state.missed.due(peer, entries, link.ready, everything=True)
            if due is not None and len(due):
                messages[peer] = Outgoing(
                    entries=due,
                    quality=100 * len(due) / size,
                    announced=state.plan.config.gaia_barrier == "selective"
                    and encoded_bytes(due.indices, size) > link.budget_bytes,
                )
        return state, messages

    def outgoing(
        self, state: GaiaState, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[GaiaState, dict[int, Outgoing]]:
        """Nothing: the gradient is no update yet."""
        return state, {}

    def incoming(
        self, state: GaiaState, local: LocalGradient, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[GaiaState, Effect]:
        """Others' updates to the weights, and ``g / n`` for the optimizer."""
        np.multiply(local.vector, np.float32(1 / len(state.plan.ranks)), out=state.effective)
        before = state.before = weights()
        for message in messages:
            message.entries.add_to(before, 1.0)
        return state, Effect(gradient=state.effective, weights=before if messages else None)

    def may_advance(self, state: GaiaState, step: int, inbox: Inbox) -> bool:
        """By the mirror clock, and with all values that have been announced."""
        return not inbox.announced and may_advance(state.plan.config, step, inbox)

    def to_arrays(self, state: GaiaState) -> Arrays:
        """Updates that have not been sent, and the weights before the last of them."""
        before = {} if state.before is None else {"before": state.before}
        missed = under("missed", state.missed.to_arrays())
        return {"accumulated": state.accumulated, **missed, **before, **integers(told=state.told)}

    def from_arrays(self, state: GaiaState, arrays: Mapping[str, Array]) -> GaiaState:
        """See `Resumable.from_arrays`."""
        size = len(state.accumulated)
        state.accumulated[:] = vector(arrays, "accumulated", size)
        state.missed.from_arrays(arrays, "missed", state.plan.ranks)
        state.before = vector(arrays, "before", size) if "before" in arrays else None
        state.told = integer(arrays, "told")
        return state


def threshold(first: float, step: int) -> float:
    """``S_t = S_0 / sqrt(t)``; ``step`` counts from 0."""
    return first / math.sqrt(step + 1)


def _significant(state: GaiaState, weights: Vector, least: float) -> Entries:
    """The entries with ``|acc| > least |w|`` (where w is 0, any update), taken out of the accumulated.

    All entries, if that is no larger a message.
    """
    size = len(weights)
    limit = np.abs(weights)
    limit *= np.float32(least)
    indices = np.flatnonzero(np.abs(state.accumulated) > limit).astype(np.uint32)
    if len(indices) and encoded_bytes(indices, size) >= capacity_bytes(size):
        entries = Entries(size, state.accumulated.copy())
        state.accumulated.fill(0)
        return entries
    entries = Entries(size, state.accumulated[indices], indices)
    state.accumulated[indices] = 0
    return entries
