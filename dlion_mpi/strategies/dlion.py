"""DLion: weighted gradients, each link its own N, the unsent remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.flat import Entries, Vector
from dlion_mpi.select import Selection, max_n, nested, relative_magnitude
from dlion_mpi.strategies.base import Effect, Inbox, LinkView, LocalGradient, Outgoing, Plan, may_advance
from dlion_mpi.update import coefficient
from dlion_mpi.wire import Message, ValueType, rounded


@dataclass(slots=True)
class DlionState:
    """``residuals``: per peer what it has not been sent yet, (P,) float32, empty with unsent = "drop".

    ``effective`` and ``scratch``: (P,) float32 buffers. ``local``: this step's own gradient.
    """

    plan: Plan
    residuals: dict[int, Vector]
    effective: Vector
    scratch: Vector
    local: LocalGradient | None = None


class Dlion:
    """``w_k <- w_k - eta sum_j c_j g_j``: own gradient whole, peers' the largest entries that their link carries.

    Source: DLion (HPDC 2021), sections on weighted dynamic batching and per-link prioritized gradient exchange;
    the memory of the unsent follows Deep Gradient Compression (Lin et al. 2018).
    """

    name: ClassVar[str] = "dlion"
    sync_modes: ClassVar[tuple[str, ...]] = ("bounded", "sync", "async")
    defaults: ClassVar[Mapping[str, object]] = {
        "staleness": 5,
        "backup": 0,
        "batching": "auto",
        "weighting": "global",
        "rebalance_every": 10,
        "lbs_max": 1024,
        "gbs_schedule": "grow",
        "gbs_interval": 500,
        "gbs_warmup_step": 32,
        "gbs_warmup_limit": 0.01,
        "gbs_speedup_factor": 1.5,
        "gbs_limit": 0.10,
        "max_n": None,
        "n_min": 0.85,
        "unsent": "accumulate",
        "value_type": "float32",
        "exchange_share": 0.15,
        "transfer": "worse-than-mean",
        "transfer_period": 100,
        "transfer_merge": 0.75,
        "transfer_losses": 10,
    }

    def start(self, plan: Plan) -> DlionState:
        """See `Strategy.start`."""
        size = plan.layout.size
        peers = [r for r in plan.ranks if r != plan.rank] if plan.config.unsent == "accumulate" else []
        return DlionState(
            plan,
            {peer: np.zeros(size, np.float32) for peer in peers},
            np.empty(size, np.float32),
            np.empty(size, np.float32),
        )

    def outgoing(
        self, state: DlionState, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[DlionState, dict[int, Outgoing]]:
        """Every ready link gets the largest entries that fit it.

        Where somebody may be waiting for this worker's step, any other link gets a header that tells it.
        """
        state.local = local
        ready = [peer for peer, link in links.items() if link.ready]
        told = links if state.plan.config.sync != "async" else ready
        messages = {peer: Outgoing() for peer in told}
        if state.plan.config.unsent == "accumulate":
            for peer in links:
                state.residuals[peer] += local.vector
            for peer in ready:
                residual = state.residuals[peer]
                (selection,) = self._select(state, residual, [links[peer]])
                messages[peer] = self._pack(state, residual, selection)
                _subtract(residual, messages[peer])
        elif ready:
            selections = self._select(state, local.vector, [links[peer] for peer in ready])
            for peer, selection in zip(ready, selections, strict=True):
                messages[peer] = self._pack(state, local.vector, selection)
        return state, messages

    def _select(self, state: DlionState, vector: Vector, links: Sequence[LinkView]) -> list[Selection]:
        config = state.plan.config
        if config.max_n == 100:
            return [Selection(None, 100.0)] * len(links)
        relative = relative_magnitude(vector, state.plan.layout, state.scratch)
        if config.max_n is not None:
            return [max_n(relative, config.max_n)] * len(links)
        budgets = [link.budget_bytes for link in links]
        return nested(relative, budgets, n_min=config.n_min or 0.0, value_type=_value_type(state))

    def _pack(self, state: DlionState, vector: Vector, selection: Selection) -> Outgoing:
        # The whole residual is copied since it is zeroed before the message is encoded.
        values = vector.copy() if selection.indices is None else vector[selection.indices]
        return Outgoing(
            entries=Entries(len(vector), values, selection.indices),
            quality=selection.quality,
            value_type=_value_type(state),
        )

    def incoming(
        self, state: DlionState, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[DlionState, Effect]:
        """The weighted sum of the own gradient and of what arrived."""
        assert state.local is not None
        local, config, workers = state.local, state.plan.config, len(state.plan.ranks)
        own = coefficient(config.weighting, local.lbs, local.gbs, own_lbs=local.lbs, workers=workers)
        np.multiply(local.vector, np.float32(own), out=state.effective)
        for message in messages:
            header = message.header
            share = coefficient(config.weighting, header.lbs, header.gbs, own_lbs=local.lbs, workers=workers)
            message.entries.add_to(state.effective, share)
        return state, Effect(gradient=state.effective)

    def may_advance(self, state: DlionState, step: int, inbox: Inbox) -> bool:
        """By the synchronisation mode."""
        return may_advance(state.plan.config, step, inbox)


def _value_type(state: DlionState) -> ValueType:
    return state.plan.config.value_type or "float32"


def _subtract(residual: Vector, message: Outgoing) -> None:
    """``residual -= what the peer will see``: with 16-bit values the rounding error stays."""
    entries = message.entries
    assert entries is not None
    seen = rounded(entries.values, message.value_type)
    if entries.indices is None:
        residual -= seen
    else:
        residual[entries.indices] -= seen
