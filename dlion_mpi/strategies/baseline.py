"""Baseline: synchronous, all-to-all, full gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dlion_mpi.strategies.contract import Effect, Inbox, LinkView, LocalGradient, Outgoing, Plan, Strategy, may_advance
from dlion_mpi.vector.layout import Entries, Vector
from dlion_mpi.vector.named_arrays import Array, Arrays
from dlion_mpi.wire import Message


@dataclass(slots=True)
class BaselineState:
    """The plan, and the buffer of the effective gradient, (P,) float32."""

    plan: Plan
    effective: Vector


class Baseline(Strategy):
    """``w <- w - eta (1/n) sum_j g_j`` with everyone's whole gradient of the same step.

    Source: the all-to-all Baseline of DLion (HPDC 2021); see docs/algorithms.md.
    """

    name: ClassVar[str] = "baseline"
    restates: ClassVar[bool] = False
    sync_modes: ClassVar[tuple[str, ...]] = ("sync",)
    defaults: ClassVar[Mapping[str, object]] = {}

    def start(self, plan: Plan) -> BaselineState:
        """See `Strategy.start`."""
        return BaselineState(plan, np.empty(plan.layout.size, np.float32))

    def outgoing(
        self, state: BaselineState, local: LocalGradient, links: Mapping[int, LinkView]
    ) -> tuple[BaselineState, dict[int, Outgoing]]:
        """The whole gradient to everyone."""
        whole = Outgoing(entries=Entries(state.plan.layout.size, local.vector), quality=100.0)
        return state, dict.fromkeys(links, whole)

    def incoming(
        self, state: BaselineState, local: LocalGradient, weights: Callable[[], Vector], messages: Sequence[Message]
    ) -> tuple[BaselineState, Effect]:
        """The mean of everyone's gradients."""
        share = 1 / (1 + len(messages))
        np.multiply(local.vector, np.float32(share), out=state.effective)
        for message in messages:
            message.entries.add_to(state.effective, share)
        return state, Effect(gradient=state.effective)

    def may_advance(self, state: BaselineState, step: int, inbox: Inbox) -> bool:
        """Only with everyone's gradient of this step."""
        return may_advance(state.plan.config, step, inbox)

    def to_arrays(self, state: BaselineState) -> Arrays:
        """Nothing: between steps there are only buffers."""
        return {}

    def from_arrays(self, state: BaselineState, arrays: Mapping[str, Array]) -> BaselineState:
        """See `Resumable.from_arrays`."""
        return state
