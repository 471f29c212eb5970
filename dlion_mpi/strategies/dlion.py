"""DLion: weighted gradients, each link its own N, the unsent remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.bandwidth import MEASURABLE_BYTES
from dlion_mpi.algorithms.error_feedback import Budget, Choice, Rules, Unsent
from dlion_mpi.algorithms.selection import Selection, Selector
from dlion_mpi.algorithms.weighting import coefficient
from dlion_mpi.config.options import Config
from dlion_mpi.strategies.contract import BATCHING, TRANSFER, Strategy
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, LinkView, LocalGradient, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.wire import Message, ValueType


@dataclass(slots=True)
class DlionState(State):
    """``unsent``: the residuals, None if they are dropped. ``effective``: (P,) float32, a buffer."""

    unsent: Unsent | None
    selector: Selector = transient()
    effective: Vector = transient()


LINK_SHARE = 0.05
"""``--link-share`` where what is not sent is remembered."""
MESSAGE_LIMIT = 0.01
"""``--message-limit`` there. On wide links larger messages cost the processor more than their entries bring."""

PATIENCE = 0.5
"""``--patience`` where messages can come in the same step, since they leave links most of their time."""
LEAST = 0.0025
"""Of a gradient's bytes: `--link-share` makes messages no smaller. Smaller ones save little time, and how fast a link
is could not be told from them."""
MOST = 0.4
"""Of what a link can take: LEAST makes messages no larger. So they still come in time for PATIENCE."""
SLACK = 4.0
"""Links that are up to so many times narrower than a wider one get the same entries, if they can take them: budgets
that differ a little, as measured ones do, would leave every link something owed, and replicas would drift apart."""

PAPER: Mapping[str, object] = {
    "patience": 0.0,
    "batching": "proportional",
    "weighting": "paper",
    "unsent": "drop",
    "link_share": 1.0,
    "message_limit": 1.0,
    "own_gradient": "whole",
    "value_type": "float32",
    "exchange_share": 0.0,
    "transfer": "all",
    "transfer_period": 100,
}
"""What ``--preset paper`` has in the place of the defaults. Source: DLion (HPDC 2021), as far as it is known."""


class Dlion(Strategy):
    """``w_k <- w_k - eta sum_j c_j g_j``: of every gradient the largest entries that links carry in time, the others
    later; the own as it is sent, or whole.

    Source: DLion (HPDC 2021), sections on weighted dynamic batching and per-link prioritized gradient exchange;
    remembering the unsent, and applying as it is sent, follow Deep Gradient Compression (Lin et al. 2018).
    """

    name = "dlion"
    modes = ("bounded", "sync", "async")
    window = 3  # an acknowledgement may take as long as its message: with 2, a full link was idle a fifth of the time
    uses: ClassVar[Mapping[str, object]] = {
        "staleness": 5,
        "patience": None,
        "backup": 0,
        **BATCHING,
        "weighting": "global",
        "max_n": None,
        "n_min": 0.85,
        "link_share": None,
        "message_limit": None,
        "unsent": "accumulate",
        "own_gradient": None,
        "value_type": "bfloat16",
        "exchange_share": 0.15,
        "exchange_thread": "on",
        "window": window,
        **TRANSFER,
        "transfer": "auto",
    }

    def selects_in_background(self, plan: Plan) -> bool:
        """Unless the step applies what it sends: then it has to be selected before."""
        return plan.config.own_gradient != "as-sent"

    def start(self, plan: Plan) -> DlionState:
        unsent = Unsent(plan.layout, _rules(plan.config)) if plan.config.unsent == "accumulate" else None
        return DlionState(plan, unsent, Selector(plan.layout), np.empty(plan.layout.size, np.float32))

    def outgoing(self, state: DlionState, local: LocalGradient, links: Mapping[int, LinkView]) -> dict[int, Outgoing]:
        """Every ready link gets the largest entries that fit it.

        Where somebody may be waiting for this worker's step, any other link gets a header that tells it.
        """
        config = state.plan.config
        budgets = {peer: _budget(link, config, state.plan.layout.size) for peer, link in links.items()}
        told = [peer for peer, budget in budgets.items() if budget is not None or config.mode.reports_progress]
        messages = {peer: Outgoing() for peer in told}
        if state.unsent is not None:
            state.unsent.add(local.vector)
            choices = state.unsent.take(budgets)
        else:
            choices = _largest(state, local.vector, budgets)
        for peer, choice in choices.items():
            messages[peer] = Outgoing(entries=choice.entries, quality=choice.quality, value_type=_value_type(state))
        return messages

    def incoming(
        self, state: DlionState, local: LocalGradient, weights: Weights, messages: Sequence[Message]
    ) -> Effect:
        """The weighted sum of the own gradient, or of what was sent of it and of earlier ones, and of what arrived.

        What was sent is added in the order of ranks, the own in its place: so everyone's sum of the same is the same
        float32 for float32.
        """
        config, workers = state.plan.config, len(state.plan.ranks)

        def share(lbs: int, gbs: int) -> float:
            return coefficient(config.weighting, lbs, gbs, own_lbs=local.lbs, workers=workers)

        own = share(local.lbs, local.gbs)
        addends = [(m.header.sender, m.entries, share(m.header.lbs, m.header.gbs)) for m in messages]
        if state.unsent is not None and config.own_gradient == "as-sent":
            state.effective.fill(0)
            if state.unsent.sent is not None:
                addends.append((state.plan.rank, state.unsent.sent, own))
        else:
            np.multiply(local.vector, np.float32(own), out=state.effective)
        for _, entries, weight in sorted(addends, key=lambda addend: addend[0]):
            entries.add_to(state.effective, weight)
        return Effect(gradient=state.effective)


def _rules(config: Config) -> Rules:
    return Rules(max_n=config.max_n, n_min=config.n_min or 0.0, value_type=config.value_type or "float32")


def _value_type(state: DlionState) -> ValueType:
    return state.plan.config.value_type or "float32"


def _budget(link: LinkView, config: Config, size: int) -> Budget | None:
    """What a message may have now, of a gradient of ``size`` entries; None if there should be none.

    A part of what the link can take, so that it is there soon. In `sync` no link has more than one message under way,
    since a step takes everyone's messages of the one before: whether its acknowledgement has come yet must not put
    this step's gradient off.
    """
    if config.mode.lockstep:
        can_bytes = link.budget_bytes
    elif not link.ready or link.room_bytes <= 0:
        return None
    else:
        can_bytes = min(link.budget_bytes, link.room_bytes)
    gradient_bytes = 4 * size
    wanted_bytes = max((config.link_share or 1.0) * can_bytes, min(LEAST * gradient_bytes, MOST * can_bytes))
    if config.message_limit is not None and config.message_limit < 1:
        wanted_bytes = min(wanted_bytes, config.message_limit * gradient_bytes)
    wanted_bytes = min(max(wanted_bytes, min(MEASURABLE_BYTES, can_bytes)), link.affordable_bytes)
    return Budget(wanted_bytes, min(SLACK * wanted_bytes, can_bytes))


def _largest(state: DlionState, gradient: Vector, budgets: Mapping[int, Budget | None]) -> dict[int, Choice]:
    """Of this gradient alone, for every link that takes a message now."""
    config, selector = state.plan.config, state.selector
    ready = {peer: budget.wanted_bytes for peer, budget in budgets.items() if budget is not None}
    if not ready:
        return {}
    largest = selector.measure(gradient)
    if config.max_n is not None:
        selections = [selector.max_n(gradient, largest, config.max_n)] * len(ready)
    else:
        selections = selector.nested(
            gradient, largest, list(ready.values()), n_min=config.n_min or 0.0, value_type=_value_type(state)
        )
    return {peer: _choice(gradient, selection) for peer, selection in zip(ready, selections, strict=True)}


def _choice(gradient: Vector, selection: Selection) -> Choice:
    indices = selection.indices
    # Also the whole gradient is copied: a message must not change after it was made.
    values = gradient.copy() if indices is None else gradient[indices]
    return Choice(Entries(len(gradient), values, indices), selection.quality)
