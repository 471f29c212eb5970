"""DLion: each link gets the largest entries that it can deliver in time; the rest stays as a residual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.algorithms.bandwidth import MEASURABLE_BYTES
from dlion_mpi.algorithms.error_feedback import Budget, NoResiduals, Residuals, Rules
from dlion_mpi.algorithms.forms import EXACT
from dlion_mpi.algorithms.lead import Lead
from dlion_mpi.algorithms.weighting import coefficient
from dlion_mpi.config.fields import Bounds, option
from dlion_mpi.config.options import Config
from dlion_mpi.strategies.contract import BATCHING, TRANSFER, Strategy
from dlion_mpi.strategies.options import StrategyOptions
from dlion_mpi.strategies.state import State, transient
from dlion_mpi.strategies.types import Effect, LinkView, LinkViews, LocalUpdate, Outbox, Outgoing, Plan, Weights
from dlion_mpi.vector.layout import Vector
from dlion_mpi.wire import Message, encoded_bytes


@dataclass(slots=True)
class DlionState(State):
    """``residuals``: what was computed and not sent. ``lead``: how it counts. ``effective``: (P,) float32, a buffer."""

    residuals: Residuals | NoResiduals
    lead: Lead
    effective: Vector = transient()


LINK_SHARE = 0.05
"""Size of a message as a share of what its link can carry, if unsent entries are kept."""
FEW = 0.01
"""Largest message then that does not have all entries, as a share of the dense gradient. To select more entries costs
more processor time than they gain, and more than to send all."""
N_MIN = 0.85
"""Smallest N of a link [recalled from the paper]. Other values change little (benchmarks/README.md)."""
PATIENCE = 0.5
"""``--patience`` if messages are short enough to arrive within the step."""
LEAST = 0.0025
"""Smallest message that LINK_SHARE makes, as a share of the dense gradient. Smaller messages save little time, and a
link's rate cannot be measured by them."""
MOST = 0.4
"""Largest message that LEAST makes, as a share of what its link can carry: it still arrives in time for PATIENCE."""
SLACK = 4.0
"""Links up to this factor narrower than a wider one get the same entries, if they can carry them. Otherwise measured
budgets, which always differ a little, would leave a residual for every link, and replicas would drift apart."""

PAPER: Mapping[str, object] = {
    "patience": 0.0,
    "batching": "proportional",
    "value_type": "float32",
    "exchange_share": 0.0,
    "transfer": "all",
    "transfer_period": 100,
    "weighting": "paper",
    "unsent": "drop",
    "link_share": 1.0,
    "outer_learning_rate": 1.0,
}
"""The defaults of ``--preset paper``. Source: DLion (HPDC 2021), as far as it is known."""


class Dlion(Strategy):
    """``w_k <- w_k + sum_j c_j u_j``, with the entries of the movement u_j that have arrived from worker j.

    Each link gets the largest entries that it can deliver within the step. The rest stays as a residual, which is sent
    later. A worker applies its own movement at once; without its lead (`ahead`), all workers have the same weights.
    Source: DLion (HPDC 2021), sections on weighted dynamic batching and per-link prioritized gradient exchange. The
    residual follows Deep Gradient Compression (Lin et al. 2018).
    """

    name = "dlion"
    modes = ("bounded", "sync", "async")
    exchanges = "movements"
    window = 3  # an acknowledgement may take as long as its message: with 2, a full link was idle a fifth of the time
    uses: ClassVar[Mapping[str, object]] = {
        "staleness": 5,
        "patience": None,
        "backup": 0,
        **BATCHING,
        "value_type": None,
        "exchange_share": 0.15,
        **TRANSFER,
        "transfer": None,
    }
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": PAPER}

    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyOptions):
        """The selection of what is sent, and the weight of a movement."""

        unsent: str = option(
            "accumulate",
            "keep unsent entries as a residual, to be sent later (accumulate), or drop them",
            choices=("accumulate", "drop"),
        )
        link_share: float | None = option(
            None,
            "size of a message as a share of what its link can carry in a step (default: 0.05, "
            "with few entries at most 1 % of a gradient; with drop 1)",
            bounds=Bounds(1e-6, 1, "a share in (0, 1]"),
            idle={"max_n": ()},
            value="SHARE",
        )
        max_n: float | None = option(
            None,
            "send the entries within N % of the largest of their variable, 100: all (default: each link its own N)",
            bounds=Bounds(1e-6, 100, "in (0, 100]"),
            value="N",
        )
        weighting: str = option(
            "global",
            "weight of the movement of worker j at worker k: LBS_j / GBS (global), or LBS_j / (n LBS_k) (paper)",
            choices=("global", "paper"),
        )
        outer_learning_rate: float | None = option(
            None,
            "factor on all movements (default: what restores the length that averaging takes off, as measured, with "
            "an optimizer that normalises, such as Adam; else 1)",
            bounds=Bounds(1e-6, 100, "in (0, 100]"),
            value="FACTOR",
        )

    options: Options

    @property
    def remembers(self) -> bool:
        """Whether unsent entries are kept."""
        return self.options.unsent != "drop"

    @property
    def short(self) -> bool:
        """Whether messages are short enough to arrive within the step: the default if unsent entries are kept."""
        return self.remembers and self.options.link_share is None and self.options.max_n is None

    @property
    def link_share(self) -> float:
        """The size of a message as a share of what its link can carry."""
        return LINK_SHARE if self.short else self.options.link_share or 1.0

    def derived(self, config: Config) -> Mapping[str, object]:
        """Wait for short messages. Transfer knowledge if unsent entries are dropped, or if an option asks for it."""
        asked = config.transfer_period is not None or config.transfer_merge is not None
        return {
            "patience": PATIENCE if self.link_share < 1 else 0.0,
            "transfer": "all" if asked or not self.remembers else "none",
        }

    def selects_in_background(self, plan: Plan) -> bool:
        """Always: what a step applies depends on nothing that it sends."""
        return True

    def lengthens(self, config: Config) -> bool:
        """Unless the factor is given. What a receiver weighs has no common length."""
        return self.options.outer_learning_rate is None and not self._weighs_at_receipt

    def start(self, plan: Plan) -> DlionState:
        rules = Rules(
            max_n=self.options.max_n,
            n_min=N_MIN,
            value_type=plan.config.value_type,
            few_bytes=max(FEW * 4 * plan.layout.size, MEASURABLE_BYTES) if self.short else math.inf,
        )
        memory = Residuals if self.remembers else NoResiduals
        size = plan.layout.size
        return DlionState(
            plan, memory(plan.layout, rules), Lead(size, at_once=plan.config.mode.lockstep), np.empty(size, np.float32)
        )

    def outgoing(self, state: DlionState, local: LocalUpdate, links: LinkViews) -> Outbox:
        """The largest entries that fit each ready link; on other links a header, if a peer may wait for this step."""
        config = state.plan.config
        budgets = {peer: self._budget(link, config, state.plan.layout.size) for peer, link in links.items()}
        reached = (p for p, budget in budgets.items() if budget is not None or config.mode.reports_progress)
        messages = {peer: Outgoing() for peer in reached}
        weight, residuals = self._outer_rate(local) * self._weight_when_sent(local), state.residuals
        if isinstance(residuals, Residuals):
            state.lead.follow(local.step, self._factor(state, local), residuals.common)
        residuals.add(local.vector, weight)
        for peer, choice in residuals.take(budgets, self._left(state, links)).items():
            messages[peer] = Outgoing(entries=choice.entries, quality=choice.quality, value_type=choice.value_type)
        if isinstance(residuals, Residuals) and residuals.taken is not None:
            state.lead.sent(local.step, residuals.taken)
        return messages

    def incoming(self, state: DlionState, local: LocalUpdate, weights: Weights, messages: Sequence[Message]) -> Effect:
        """The weighted sum of the local movement and of what has arrived, in the order of ranks."""
        weighting, workers = self.options.weighting, len(state.plan.ranks)

        def weight(lbs: int, gbs: int) -> float:
            return coefficient(weighting, lbs, gbs, own_lbs=local.lbs, workers=workers)

        own = self._factor(state, local) * self._outer_rate(local) * weight(local.lbs, local.gbs)
        np.multiply(local.vector, np.float32(own), out=state.effective)
        state.lead.settle(local.step, state.effective)
        for message in sorted(messages, key=lambda message: message.header.sender):
            header = message.header
            message.entries.add_to(state.effective, weight(header.lbs, header.gbs) if self._weighs_at_receipt else 1.0)
        return Effect(movement=state.effective)

    def unfinished(self, state: DlionState, local: LocalUpdate) -> Vector | None:
        """The local movement: it is in the residual, or with the peers."""
        return self.incoming(state, local, lambda: state.effective, []).movement

    def ahead(self, state: DlionState) -> Vector | None:
        """The lead: what the worker has applied of its movements and sent to no peer."""
        if not isinstance(state.residuals, Residuals):
            return None
        if self._weighs_at_receipt:
            return state.residuals.common / np.float32(len(state.plan.ranks))
        return state.lead.over(state.residuals.common)

    def late(self, state: DlionState, messages: Sequence[Message]) -> Vector | None:
        """The sum of what has arrived, if its senders have weighed it."""
        if not messages or self._weighs_at_receipt:
            return None
        state.effective.fill(0)
        for message in messages:
            message.entries.add_to(state.effective, 1.0)
        return state.effective

    def lacking(self, state: DlionState) -> Vector | None:
        """The sum of the residuals of links: what was sent to some peers and not to others.

        The common residual stays out. No peer has applied it, so its gradients have pointed the same way for long: all
        of it at once leads far beyond the optimum (docs/log.md).
        """
        if not isinstance(state.residuals, Residuals) or self._weighs_at_receipt:
            return None
        lacking = np.zeros(state.plan.layout.size, np.float32)
        for residual in state.residuals.by_peer.values():
            lacking += residual
        return lacking

    def _left(self, state: DlionState, links: LinkViews) -> list[int]:
        """The peers that have left. What they lack is kept for the end."""
        return [peer for peer in state.plan.ranks if peer != state.plan.rank and peer not in links]

    @property
    def _weighs_at_receipt(self) -> bool:
        """Whether a movement is weighed by its receiver, and not by its sender."""
        return bool(self.options.weighting == "paper")

    def _outer_rate(self, local: LocalUpdate) -> float:
        """The factor on a movement."""
        return self.options.outer_learning_rate or 1 / (local.shortened or 1.0)

    def _factor(self, state: DlionState, local: LocalUpdate) -> float:
        """Return the factor of the lead: an own movement counts whole, if its batch is at least the mean."""
        if not self.remembers or self._weighs_at_receipt:
            return 1.0
        return min(local.gbs / local.lbs, len(state.plan.ranks)) / self._outer_rate(local)

    def _weight_when_sent(self, local: LocalUpdate) -> float:
        """A movement is weighed by the batch that computed it, however much later it is sent.

        With ``weighting="paper"`` the weight depends on the receiver, and on the batch of the step that sends.
        """
        if self._weighs_at_receipt:
            return 1.0
        return coefficient("global", local.lbs, local.gbs, own_lbs=local.lbs, workers=1)

    def _budget(self, link: LinkView, config: Config, size: int) -> Budget | None:
        """Return the size of the next message of a gradient of ``size`` entries, or None for no message.

        The message uses a part of what the link can carry, so that it arrives soon. In `sync` a link has at most one
        message in flight, since a step takes all messages of the one before: a late acknowledgement must not delay
        this gradient.
        """
        if config.mode.lockstep:
            can_bytes = link.budget_bytes
        elif not link.ready or link.room_bytes <= 0:
            return None
        else:
            can_bytes = min(link.budget_bytes, link.room_bytes)
        exact_bytes = encoded_bytes(None, size, config.value_type or EXACT)
        if self.short and exact_bytes <= min(MOST * can_bytes, link.affordable_bytes):
            return Budget(exact_bytes, can_bytes)
        gradient_bytes = 4 * size
        wanted_bytes = max(self.link_share * can_bytes, min(LEAST * gradient_bytes, MOST * can_bytes))
        least_bytes = max(min(MEASURABLE_BYTES, can_bytes), min(link.measurable_bytes, MOST * can_bytes))
        wanted_bytes = min(max(wanted_bytes, least_bytes), link.affordable_bytes)
        return Budget(wanted_bytes, min(SLACK * wanted_bytes, can_bytes))
